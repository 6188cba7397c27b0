"""Layers that other libraries or a user quantized: one table of kinds, one set of laws (`make test-quantizers`)."""

import copy
import importlib
import pickle
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations import eetq

import randlora
from randlora.errors import AdapterError, ConfigError, MergeError, TargetError
from randlora.layers import register_layer
from randlora.quantized import QuantizedLayer
from tests.codes import written_out
from tests.kit import all_bits, fill, same_bits, untouched
from tests.laws import assert_close, oracle_of
from tests.layer_kinds import Coded, quantization

GROUP = 8


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scales).round().to(torch.int8), scales


class Rounded(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        values = (*rounded(linear.weight.detach()), None if linear.bias is None else linear.bias.detach())
        for name, value in zip(("codes", "scales", "bias"), values, strict=True):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes * self.scales, self.bias)  # type: ignore[operator, arg-type]


@register_layer(Rounded)
class RoundedAdapter(QuantizedLayer):
    """Adapts it."""

    @classmethod
    def plain_forward(cls) -> Any:
        return Rounded.forward

    def written_out(self, owner: Any, held: Any = None) -> Tensor:
        codes, scales = held or self.codes(owner)
        return codes * scales  # type: ignore[no-any-return]

    def requantized(self, owner: nn.Module, weight: Tensor) -> tuple[Any, float]:  # noqa: ARG002
        codes, scales = rounded(weight)
        return (codes, scales), float(scales.max())

    def codes(self, owner: Any) -> Any:
        return owner.codes, owner.scales

    def put_in(self, owner: Any, held: Any) -> None:
        owner.codes, owner.scales = held


def _filled(layer: Any) -> Any:
    for name, held in (*layer.named_parameters(), *layer.named_buffers()):
        if name in ("weight", "codes", "qweight", "qzeros"):
            held.data.random_(0, 16)
        elif held.is_floating_point():
            held.data.uniform_(0.01, 0.02)
    return layer.requires_grad_(requires_grad=False)


def _gptqmodel(name: str) -> Any:
    def build(in_features: int, out_features: int, bias: bool) -> Any:
        module = importlib.import_module(f"gptqmodel.nn_modules.qlinear.{'torch_awq' if 'Awq' in name else 'torch'}")
        options = {"in_features": in_features, "out_features": out_features, "bias": bias, "register_buffers": True}
        layer = _filled(getattr(module, name)(bits=4, group_size=16, sym=True, desc_act=False, **options))
        layer.optimized = True  # or its own compiler is run
        layer.post_init()
        return layer

    return build


@cache
def _packed_class() -> Any:
    """Return a format of torchao's that is unknown here, as of int4 packed for a GPU."""

    class Packed(importlib.import_module("torchao.utils").TorchAOBaseTensor):  # type: ignore[misc]
        tensor_data_names: ClassVar[list[str]] = ["qdata"]
        tensor_attribute_names: ClassVar[list[str]] = []

        def __new__(cls, qdata: Tensor) -> Any:
            return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=torch.float32)

        def __init__(self, qdata: Tensor) -> None:
            self.qdata = qdata

    @Packed.implements_torch_function(nn.functional.linear)  # type: ignore[untyped-decorator]
    def product(function: Any, types: Any, args: Any, kwargs: Any) -> Tensor:  # torchao's signature
        return nn.functional.linear(args[0], args[1].qdata / 64, args[2])

    return Packed


def _packed(in_features: int, out_features: int, bias: bool) -> nn.Module:
    layer, codes = nn.Linear(in_features, out_features, bias), torch.randint(-40, 41, (out_features, in_features))
    layer.weight = nn.Parameter(_packed_class()(codes.float()), requires_grad=False)
    return layer


def _by_hqq(linear: nn.Linear, *, bits: int, dtype: torch.dtype = torch.float32, initialize: bool = True) -> Any:
    hqq = importlib.import_module("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=bits, group_size=GROUP)
    given = linear.requires_grad_(requires_grad=False) if initialize else None
    return hqq.HQQLinear(given, config, compute_dtype=dtype, device="cpu")


def _weight_of_hqq(layer: Any) -> Any:
    codes = layer.unpack(dtype=torch.float64)[: layer.meta["scale"].numel()]  # three bits are padded
    return ((codes - layer.meta["zero"].double()) * layer.meta["scale"].double()).view(layer.meta["shape"])


class Kind(NamedTuple):
    build: Any = None  # from (in_features, out_features, bias)
    quantize: Any = None  # from an `nn.Linear`
    weight: Any = None  # reads what the codes of the latter mean
    library: str = "torch"  # that must be installed
    unit: int = 1  # which its sizes are multiples of
    dtype: torch.dtype = torch.float32  # that it computes in
    has_backward: bool = True  # on a CPU

    def made(self, *widths: int) -> nn.Sequential:
        build = self.build or (lambda before, after, bias: self.quantize(nn.Linear(before, after, bias)))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = enumerate(pairwise(width * self.unit for width in widths))
            return nn.Sequential(*(build(*each, index % 2 == 0) for index, each in sizes))

    def adapted(self, *widths: int, **options: Any) -> nn.Sequential:
        model = self.made(*widths)
        randlora.inject(model, **{"r": 3, "alpha": 6, "targets": "all", "stream": "portable", **options})
        return model

    def inputs(self) -> Tensor:
        """Return one row, as EETQ computes gradients of no more."""
        return torch.randn(1, 3, 16 * self.unit).to(self.dtype)


def _torchao(name: str, **options: Any) -> Kind:
    def quantize(linear: nn.Linear) -> nn.Module:
        config = getattr(quantization, name)(**{option: value() for option, value in options.items()})
        quantization.quantize_(nn.Sequential(linear), config)
        return linear

    return Kind(None, quantize, written_out, "torchao")


def _in_groups(bits: int, mapping: str) -> Kind:
    granularity = {"granularity": lambda: quantization.granularity.PerGroup(GROUP)}
    options = {"mapping_type": lambda: quantization.MappingType[mapping], **granularity}
    return _torchao("IntxWeightOnlyConfig", weight_dtype=lambda: getattr(torch, f"int{bits}"), **options)


def _hqq(bits: int, dtype: torch.dtype = torch.float32) -> Kind:
    return Kind(None, partial(_by_hqq, bits=bits, dtype=dtype), _weight_of_hqq, "hqq", dtype=dtype)


def _eetq(into: int, out: int, bias: bool) -> Any:
    return _filled(eetq.EetqLinear(into, out, bias=bias))


def _aqlm(into: int, out: int, bias: bool) -> Any:
    options = {"num_codebooks": 2, "nbits_per_codebook": 4, "bias": bias}
    return _filled(importlib.import_module("aqlm").QuantizedLinear(into, out, 1, 1, **options))


def _autoawq(into: int, out: int, bias: bool) -> Any:
    kind = importlib.import_module("awq.modules.linear.gemm").WQLinear_GEMM
    return _filled(kind(4, 16, into, out, bias, "cpu", training=True))


KINDS = {
    "of a user": Kind(lambda before, after, bias: Coded(before, after, bias=bias, dtype=torch.float32)),
    "rounded by a user": Kind(None, Rounded, lambda layer: layer.codes.double() * layer.scales.double()),
    "eetq": Kind(_eetq),
    "packed": Kind(_packed, library="torchao"),
    "aqlm": Kind(_aqlm, library="aqlm"),
    "gptq": Kind(_gptqmodel("TorchLinear"), library="gptqmodel", unit=16, dtype=torch.bfloat16),
    "awq": Kind(_gptqmodel("AwqTorchLinear"), library="gptqmodel", unit=16, dtype=torch.float16),
    "autoawq": Kind(_autoawq, library="awq", unit=16, dtype=torch.float16, has_backward=False),
    "int8-inputs": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "int4-inputs": _torchao(
        "Int8DynamicActivationIntxWeightConfig",
        weight_dtype=lambda: getattr(torch, "int4", None),
        weight_granularity=lambda: quantization.granularity.PerAxis(0),
    ),
    "int2-groups": _in_groups(2, "SYMMETRIC"),
    "int4-groups": _in_groups(4, "ASYMMETRIC"),
    **{f"hqq{bits}": _hqq(bits) for bits in (8, 4, 3, 2, 1)},
    "hqq4-half": _hqq(4, torch.bfloat16),
}


def of(*names: str) -> pytest.MarkDecorator:
    rows = []
    for name in names:
        library = KINDS[name].library
        is_missing = quantization is None if library == "torchao" else find_spec(library) is None
        marks = [pytest.mark.skipif(is_missing, reason=f"{library} is not installed: make test-quantizers")]
        if library == "torchao":
            marks.append(pytest.mark.filterwarnings("ignore"))  # its own
        rows.append(pytest.param(KINDS[name], id=name, marks=marks))
    return pytest.mark.parametrize("kind", rows)


MERGING = [name for name, kind in KINDS.items() if kind.quantize is not None]


@pytest.fixture(autouse=True)
def _kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a product take the place of EETQ's kernel, which is for GPUs alone."""

    def product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        return x @ (codes.to(x.dtype) * scales.to(x.dtype))

    monkeypatch.setattr(eetq, "eetq_kernels_hub", SimpleNamespace(w8_a16_gemm=product), raising=False)


@of(*KINDS)
def test_a_layer_is_adapted_trained_counted_checked_saved_copied_loaded_and_ejected(kind: Kind, tmp_path: Path) -> None:
    model, base, x = kind.made(16, 24), kind.made(16, 24), kind.inputs()
    report = randlora.inject(model, r=3, alpha=6, targets="all", stream="portable")
    out_features = 24 * kind.unit
    bias = out_features if "bias" in dict(base[0].named_parameters()) else 0
    assert report.total_parameters == 16 * kind.unit * out_features + bias + report.trainable_parameters
    assert not report.left_out
    assert same_bits(model(x), base(x))
    update = oracle_of(fill(model, spread=0.2)[0])
    assert_close(model(x), base(x).double() + x.double() @ update.T, kind.dtype)
    assert not randlora.check(model, x).problems
    if kind.has_backward:
        if kind.weight is None:
            (own,) = torch.autograd.grad(base(x.requires_grad_()).sum(), x)
        else:  # torchao leads no gradient through inputs that it rounds
            own = kind.weight(model[0]).sum(0).expand_as(x)
        model(x.requires_grad_()).sum().backward()
        assert_close(x.grad, own + update.sum(0).expand_as(x), kind.dtype)  # type: ignore[arg-type]
        values = [*randlora.trainable_parameters(model)]
        assert {id(value) for value in model.parameters() if value.grad is not None} == {*map(id, values)}
        whole = torch.autograd.grad(model(x).square().sum(), values)
        model.zero_grad()
        checkpoint(model, x, use_reentrant=False).square().sum().backward()  # activations may be computed again
        assert all(same_bits(value.grad, grad) for value, grad in zip(values, whole, strict=True))  # type: ignore[arg-type]
    names = {f"randlora_{part}.default" for part in ("lambda", "gamma")}
    for state in (model.state_dict(prefix="0."), model[0].state_dict()):
        assert {name.removeprefix("0.0.") for name in state if "randlora" in name} == names
    randlora.save(model, tmp_path)
    twin, other = kind.made(16, 24), kind.adapted(16, 24)
    randlora.load(twin, tmp_path)
    other.load_state_dict(model.state_dict())
    pickled = [pickle.loads(pickle.dumps(model))] if kind.library == "hqq" else []
    for each in (twin, other, copy.deepcopy(model), *pickled):
        assert same_bits(each(x), model(x))
    randlora.eject(model)
    assert all_bits(model.state_dict()) == all_bits(base.state_dict())
    assert type(model[0]) is type(base[0])


@of(*MERGING)
def test_merging_rounds_as_the_library_does_or_makes_plain_layers_and_is_undone(kind: Kind) -> None:
    model, x = kind.adapted(16, 24, 8), kind.inputs()
    randlora.inject(model, r=3, targets="all", name="b")
    randlora.activate(model, ["default", "b"])
    for name in ("default", "b"):
        fill(model, name, spread=0.2)
    before, held, output = all_bits(model.state_dict()), {**vars(model[0])}, model(x)
    for how in ("requantize", "dequantize"):
        for name in ("default", "b"):
            randlora.merge(model, adapters=name, reversible=True, quantized=how)
            assert all_bits(model.state_dict()) == before
        assert ("extra_repr" in vars(model[0])) == (how == "requantize" and "extra_repr" in held)  # of quantized layers
        assert not same_bits(model(x), output) or how == "dequantize"
        randlora.unmerge(model)
        assert all_bits(model.state_dict()) == before
        assert vars(model[0]).keys() == held.keys()
        assert vars(model[0]).get("extra_repr") is held.get("extra_repr")
        assert same_bits(model(x), output)
    updates = [randlora.delta_weight(model, str(i)).detach().double() for i in range(2)]  # of both adapters
    exact = [kind.weight(layer) + update for layer, update in zip(model, updates, strict=True)]
    merged = copy.deepcopy(model)
    report, again = randlora.merge(merged), nn.Linear(16, 24, bias=False)
    again.weight = nn.Parameter(exact[0].float())
    assert type(merged[0]) is type(model[0]).__dict__["randlora_base"]
    off, least = (
        float((kind.weight(layer) - exact[0]).norm() / updates[0].norm()) for layer in (merged[0], kind.quantize(again))
    )
    assert off == pytest.approx(least, rel=0.05, abs=1e-3)  # their sums differ in the last bits
    assert report.rounding["0"].relative == pytest.approx(off, rel=0.05, abs=1e-2)
    tensors = dict(randlora.merged_tensors(model))
    assert [*tensors] == ["0.weight", "0.bias", "1.weight"]
    randlora.merge(model, quantized="dequantize")
    assert [type(layer) for layer in model] == [nn.Linear] * 2
    for layer, weight in zip(model, exact, strict=True):
        assert_close(layer.get_parameter("weight"), weight, kind.dtype)
    assert all_bits(dict(model.named_parameters())) == all_bits(model.state_dict()) == all_bits(tensors)
    assert not {"W_q", "meta", "quant_config"} & vars(model[0]).keys()
    assert (model(x) - output).norm() <= 0.05 * output.norm()  # torchao rounds inputs too


@of(*(name for name in KINDS if name not in MERGING))
def test_merging_is_refused_with_what_to_do_and_changes_nothing(kind: Kind, tmp_path: Path) -> None:
    model, x, name = fill(kind.adapted(16, 24)), kind.inputs(), type(kind.made(16, 24)[0]).__name__
    reason = f"0 has codes that only the forward of {name} reads.*leave the adapter unmer"
    refused: list[Callable[[], object]] = [
        lambda: randlora.merge(model, reversible=True),
        lambda: randlora.merge(model, quantized="dequantize"),
        lambda: list(randlora.merged_tensors(model)),
        lambda: randlora.files.save_merged(model, tmp_path / "merged"),
        lambda: randlora.merged(model).__enter__(),
    ]
    for call in refused:
        with untouched(model), pytest.raises(MergeError, match=rf"{reason}.*randlora\.files\.merge"):
            call()
    assert not (tmp_path / "merged").exists()
    beside = nn.Sequential(*kind.made(16, 24), nn.Linear(24 * kind.unit, 6, dtype=kind.dtype))
    randlora.inject(beside, r=3, targets=["1"])
    with pytest.raises(MergeError, match="0 is quantized, and the codes of a"):
        list(randlora.merged_tensors(beside))
    with randlora.merged(beside):  # which concerns the other one alone
        beside(x)
    randlora.inject(beside, r=3, targets="all", name="all")
    randlora.activate(beside, "all")
    report = randlora.check(beside, x)
    assert (report.problems, report.checked) == ((), ("0", "1"))
    assert "only checked unmerged, as nothing can be merged into them: 0" in report.notes
    assert not any("merged weights were not compared" in note for note in report.notes)


def test_a_layer_that_lacks_what_is_needed_is_refused_with_what_to_do() -> None:
    def coded(*lacking: str) -> nn.Module:
        layer = Coded(8, 12, bias=False, dtype=torch.float32)
        for name in lacking:
            delattr(layer, name)
        return layer

    rounded, own = partial(Rounded, nn.Linear(8, 12)), {"targets": ["1"]}
    beside = [{"targets": ["0"], "train_also": [name]} for name in ("1", "1.codes", "1.bias")]
    rows: list[tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = [
        (partial(coded, "in_features"), own, AdapterError, "'Coded' .* define features in the adapter layer of Coded"),
        (partial(coded, "codes"), own, TargetError, "1 has no codes in .*, or define find_weight in CodedAdapter"),
        (lambda: _eetq(8, 8, True).to("meta"), own, TargetError, "1 has no values"),
        *((rounded, options, TargetError, r"1\.(codes|bias), a buffer of a quantized") for options in beside),
    ]
    for build, options, error, said in rows:
        with pytest.raises(error, match=said):
            randlora.inject(nn.Sequential(nn.Linear(8, 8), build()), r=2, **options)
    with pytest.raises(ConfigError, match="not quantized, but this one is"):
        randlora.training_memory(nn.Sequential(coded()), r=2, load_in_4bit=True)


@of("int8-inputs")
def test_a_bias_is_trained_with_an_input_without_a_batch_and_scales_of_blocks_are_refused(kind: Kind) -> None:
    model: Any = kind.adapted(16, 24, train_also=["0.bias"])
    model(torch.randn(16)).sum().backward()
    assert torch.equal(model.get_parameter("0.bias").grad, torch.ones(24))
    model = kind.made(16, 24)
    model[0].weight.block_size = [2, 16]
    with pytest.raises(TargetError, match="a scale for each block"):
        randlora.inject(model, r=2)


@of("hqq4")
def test_a_layer_of_hqq_has_either_backend_and_whose_scales_are_away_is_dequantized_only(kind: Kind) -> None:
    hqq = importlib.import_module("hqq.core.quantize")
    x, empty = torch.randn(4, 16, requires_grad=True), _by_hqq(nn.Linear(8, 8), bits=4, initialize=False)
    vars(empty).update(in_features=8, out_features=8)
    with pytest.raises(TargetError, match=r"0 has no codes .*: load the model's weights"):
        randlora.inject(nn.Sequential(empty), r=2, targets=["0"])
    model = kind.adapted(16, 24, 8, targets=["0"])
    hqq.HQQLinear.set_backend(hqq.HQQBackend.PYTORCH_FORWARD)  # beside the other, which is the default
    try:
        (found,) = torch.autograd.grad(model[0](x).sum(), x)
    finally:
        hqq.HQQLinear.set_backend(hqq.HQQBackend.PYTORCH)
    assert_close(found, (kind.weight(model[0]) + oracle_of(model[0])).sum(0).expand(4, 16), torch.float32)
    assert_close(dict(randlora.merged_tensors(model))["1.weight"], kind.weight(model[1]), torch.float32)
    meta: Any = model[0].meta
    meta["zero_scale"] = torch.stack([meta.pop("zero"), meta.pop("scale")])  # as offload_meta=True leaves them
    with pytest.raises(MergeError, match="0 has scales that are quantized or offloaded"):
        randlora.merge(model)
    assert not randlora.check(model, torch.randn(3, 16)).problems
    names = [*meta]
    assert [name for name, _ in randlora.merged_tensors(model)] == ["0.weight", "0.bias", "1.weight"]
    assert [*meta] == names  # which dequantizing changes
    randlora.merge(model, quantized="dequantize")

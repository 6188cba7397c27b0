"""Layers of whose weight only the forward is known: an adapter is added to their output, and merging is refused.

EETQ has a kernel for GPUs alone, whose place a product takes here; the layer is transformers' own.
`make test-quantizers` runs this file where gptqmodel, autoawq and aqlm are installed, whose own code runs on a CPU.
"""

import copy
import importlib
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AwqConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations import eetq
from transformers.integrations.awq import replace_with_awq_linear

import randlora
from randlora.layers import register_layer
from randlora.quantized import ForwardOnly
from tests.kit import all_bits, fill, same_bits
from tests.laws import assert_close, oracle_of


class Doubled(nn.Module):
    """A layer that a user registers: int8 codes that stand for twice their value."""

    codes: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.register_buffer("bias", torch.randn(out_features) if bias else None)
        self.register_buffer("codes", torch.randint(-3, 4, (out_features, in_features), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        product = x @ self.codes.to(x.dtype).T * 2
        return product if self.bias is None else product + self.bias


@register_layer(Doubled)
class DoubledAdapter(ForwardOnly):
    """Adapts it: the shape is that of its codes."""

    @staticmethod
    def features(owner: nn.Module) -> tuple[int, int]:
        out_features, in_features = owner.get_buffer("codes").shape
        return in_features, out_features


def _eetq(in_features: int, out_features: int, *, bias: bool) -> Any:
    layer = eetq.EetqLinear(in_features, out_features, bias=bias)
    layer.weight.copy_(torch.randint(-127, 128, layer.weight.shape))
    nn.init.uniform_(layer.weight_scales.data, 0.005, 0.01)
    if bias:
        nn.init.normal_(layer.bias.data)
    return layer.requires_grad_(requires_grad=False)


def _aqlm(in_features: int, out_features: int, *, bias: bool) -> nn.Module:
    kind: Any = importlib.import_module("aqlm").QuantizedLinear
    layer = kind(in_features, out_features, 1, 1, num_codebooks=2, nbits_per_codebook=4, bias=bias)
    for parameter in (layer.codebooks, layer.scales, *([layer.bias] if bias else [])):
        nn.init.normal_(parameter)
    layer.codes.copy_(torch.randint(0, 16, layer.codes.shape))
    made: nn.Module = layer
    return made


def _gptqmodel(module: str, name: str) -> Callable[..., nn.Module]:
    def build(in_features: int, out_features: int, *, bias: bool) -> Any:
        kind = getattr(importlib.import_module(f"gptqmodel.nn_modules.qlinear.{module}"), name)
        options = {"in_features": in_features, "out_features": out_features, "bias": bias, "register_buffers": True}
        layer = _filled(kind(bits=4, group_size=16, sym=True, desc_act=False, **options))
        layer.optimized = True  # or its own compiler is run
        layer.post_init()
        return layer

    return build


def _autoawq(in_features: int, out_features: int, *, bias: bool) -> Any:
    kind = importlib.import_module("awq.modules.linear.gemm").WQLinear_GEMM
    return _filled(kind(4, 16, in_features, out_features, bias, "cpu", training=True))


def _filled(layer: Any) -> Any:
    for packed in (layer.qweight, layer.qzeros):
        packed.copy_(torch.randint(-(2**31), 2**31, packed.shape))
    layer.scales.uniform_(0.01, 0.02)
    if layer.bias is not None:
        layer.bias.normal_()
    return layer


def _nibbles(packed: Tensor, dim: int, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> Tensor:
    """Unpack 4-bit codes along a dimension; ``order`` says which nibble has which."""
    parts = torch.stack([(packed >> 4 * order.index(index)) & 15 for index in range(8)], dim + 1)
    return parts.flatten(dim, dim + 1).double()


def _weight_of_gptq(layer: Any) -> Any:
    groups = layer.g_idx.long()
    return ((_nibbles(layer.qweight, 0) - _nibbles(layer.qzeros, 1)[groups]) * layer.scales.double()[groups]).T


def _weight_of_awq(layer: Any) -> Any:
    codes, zeros = (_nibbles(packed, 1, (0, 2, 4, 6, 1, 3, 5, 7)) for packed in (layer.qweight, layer.qzeros))
    return ((codes - zeros.repeat_interleave(16, 0)) * layer.scales.double().repeat_interleave(16, 0)).T


def _weight_of_aqlm(layer: Any) -> Any:
    books = zip(layer.codes.long().unbind(-1), layer.codebooks.double()[:, :, 0, 0], strict=True)
    first, second = (book[part] for part, book in books)
    return (first + second) * layer.scales.double()[:, :, 0, 0]


class Kind(NamedTuple):
    build: Callable[..., nn.Module]  # makes one with random codes from its sizes
    weight: Callable[[Any], Tensor]  # reads its weight, by what the codes mean
    library: str = "torch"  # that must be installed
    unit: int = 1  # which its sizes are multiples of
    dtype: torch.dtype = torch.float32  # that it computes in
    has_backward: bool = True  # on a CPU


KINDS = {
    "of a user": Kind(Doubled, lambda layer: 2 * layer.codes.double()),
    "eetq": Kind(_eetq, lambda layer: (layer.weight.double() * layer.weight_scales.double()).T),
    "aqlm": Kind(_aqlm, _weight_of_aqlm, "aqlm"),
    "gptq": Kind(_gptqmodel("torch", "TorchLinear"), _weight_of_gptq, "gptqmodel", 16, torch.bfloat16),
    "awq": Kind(_gptqmodel("torch_awq", "AwqTorchLinear"), _weight_of_awq, "gptqmodel", 16, torch.float16),
    "autoawq": Kind(_autoawq, _weight_of_awq, "awq", 16, torch.float16, has_backward=False),
}
KINDS = {name: kind for name, kind in KINDS.items() if find_spec(kind.library) is not None}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture(autouse=True)
def _kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        return x @ (codes.to(x.dtype) * scales.to(x.dtype))

    monkeypatch.setattr(eetq, "eetq_kernels_hub", SimpleNamespace(w8_a16_gemm=product), raising=False)


def built(kind: Kind, *widths: int) -> nn.Sequential:
    """Return layers, the same ones each time, of which every other one has a bias."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [
            kind.build(before * kind.unit, after * kind.unit, bias=index % 2 == 0)
            for index, (before, after) in enumerate(pairwise(widths))
        ]
    return nn.Sequential(*layers)


def tokens(kind: Kind, width: int, count: int = 3) -> Tensor:
    """Return an input: one row, as EETQ computes gradients of no more."""
    return torch.randn(1, count, width * kind.unit).to(kind.dtype)


@every_kind
def test_a_layer_is_adapted_trained_counted_checked_saved_copied_loaded_and_ejected(kind: Kind, tmp_path: Path) -> None:
    model, base, x = built(kind, 12, 20), built(kind, 12, 20), tokens(kind, 12)
    report = randlora.inject(model, r=3, alpha=6, targets="all", stream="portable")
    out_features = 20 * kind.unit
    bias = out_features if "bias" in dict(base[0].named_parameters()) else 0
    assert report.total_parameters == 12 * kind.unit * out_features + bias + report.trainable_parameters
    assert not report.left_out
    assert same_bits(model(x), base(x))
    update = oracle_of(fill(model)[0])
    assert_close(model(x), base(x).double() + x.double() @ update.T, kind.dtype)
    if kind.has_backward:
        model(x.requires_grad_()).sum().backward()
        assert_close(x.grad, (kind.weight(model[0]) + update).sum(0).expand_as(x), kind.dtype)  # type: ignore[arg-type]
        values = [*randlora.trainable_parameters(model)]
        assert {id(value) for value in model.parameters() if value.grad is not None} == {*map(id, values)}
        whole = torch.autograd.grad(model(x).square().sum(), values)
        model.zero_grad()
        checkpoint(model, x, use_reentrant=False).square().sum().backward()  # activations may be computed again
        assert all(same_bits(value.grad, grad) for value, grad in zip(values, whole, strict=True))  # type: ignore[arg-type]
    randlora.save(model, tmp_path)
    twin, other = built(kind, 12, 20), built(kind, 12, 20)
    randlora.load(twin, tmp_path)
    randlora.inject(other, r=3, alpha=6, targets="all", stream="portable")
    other.load_state_dict(model.state_dict())
    for each in (twin, other, copy.deepcopy(model)):
        assert same_bits(each(x), model(x))
    randlora.eject(model)
    assert all_bits(model.state_dict()) == all_bits(base.state_dict())
    assert type(model[0]) is type(base[0])
    with pytest.raises(randlora.errors.TargetError, match="0 has no values"):
        randlora.inject(base.to("meta"), r=3, targets=["0"])


@every_kind
def test_merging_is_refused_with_what_to_do_and_changes_nothing(kind: Kind, tmp_path: Path) -> None:
    model, x = built(kind, 12, 20), tokens(kind, 12)
    name = type(model[0]).__name__
    randlora.inject(model, r=3, targets="all")
    before, output = all_bits(fill(model).state_dict()), model(x)
    reason = f"0 has codes that only the forward of {name} reads.*leave the adapter unmerged.*randlora.files.merge"
    refused: list[Callable[[], object]] = [
        lambda: randlora.merge(model, reversible=True),
        lambda: randlora.merge(model, quantized="dequantize"),
        lambda: list(randlora.merged_tensors(model)),
        lambda: randlora.files.save_merged(model, tmp_path / "merged"),
        lambda: randlora.merged(model).__enter__(),
    ]
    for call in refused:
        with pytest.raises(randlora.errors.MergeError, match=reason):
            call()
        assert all_bits(model.state_dict()) == before
        assert same_bits(model(x), output)
    assert not (tmp_path / "merged").exists()
    beside = nn.Sequential(*built(kind, 12, 20), nn.Linear(20 * kind.unit, 6, dtype=kind.dtype))
    randlora.inject(beside, r=3, targets=["1"])
    with pytest.raises(randlora.errors.MergeError, match="0 is quantized, and the codes of a"):
        list(randlora.merged_tensors(beside))
    with randlora.merged(beside):  # which concerns the other one alone
        beside(x)
    randlora.inject(beside, r=3, targets="all", name="all")
    randlora.activate(beside, "all")
    report = randlora.check(beside, x)
    assert (report.problems, report.checked) == ((), ("0", "1"))
    assert "only checked unmerged, as nothing can be merged into them: 0" in report.notes
    assert not any("merged weights were not compared" in note for note in report.notes)


class Flat(nn.Module):
    """A layer with packed codes in one dimension, and a bias in a buffer, as kernels ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 12
        self.register_buffer("bias", torch.randn(12))
        self.register_buffer("packed", torch.zeros(48, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_buffer("bias").expand(*x.shape[:-1], 12)


class Nameless(Doubled):
    """A layer that says nothing about its sizes."""


class Away(nn.Module):
    """A layer whose codes are neither parameters nor buffers."""

    in_features, out_features = 8, 12


class AwayAdapter(ForwardOnly):
    """Adapts it, but does not know where its codes are."""


for own, adapter_class in ((Flat, ForwardOnly), (Nameless, ForwardOnly), (Away, AwayAdapter)):
    register_layer(own)(adapter_class)


def test_codes_may_be_packed_in_one_dimension(tmp_path: Path) -> None:
    model, x = nn.Sequential(Flat()), torch.randn(3, 8)
    randlora.inject(model, r=2, targets="all", alpha=4)
    fill(model)
    assert_close(model(x), model[0].get_buffer("bias").double() + x.double() @ oracle_of(model[0]).T, torch.float32)
    randlora.save(model, tmp_path)


def test_a_layer_that_does_not_say_what_is_needed_is_refused_with_what_to_define() -> None:
    message = "'Nameless' object has no attribute 'in_features': define features in the adapter layer of Nameless"
    with pytest.raises(randlora.errors.AdapterError, match=message):
        randlora.inject(nn.Sequential(nn.Linear(8, 8), Nameless(8, 8, bias=False)), r=2)
    message = "1 has no codes in its parameters and buffers: .*, or define weight_of in AwayAdapter if codes"
    with pytest.raises(randlora.errors.TargetError, match=message):
        randlora.inject(nn.Sequential(nn.Linear(8, 8), Away()), r=2, targets=["1"])


def test_codes_in_buffers_are_not_trained_and_no_memory_in_4_bits_is_planned_for_them() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Doubled(8, 8, bias=True))
    said = r"train_also includes 1\.(codes|bias), a buffer of a quantized"
    for names in (["1"], ["1.codes"], ["1.bias"]):
        with pytest.raises(randlora.errors.TargetError, match=said):
            randlora.inject(model, r=2, targets=["0"], train_also=names)
    with pytest.raises(randlora.errors.ConfigError, match="not quantized, but this one is"):
        randlora.training_memory(model, r=2, load_in_4bit=True)


@pytest.mark.skipif("awq" not in KINDS, reason="gptqmodel is not installed")
def test_a_model_with_the_layers_that_transformers_puts_in_for_awq_trains() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=96)).half()
    config = AwqConfig(bits=4, group_size=16, zero_point=True, backend="torch_awq")
    replace_with_awq_linear(model, ["lm_head"], quantization_config=config, device_map={"": "cpu"})
    for layer in (module for module in model.modules() if "qweight" in module._buffers):
        _filled(layer.to_empty(device="cpu")).post_init()
    report = randlora.inject(model, r=4)
    assert len(report.targets) == 4
    assert not report.warning
    ids = torch.randint(0, 96, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in randlora.trainable_parameters(model))

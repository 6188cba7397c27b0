"""Linear layers that HQQ quantized: they train, are saved and loaded, and merge by rounding to such codes.

`make test-quantizers` runs this file: where hqq is installed, transformers imports it, which takes seconds.
"""

import copy
import pickle
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from tests.kit import all_bits, fill, same_bits
from tests.laws import assert_close, diagonals, oracle_of

if find_spec("hqq") is None:
    pytest.skip("hqq is not installed", allow_module_level=True)
from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

every_width = pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def quantized(bits: int, *widths: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return layers that were quantized in groups of 8, the same ones each time; every other one has a bias."""
    config = BaseQuantizeConfig(nbits=bits, group_size=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(*sizes, bias=index % 2 == 0) for index, sizes in enumerate(pairwise(widths))]
    frozen = [layer.requires_grad_(requires_grad=False) for layer in layers]
    return nn.Sequential(*(HQQLinear(layer, config, compute_dtype=dtype, device="cpu") for layer in frozen))


def adapted(bits: int, *widths: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = quantized(bits, *widths, dtype=dtype)
    randlora.inject(model, r=3, alpha=6, targets="all", stream="portable")
    return fill(model, spread=0.2)


def written_out(layer: Any) -> Tensor:
    """Return the weight of a layer in float64: a scale for each group of 8, times code minus zero."""
    codes = layer.unpack(dtype=torch.float64)[: layer.meta["scale"].numel()]  # three bits are padded
    weight: Tensor = ((codes - layer.meta["zero"].double()) * layer.meta["scale"].double()).view(layer.meta["shape"])
    return weight


@every_width
@every_dtype
def test_an_adapter_adds_the_oracles_update_and_merging_rounds_the_sum_as_hqq_does(
    bits: int, dtype: torch.dtype
) -> None:
    base, x = quantized(bits, 16, 24, dtype=dtype), torch.randn(3, 16).to(dtype)
    model = copy.deepcopy(base)
    randlora.inject(model, r=3, alpha=6, targets="all", stream="portable")
    assert same_bits(model(x), base(x))
    fill(model, spread=0.2)
    update, before = oracle_of(model[0]), model(x)
    assert_close(before, base(x).double() + x.double() @ update.T, dtype)
    exact = written_out(model[0]) + update
    report = randlora.merge(model, reversible=True)
    assert isinstance(model[0], HQQLinear)
    plain = nn.Linear(16, 24, bias=False).requires_grad_(requires_grad=False)
    plain.weight.copy_(exact)
    config = BaseQuantizeConfig(nbits=bits, group_size=8)
    own = HQQLinear(plain, config, compute_dtype=dtype, device="cpu")
    off, least = (float((written_out(layer) - exact).norm() / update.norm()) for layer in (model[0], own))
    assert off == pytest.approx(least, rel=0.05, abs=1e-3)  # their sums differ in the last bits
    assert report.rounding["0"].relative == pytest.approx(off, rel=0.05, abs=1e-2)
    assert report.rounding["0"].step == pytest.approx(float(model[0].meta["scale"].abs().max()))
    randlora.unmerge(model)
    assert same_bits(model(x), before)


@pytest.mark.parametrize("backend", [HQQBackend.PYTORCH, HQQBackend.PYTORCH_FORWARD])
def test_gradients_are_those_of_weight_plus_update(backend: HQQBackend) -> None:
    model, x = adapted(4, 16, 8), torch.randn(4, 16, requires_grad=True)
    HQQLinear.set_backend(backend)
    try:
        model(x).sum().backward()
    finally:
        HQQLinear.set_backend(HQQBackend.PYTORCH)
    weight = written_out(model[0]) + oracle_of(model[0])
    assert_close(x.grad, weight.sum(0).expand(4, 16), torch.float32)  # type: ignore[arg-type]
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    assert {*map(id, trained)} == {*map(id, diagonals(model[0]))}


@every_width
def test_dequantizing_gives_a_plain_layer_with_the_sum(bits: int) -> None:
    model, x = adapted(bits, 16, 24, 8), torch.randn(3, 16)
    exact, before = [written_out(layer) + oracle_of(layer) for layer in model], model(x)
    tensors = dict(randlora.merged_tensors(model))
    assert [*tensors] == ["0.weight", "0.bias", "1.weight"]
    randlora.merge(model, quantized="dequantize")
    for index, layer in enumerate(model):
        assert type(layer) is nn.Linear
        assert_close(layer.weight, exact[index], torch.float32)
    assert all_bits(model.state_dict()) == all_bits(tensors)
    assert not {"W_q", "meta", "quant_config"} & vars(model[0]).keys()
    assert_close(model(x), before.double(), torch.float32)


@pytest.mark.parametrize("how", ["requantize", "dequantize"])
def test_a_reversible_merge_leaves_the_state_dict_and_is_undone(how: Any) -> None:
    model, x = adapted(4, 16, 24, 8), torch.randn(3, 16)
    before, output, held = all_bits(model.state_dict()), model(x), {*vars(model[0])}
    with randlora.merged(model, quantized=how):
        assert all_bits(model.state_dict()) == before
        assert not same_bits(model(x), output) or how == "dequantize"
    assert all_bits(model.state_dict()) == before
    assert {*vars(model[0])} == held
    assert same_bits(model(x), output)


def test_an_adapter_is_reported_checked_saved_copied_loaded_and_ejected(tmp_path: Path) -> None:
    model, x = quantized(4, 16, 24, 8), torch.randn(3, 16)
    report = randlora.inject(model, r=3, alpha=6, targets="all", stream="portable")
    assert report.total_parameters == 16 * 24 + 24 * 8 + report.trainable_parameters  # a bias is none of HQQ's
    assert not report.left_out
    assert not randlora.check(model, x).problems
    names = {f"randlora_{part}.default" for part in ("lambda", "gamma")}
    state = fill(model).state_dict()  # as if the class wrote all
    assert {name for name in state if "randlora" in name} == {f"{i}.{name}" for i in range(2) for name in names}
    assert {name for name in model[0].state_dict() if "randlora" in name} == names
    randlora.save(model, tmp_path)
    twin = quantized(4, 16, 24, 8)
    randlora.load(twin, tmp_path)
    other = adapted(4, 16, 24, 8)
    other.load_state_dict(state)
    for each in (twin, other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(each(x), model(x))
    randlora.eject(model)
    assert [type(layer) for layer in model] == [HQQLinear, HQQLinear]
    assert all_bits(model.state_dict()) == all_bits(quantized(4, 16, 24, 8).state_dict())


def test_a_layer_whose_scales_are_away_or_without_an_adapter_is_dequantized_only() -> None:
    model = quantized(4, 16, 24, 8)
    randlora.inject(model, r=3, targets=["0"])
    assert_close(dict(randlora.merged_tensors(model))["1.weight"], written_out(model[1]), torch.float32)
    meta: Any = model[0].meta
    meta["zero_scale"] = torch.stack([meta.pop("zero"), meta.pop("scale")])  # as offload_meta=True leaves them
    with pytest.raises(randlora.errors.MergeError, match="0 has scales that are quantized or offloaded"):
        randlora.merge(model)
    assert not randlora.check(model, torch.randn(3, 16)).problems
    names = [*meta]
    assert [name for name, _ in randlora.merged_tensors(model)] == ["0.weight", "0.bias", "1.weight"]
    assert [*meta] == names  # which dequantizing changes
    randlora.merge(model, quantized="dequantize")


def test_a_layer_that_is_not_quantized_yet_is_refused() -> None:
    config = BaseQuantizeConfig(nbits=4, group_size=8)
    model = nn.Sequential(HQQLinear(None, config, compute_dtype=torch.float32, device="cpu"))
    vars(model[0]).update(in_features=8, out_features=8)
    with pytest.raises(randlora.errors.TargetError, match=r"0 has no codes .*: load the model's weights"):
        randlora.inject(model, r=3, targets=["0"])

"""Linear layers whose weight torchao quantized: they train, are saved and loaded, and merge by rounding to codes."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import randlora
from tests import reference
from tests.kit import fill, same_bits
from tests.laws import adapter_layer, assert_close, diagonals

pytestmark = pytest.mark.filterwarnings("ignore")  # torchao's own, of versions of Python and of the compiler

try:
    from torchao import quantization
    from torchao.quantization import Int8Tensor as Int8Tensor
except Exception as error:  # it raises whatever comes of a torch that it was not built for
    pytest.skip(f"torchao does not go with this torch: {error}", allow_module_level=True)

CONFIGS = {
    "int8": quantization.Int8WeightOnlyConfig,
    "int8-inputs": quantization.Int8DynamicActivationInt8WeightConfig,
    "float8": quantization.Float8WeightOnlyConfig,
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
sides = st.integers(2, 24)  # torchao cannot multiply by a weight of one row


def quantized(config: Any, *widths: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Return layers that were quantized, the same ones for a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(before, after, dtype=dtype) for before, after in pairwise(widths)]
    model = nn.Sequential(*layers)
    quantization.quantize_(model, config())
    return model


def written_out(weight: Any) -> Tensor:
    """Return codes times scales, entry by entry, in float64."""
    rows = zip(weight.qdata.double().tolist(), weight.scale.double().tolist(), strict=True)
    return torch.tensor([[code * scale for code in row] for row, (scale,) in rows], dtype=torch.float64)


def step_of(weight: Any) -> Tensor:
    """Return the widest gap between neighboring levels of each row, ``(rows, 1)``."""
    gap = 1 if weight.qdata.dtype == torch.int8 else 448 - 416
    scales: Tensor = weight.scale.double()
    return gap * scales


def oracle(layer: nn.Module) -> Tensor:
    """Return the update of a layer whose adapter has alpha = 2r, in float64."""
    lam, gamma = diagonals(layer)
    part = adapter_layer(layer).adapters["default"]
    out, into = part.shape
    bases = part.basis.slices(max(out, into), min(out, into), device="cpu", dtype=torch.float64)
    return reference.delta_weight(*bases, lam, gamma, 2.0, in_features=into)


@every_config
@every_dtype
@given(out=sides, into=sides, r=st.integers(1, 6))
def test_an_adapter_adds_the_oracles_update_to_the_output(
    config: Any, dtype: torch.dtype, out: int, into: int, r: int
) -> None:
    model = quantized(config, into, out, dtype=dtype)
    x, base = torch.randn(3, into).to(dtype), copy.deepcopy(model)
    randlora.inject(model, r=r, alpha=2 * r, targets="all", stream="portable")
    assert same_bits(model(x), base(x))
    fill(model)
    assert_close(model(x), base(x).double() + x.double() @ oracle(model[0]).T, dtype)


@every_config
def test_gradients_are_those_of_the_dequantized_layer(config: Any) -> None:
    model, x = quantized(config, 12, 8), torch.randn(4, 12, requires_grad=True)
    randlora.inject(model, r=3, targets="all")
    fill(model)
    model(x).sum().backward()
    weight = written_out(model[0].weight) + adapter_layer(model[0]).delta_weight(model[0], {"default": 1.0}).detach()
    assert_close(x.grad, weight.sum(0).expand(4, 12), torch.float32)  # type: ignore[arg-type]
    assert all(parameter.grad is not None for parameter in diagonals(model[0]))
    assert model[0].weight.grad is None


@every_config
@every_dtype
def test_merging_rounds_the_sum_to_the_nearest_codes(config: Any, dtype: torch.dtype) -> None:
    model, x = quantized(config, 12, 20, dtype=dtype), torch.randn(3, 12).to(dtype)
    randlora.inject(model, r=3, alpha=6, targets="all")
    fill(model, spread=0.2)
    exact = written_out(model[0].weight) + oracle(model[0])
    before = model(x)
    report = randlora.merge(model, reversible=True)
    assert type(model[0].weight) is type(quantized(config, 12, 20)[0].weight)
    slack = exact.abs().max() * (2e-2 if dtype == torch.bfloat16 else 1e-5)  # of the sum, which is rounded to the dtype
    assert ((written_out(model[0].weight) - exact).abs() <= step_of(model[0].weight) / 2 + slack).all()
    assert report.rounding["0"].step == pytest.approx(float(step_of(model[0].weight).max()))
    randlora.unmerge(model)
    assert same_bits(model(x), before)


@every_config
def test_dequantizing_gives_a_plain_layer_with_the_sum(config: Any) -> None:
    model = quantized(config, 12, 20)
    randlora.inject(model, r=3, alpha=6, targets="all")
    fill(model)
    exact = written_out(model[0].weight) + oracle(model[0])
    tensors = dict(randlora.merged_tensors(model))
    assert type(tensors["0.weight"]) is Tensor
    assert_close(tensors["0.weight"], exact, torch.float32)
    randlora.merge(model, quantized="dequantize")
    assert type(model[0]) is nn.Linear
    assert type(model[0].weight) is nn.Parameter
    assert_close(model[0].weight, exact, torch.float32)


@every_config
def test_an_adapter_is_saved_and_loaded(config: Any, tmp_path: Path) -> None:
    model, x = quantized(config, 12, 20, 6), torch.randn(3, 12)
    randlora.inject(model, r=3, targets="all")
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    randlora.save(model, tmp_path)
    twin = quantized(config, 12, 20, 6)
    randlora.load(twin, tmp_path)
    assert same_bits(twin(x), model(x))
    randlora.eject(model)
    assert type(model[0]) is nn.Linear
    assert same_bits(model(x), quantized(config, 12, 20, 6)(x))


def test_a_scale_for_blocks_of_rows_is_refused() -> None:
    model = quantized(CONFIGS["int8"], 12, 20)
    weight: Any = model[0].weight
    weight.block_size = [2, 12]
    with pytest.raises(randlora.errors.TargetError, match="a scale for each block"):
        randlora.inject(model, r=3, targets="all")


@every_config
def test_check_runs_a_model_of_torchao(config: Any) -> None:
    model = quantized(config, 12, 20, 6)
    randlora.inject(model, r=3, targets="all")
    assert not randlora.check(model, torch.randn(3, 12)).problems


def test_a_bias_is_trained_with_an_input_without_a_batch() -> None:
    model = quantized(CONFIGS["int8-inputs"], 12, 20)
    randlora.inject(model, r=3, targets="all", train_also=["0.bias"])
    model(torch.randn(12)).sum().backward()
    assert torch.equal(model[0].bias.grad, torch.ones(20))  # type: ignore[arg-type]

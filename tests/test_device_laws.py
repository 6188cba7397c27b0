"""The laws that a device can break, on the device that RANDLORA_TEST_DEVICE names.

It is the CPU by default. `python -m benchmarks --device cuda --gate` runs them on a GPU before it times anything there.
"""

import copy
import os
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import randlora
from randlora.bases import BasisBank
from randlora.functional import Compute
from tests import reference
from tests.kit import assert_unchanged, fill, same_bits, snapshot
from tests.laws import TOLERANCES, Mixed, assert_close
from tests.layer_kinds import LAYER_KINDS, LayerKind
from tests.strategies import KINDS_AND_STREAMS

DEVICE = os.environ.get("RANDLORA_TEST_DEVICE", "cpu")
BASES = ("dense", "block", "sparse", "very_sparse")
DTYPES = tuple(TOLERANCES)
KINDS = {kind.name: kind for kind in LAYER_KINDS}

every_basis = pytest.mark.parametrize("basis", BASES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
dense_kinds = pytest.mark.parametrize("kind", [KINDS["Linear"], KINDS["Conv1D"]], ids=lambda kind: kind.name)
quantized = pytest.mark.parametrize(  # with the dtype that a GPU takes them in without a warning
    ("kind", "dtype"),
    [(KINDS["NF4"], torch.float32), (KINDS["FP4-double"], torch.bfloat16), (KINDS["8bit"], torch.float16)],
    ids=["NF4", "FP4-double", "8bit"],
)
shapes = st.tuples(st.integers(1, 20), st.integers(1, 20))


def adapted(shape: tuple[int, int], dtype: torch.dtype, basis: str, **options: Any) -> nn.Sequential:
    """Adapt a linear layer of ``(in, out)`` features on the device, with values as after some training."""
    model = nn.Sequential(nn.Linear(*shape, dtype=dtype)).to(DEVICE)
    inject(model, basis, **options)
    return fill(model)


def inject(model: nn.Module, basis: str, **options: Any) -> None:
    randlora.inject(model, **{"r": 3, "alpha": 6, "stream": "portable", "basis": basis, **options})


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def oracle(model: nn.Sequential, shape: tuple[int, int]) -> Tensor:
    """Compute the update in float64 on the CPU, from bases that are drawn there."""
    basis = BasisBank().acquire(randlora.adapters(model)[0].specs[0])
    bases = basis.slices(max(shape), min(shape), device="cpu", dtype=torch.float64)
    lam, gamma = (model.get_parameter(f"0.randlora_{name}.default").detach().cpu() for name in ("lambda", "gamma"))
    return reference.delta_weight(*bases, lam, gamma, 2.0, in_features=shape[0])


@dense_kinds
@every_dtype
@every_basis
@given(shape=shapes, compute=st.sampled_from(get_args(Compute)))
def test_an_adapter_adds_the_oracles_update(
    kind: LayerKind, dtype: torch.dtype, basis: str, shape: tuple[int, int], compute: Compute
) -> None:
    base = kind.build(*shape, True, dtype)
    expected_weight, bias = kind.weight(base).double(), base.bias
    model = nn.Sequential(base).to(DEVICE)
    inject(model, basis)
    randlora.set_compute(model, compute)
    fill(model)
    x = random(3, shape[0], dtype=dtype)
    expected = reference.linear(x.cpu(), expected_weight + oracle(model, shape), bias.detach().cpu())  # type: ignore[operator]
    assert_close(model(x).detach().cpu(), expected, dtype)


@dense_kinds
@every_dtype
@every_basis
@pytest.mark.parametrize("tokens", [1, 700])
def test_a_fresh_adapter_changes_no_bit_every_way_gives_the_same_and_unmerging_restores_every_bit(
    kind: LayerKind, dtype: torch.dtype, basis: str, tokens: int
) -> None:
    plain = nn.Sequential(kind.build(96, 160, True, dtype)).to(DEVICE)
    model, found = copy.deepcopy(plain), []
    inject(model, basis, r=8)
    x, grad = random(tokens, 96, dtype=dtype).requires_grad_(), random(tokens, 160, dtype=dtype)
    for compute in get_args(Compute):
        randlora.set_compute(model, compute)
        assert same_bits(model(x).detach(), plain(x).detach())
    fill(model)
    for compute in get_args(Compute):
        randlora.set_compute(model, compute)
        output = model(x)
        trained = [x, *randlora.trainable_parameters(model)]
        found.append([output.detach(), *torch.autograd.grad(output, trained, grad)])
    for others in found[1:]:
        for ours, expected in zip(others, found[0], strict=True):
            assert_close(ours, expected, dtype)
    before, last = snapshot(model), found[-1][0]
    with randlora.merged(model):
        assert_close(model(x).detach(), last, dtype)
    assert_unchanged(model, before)
    assert same_bits(model(x).detach(), last)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {torch.device(DEVICE).type}


@pytest.mark.parametrize("compute", get_args(Compute))
@every_basis
def test_gradients_are_those_of_finite_differences(basis: str, compute: Compute) -> None:
    names = ("0.randlora_lambda.default", "0.randlora_gamma.default")
    for shape in ((5, 7), (7, 5), (6, 6)):
        model = adapted(shape, torch.float64, basis, r=4).double()
        randlora.set_compute(model, compute)
        values = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]

        def run(x: Tensor, *values: Tensor, model: nn.Module = model) -> Tensor:
            output: Tensor = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))
            return output

        assert torch.autograd.gradcheck(run, (random(2, shape[0], dtype=torch.float64).requires_grad_(), *values))


@pytest.mark.parametrize("basis", ["dense", "block"])
def test_autocast_computes_in_its_dtype_and_trains_in_float32_and_a_compiled_model_computes_the_same(
    basis: str,
) -> None:
    torch._dynamo.reset()
    model = adapted((24, 40), torch.float32, basis, r=8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tokens in (3, 20):
        x = random(tokens, 24).requires_grad_()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            output = model(x)
        assert output.dtype == torch.bfloat16
        outputs = output.float(), model(x), compiled(x)
        leaves = [x, *randlora.trainable_parameters(model)]
        found = [[each.detach(), *torch.autograd.grad(each.sum(), leaves)] for each in outputs]
        assert [value.dtype for value in found[0]] == [torch.float32] * 4
        for in_half, expected, compiled_value in zip(*found, strict=True):
            assert_close(in_half, expected, torch.bfloat16)
            assert_close(compiled_value, expected, torch.float32)


@pytest.mark.parametrize(("basis", "stream"), KINDS_AND_STREAMS)
def test_a_seed_means_the_same_update_wherever_it_is_drawn_and_a_model_that_moves_takes_its_adapter_along(
    basis: str, stream: str
) -> None:
    here, there = (Mixed().to(device) for device in (DEVICE, "cpu"))
    for model in (here, there):
        inject(model, basis, r=4, stream=stream, seed=7)
        fill(model)
    for name in ("q", "up", "down"):
        ours, expected = (randlora.delta_weight(model, name) for model in (here, there))
        assert ours.device.type == torch.device(DEVICE).type
        assert_close(ours.cpu(), expected, torch.float32)
    tokens = torch.arange(9)
    output = there(tokens).detach()
    assert_close(there.to(DEVICE)(tokens.to(DEVICE)).detach().cpu(), output, torch.float32)
    assert same_bits(there.cpu()(tokens).detach(), output)


@quantized
@pytest.mark.parametrize("basis", ["dense", "block"])
def test_an_adapter_adds_the_oracles_update_to_a_quantized_layer_and_is_unmerged_to_every_bit(
    kind: LayerKind, dtype: torch.dtype, basis: str
) -> None:
    model = nn.Sequential(kind.build(64, 128, True, dtype)).to(DEVICE)
    x = random(5, 64, dtype=dtype)
    plain = model(x).detach()
    inject(model, basis, r=4, alpha=8)
    assert same_bits(model(x).detach(), plain)
    fill(model)
    before, expected = snapshot(model), plain.double() + x.double() @ oracle(model, (64, 128)).to(DEVICE).T
    assert_close(model(x).detach(), expected, dtype)
    with randlora.merged(model):
        model(x)
    assert_unchanged(model, before)
    model(x).float().square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in randlora.trainable_parameters(model))  # type: ignore[arg-type]

"""The laws of the adapter layer, for every row of the capability table."""

import copy
from typing import Any, get_args

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import randlora
from randlora.config import Init
from randlora.functional import Compute
from randlora.layers import registry
from randlora.quantized.hqq import HQQAdapter
from randlora.quantized.layer import CodesAdapter, EetqAdapter
from randlora.quantized.torchao import TorchaoPackedAdapter
from randlora.readers.read_weight import ReadWeight
from tests import reference
from tests.kit import fill, same_bits
from tests.laws import adapter_layer, assert_close, diagonals, oracle_of, plain, update_of
from tests.layer_kinds import (
    LAYER_KINDS,
    LayerKind,
    every_convertible_kind,
    every_dense_kind,
    every_kind,
    every_kind_and_dtype,
    every_kind_compiled,
)
from tests.strategies import every_start

sides = st.integers(1, 20).filter(lambda side: side != 16)  # of rows of 16, bitsandbytes misreads the codes
shapes = st.tuples(sides, sides)


def adapted(
    kind: LayerKind, shape: tuple[int, int], dtype: torch.dtype, *, r: int = 3, bias: bool = True, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """Adapt one layer of ``(in, out)`` features; return it, and a copy as it was before."""
    layer = kind.build(*shape, bias, dtype)
    base = copy.deepcopy(layer)
    model = nn.Sequential(layer)
    randlora.inject(model, r=r, alpha=2 * r, stream="portable", **options)
    layer.__dict__["model"] = model  # not a part of it; keeps the carrier of the state alive for fill()
    return layer, base


def fill_layer(layer: nn.Module) -> None:
    fill(layer.__dict__["model"])


def test_the_table_has_a_row_for_every_registered_kind() -> None:
    served = {type(adapter_layer(adapted(kind, (4, 4), torch.float32)[0])) for kind in LAYER_KINDS}
    registered = {entry for name, entry in registry._layers.items() if not name.startswith("tests.")}
    elsewhere = (ReadWeight, CodesAdapter, EetqAdapter, HQQAdapter)  # see tests/test_quantized_libraries.py
    rows = {entry for entry in registered if not (isinstance(entry, str) or issubclass(entry, elsewhere))}
    known = {*registry._weights.values()} - {TorchaoPackedAdapter}  # see tests/test_quantized_libraries.py
    rows |= known if any(kind.library == "torchao" for kind in LAYER_KINDS) else set()
    assert {layer for layer in served if not layer.__module__.startswith("tests.")} == rows


@every_kind_and_dtype
@given(
    shape=shapes, r=st.integers(1, 8), basis=st.sampled_from(["dense", "block"]), bias=st.booleans(),
    compute=st.sampled_from(get_args(Compute)), init=st.sampled_from(get_args(Init)),
    leading=st.lists(st.integers(0, 3), max_size=2),
)  # fmt: skip
def test_a_fresh_adapter_leaves_every_bit_of_the_output_and_a_trained_one_adds_the_oracles_update(
    kind: LayerKind, dtype: torch.dtype, shape: tuple[int, int], r: int, basis: str, bias: bool, compute: Compute,
    init: Init, leading: list[int],
) -> None:  # fmt: skip
    """Laws 1 and 2. Bases are neither parameters nor buffers, and exact whatever the layer is converted to."""
    assume(0 not in leading or not kind.rounds_inputs)
    layer, base = adapted(kind, shape, dtype, r=r, basis=basis, bias=bias, init=init)
    adapter_layer(layer).state.compute = compute
    x = torch.randn(4, shape[0]).to(dtype)
    for has_autocast in (False, True)[: 1 + (dtype == torch.float32)]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_autocast):
            assert same_bits(layer(x), base(x))
    assert {value.dtype for value in diagonals(layer)} == {torch.float32}
    assert dict(layer.named_buffers()).keys() == dict(base.named_buffers()).keys()
    assert set(layer.state_dict()) == set(base.state_dict()) | {"randlora_lambda.default", "randlora_gamma.default"}
    fill_layer(layer)
    update, x = oracle_of(layer), torch.randn(*leading, shape[0]).to(dtype)
    bias_values = base.bias if bias else None
    weight = kind.weight(base).double() + update
    expected = reference.linear(x.reshape(-1, shape[0]), weight, bias_values)  # type: ignore[arg-type]
    if kind.rounds_inputs:
        expected = base(x).double() + x.double() @ update.T
    found = layer(x)
    assert found.shape == (*leading, shape[1])
    assert_close(found, expected.view(found.shape), dtype)
    assert_close(update_of(layer), update, torch.promote_types(dtype, torch.float32))
    if kind.converts:
        sides, drawn = (max(shape), min(shape)), adapter_layer(layer).adapters["default"].basis
        before = drawn.digest(*sides)
        layer.bfloat16()(torch.randn(2, shape[0]).bfloat16())
        assert drawn.digest(*sides) == before


@every_convertible_kind
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6)], ids=["up", "down", "square"])
@pytest.mark.parametrize("basis", ["dense", "block"])
def test_gradients_are_those_of_finite_differences(kind: LayerKind, shape: tuple[int, int], basis: str) -> None:
    """Also of a weight and a bias that somebody trains beside."""
    layer, _ = adapted(kind, shape, torch.float64, basis=basis)
    fill_layer(layer)
    layer.double()
    x = torch.randn(2, shape[0], dtype=torch.float64, requires_grad=True)
    values = {
        name: value.detach().clone().requires_grad_()
        for name, value in layer.named_parameters()
        if value.requires_grad or not kind.is_quantized
    }

    def run(x: Tensor, *given: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(layer, dict(zip(values, given, strict=True)), (x,))
        return output

    assert torch.autograd.gradcheck(run, (x, *values.values()))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_the_dtype_of_the_plain_layer(kind: LayerKind, dtype: torch.dtype) -> None:
    layer, base = adapted(kind, (6, 9), torch.float32)
    fill_layer(layer)
    x = torch.randn(5, 6).to(dtype).requires_grad_()
    expected = layer(x.detach().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, own = layer(x), base(x)
    assert found.dtype == own.dtype
    assert_close(found, expected, torch.bfloat16)
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    trained = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert trained == {"randlora_lambda.default", "randlora_gamma.default"}
    assert [None if value.grad is None else value.grad.dtype for value in diagonals(layer)] == [torch.float32] * 2


@pytest.mark.parametrize("basis", ["dense", "block"])
@pytest.mark.parametrize("compute", get_args(Compute))
def test_autocast_that_is_on_in_backward_alone_changes_no_dtype(basis: str, compute: Compute) -> None:
    """Plain layers allow it."""
    layer, _ = adapted(LAYER_KINDS[0], (70, 90), torch.float32, basis=basis)
    fill_layer(layer)
    adapter_layer(layer).state.compute = compute
    leaves = (x := torch.randn(4, 70, requires_grad=True), *diagonals(layer))
    wanted, output = torch.autograd.grad(layer(x).sum(), leaves), layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(output.sum(), leaves)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.medium
@every_kind_compiled
def test_compiling_gives_one_graph_and_the_same_values(kind: LayerKind) -> None:
    layer, _ = adapted(kind, (6, 9), torch.float32)
    fill_layer(layer)
    x = torch.randn(4, 6)
    expected = layer(x)
    expected.square().sum().backward()
    gradient = layer.get_parameter("randlora_lambda.default").grad
    layer.zero_grad()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = compiled(x)
    found.square().sum().backward()
    assert_close(found, expected, torch.float32)
    torch.testing.assert_close(layer.get_parameter("randlora_lambda.default").grad, gradient)


@every_kind
def test_dropout_falls_on_the_adapters_input_alone_and_in_training_alone(kind: LayerKind) -> None:
    layer, base = adapted(kind, (50, 9), kind.exact, dropout=0.5)
    fill_layer(layer)
    x = torch.ones(1, 50, dtype=kind.exact)
    update = update_of(layer)
    layer.eval()
    assert_close(layer(x), base(x) + x @ update.T, kind.exact)
    layer.train()
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    expected = base(x) + nn.functional.dropout(x, 0.5, training=True) @ update.T
    assert_close(found, expected, kind.exact)
    assert not torch.allclose(found, layer(x))


@every_dense_kind
@every_start
def test_a_meta_layer_computes_shapes_and_starts_as_any_other_once_it_is_reset(kind: LayerKind, init: Init) -> None:
    with torch.device("meta"):
        layer, _ = adapted(kind, (6, 9), torch.float32, init=init)
    assert layer.get_parameter("randlora_lambda.default").is_meta
    assert layer(torch.randn(3, 6, device="meta")).shape == (3, 9)
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():  # whose memory holds anything, NaN for one
        nn.init.normal_(parameter)
    for module in (layer.randlora_lambda, layer.randlora_gamma):  # as FSDP asks each module that holds parameters
        module.reset_parameters()  # type: ignore[operator, union-attr]
    values = (0.0, 1 / 6) if init == "lambda" else (1 / 6, 0.0)
    fresh = diagonals(adapted(kind, (6, 9), torch.float32, init=init)[0])
    for reset, own, value in zip(diagonals(layer), fresh, values, strict=True):
        assert torch.equal(reset, own)
        torch.testing.assert_close(own, torch.full_like(own, value))
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), plain(layer)(x))

"""The laws of the adapter layer, for every row of the capability table."""

import copy
import pickle
from typing import Any, get_args

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
from tests.strategies import KINDS_AND_STREAMS, every_start

sides = st.integers(1, 20).filter(lambda side: side != 16)  # of rows of 16, bitsandbytes misreads the codes
shapes = st.tuples(sides, sides)
BASES = st.sampled_from(["dense", "block"])
COMPUTE = st.sampled_from(get_args(Compute))
INIT = st.sampled_from(get_args(Init))


def adapted(
    kind: LayerKind,
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    r: int = 3,
    basis: str = "dense",
    stream: str | None = "portable",
    bias: bool = True,
    dropout: float = 0.0,
    init: Init = "lambda",
) -> tuple[nn.Module, nn.Module]:
    """Adapt one layer of ``(in, out)`` features; return it, and a copy as it was before."""
    layer = kind.build(*shape, bias, dtype)
    base = copy.deepcopy(layer)
    model = nn.Sequential(layer)
    options: dict[str, Any] = {"basis": basis, "stream": stream, "dropout": dropout, "init": init}
    randlora.inject(model, r=r, alpha=2 * r, **options)
    layer.__dict__["model"] = model  # not a part of it; keeps the carrier of the state alive for fill()
    return layer, base


def fill_layer(layer: nn.Module) -> None:
    fill(layer.__dict__["model"])


def test_the_table_has_a_row_for_every_registered_kind() -> None:
    served = {type(adapter_layer(adapted(kind, (4, 4), torch.float32)[0])) for kind in LAYER_KINDS}
    registered = {entry for name, entry in registry._layers.items() if not name.startswith("tests.")}
    elsewhere = (ReadWeight, CodesAdapter, EetqAdapter, HQQAdapter)  # see tests/test_quantized_forward_only.py
    rows = {entry for entry in registered if not (isinstance(entry, str) or issubclass(entry, elsewhere))}
    known = {*registry._weights.values()} - {TorchaoPackedAdapter}  # see tests/test_quantized_torchao.py
    rows |= known if any(kind.library == "torchao" for kind in LAYER_KINDS) else set()
    assert {layer for layer in served if not layer.__module__.startswith("tests.")} == rows


# Law 1: identity


@every_kind_and_dtype
@given(shape=shapes, r=st.integers(1, 8), basis=BASES, compute=COMPUTE, init=INIT)
def test_a_fresh_adapter_leaves_every_bit_of_the_output(
    kind: LayerKind, dtype: torch.dtype, shape: tuple[int, int], r: int, basis: str, compute: Compute, init: Init
) -> None:
    layer, base = adapted(kind, shape, dtype, r=r, basis=basis, init=init)
    adapter_layer(layer).state.compute = compute
    x = torch.randn(4, shape[0]).to(dtype)
    assert same_bits(layer(x), base(x))


@every_kind
@every_start
def test_a_fresh_adapter_leaves_every_bit_under_autocast(kind: LayerKind, init: Init) -> None:
    layer, base = adapted(kind, (6, 9), torch.float32, init=init)
    x = torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(layer(x), base(x))


# Law 2: the contract


@every_kind_and_dtype
@given(shape=shapes, r=st.integers(1, 8), basis=BASES, bias=st.booleans(), compute=COMPUTE)
def test_an_adapter_adds_the_oracles_update_to_the_output(
    kind: LayerKind, dtype: torch.dtype, shape: tuple[int, int], r: int, basis: str, bias: bool, compute: Compute
) -> None:
    layer, base = adapted(kind, shape, dtype, r=r, basis=basis, bias=bias)
    adapter_layer(layer).state.compute = compute
    fill_layer(layer)
    update = oracle_of(layer)
    x = torch.randn(3, shape[0]).to(dtype)
    bias_values = base.bias if bias else None
    expected = reference.linear(x, kind.weight(base).double() + update, bias_values)  # type: ignore[arg-type]
    if kind.rounds_inputs:
        expected = base(x).double() + x.double() @ update.T
    assert_close(layer(x), expected, dtype)
    assert_close(update_of(layer), update, torch.promote_types(dtype, torch.float32))


@every_kind
@pytest.mark.parametrize(("basis", "stream"), KINDS_AND_STREAMS)
@pytest.mark.parametrize("shape", [(8, 14), (14, 8), (12, 12)], ids=["up", "down", "square"])
def test_the_identity_matrix_through_the_layer_is_the_update(
    kind: LayerKind, basis: str, stream: str, shape: tuple[int, int]
) -> None:
    layer, base = adapted(kind, shape, kind.exact, r=4, basis=basis, stream=stream)
    fill_layer(layer)
    identity = torch.eye(shape[0], dtype=kind.exact)
    assert_close(layer(identity) - base(identity), update_of(layer).T, kind.exact)


@every_kind
@given(leading=st.lists(st.integers(0, 3), max_size=3))
def test_any_leading_shape_passes(kind: LayerKind, leading: list[int]) -> None:
    assume(0 not in leading or not kind.rounds_inputs)
    layer, base = adapted(kind, (6, 9), kind.exact)
    fill_layer(layer)
    x = torch.randn(*leading, 6, dtype=kind.exact)
    update = update_of(layer)
    expected = base(x) + x @ update.T
    found = layer(x)
    assert found.shape == (*leading, 9)
    assert_close(found, expected, kind.exact)
    trained = layer.get_parameter("randlora_gamma.default")
    gradients = [torch.autograd.grad(output.square().sum(), trained)[0] for output in (found, expected)]
    assert_close(gradients[0], gradients[1], torch.float32)


@every_kind
def test_autocast_computes_the_adapter_in_the_dtype_of_the_base(kind: LayerKind) -> None:
    layer, base = adapted(kind, (6, 9), torch.float32)
    fill_layer(layer)
    x = torch.randn(5, 6)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, own = layer(x), base(x)
    assert found.dtype == own.dtype == (torch.float32 if kind.keeps_dtype else torch.bfloat16)
    assert_close(found, expected, torch.bfloat16)
    found.sum().backward()
    gradient = layer.get_parameter("randlora_lambda.default").grad
    assert gradient is not None
    assert gradient.dtype == torch.float32


# Law 7: rank


@every_kind
@pytest.mark.parametrize("basis", ["dense", "block"])
@pytest.mark.parametrize("r", [2, 3, 8, 16])
@pytest.mark.parametrize("shape", [(20, 20), (20, 28), (28, 20), (13, 17)], ids=str)
def test_a_trained_update_has_full_rank(kind: LayerKind, basis: str, r: int, shape: tuple[int, int]) -> None:
    layer, _ = adapted(kind, shape, kind.exact, r=r, basis=basis)
    with torch.no_grad():
        for parameter in diagonals(layer):
            nn.init.uniform_(parameter, 0.5, 1.5)  # the layers that hold codes give the update in float32
    assert torch.linalg.matrix_rank(update_of(layer)) == min(shape)


# Law 8: gradients


@every_convertible_kind
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6)], ids=["up", "down", "square"])
@pytest.mark.parametrize("basis", ["dense", "block"])
def test_gradients_are_those_of_finite_differences(kind: LayerKind, shape: tuple[int, int], basis: str) -> None:
    layer, _ = adapted(kind, shape, torch.float64, basis=basis)
    fill_layer(layer)
    layer.double()
    x = torch.randn(2, shape[0], dtype=torch.float64, requires_grad=True)
    names = ("randlora_lambda.default", "randlora_gamma.default")
    values = [layer.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return output

    assert torch.autograd.gradcheck(run, (x, *values))


@every_kind
def test_only_the_adapter_gets_gradients(kind: LayerKind) -> None:
    layer, _ = adapted(kind, (6, 9), torch.float32)
    layer(torch.randn(4, 6)).square().sum().backward()
    with_grad = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert with_grad == {"randlora_lambda.default", "randlora_gamma.default"}


@every_kind
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(kind: LayerKind, reentrant: bool) -> None:
    layer, _ = adapted(kind, (6, 9), kind.exact)
    fill_layer(layer)
    x = torch.randn(4, 6, dtype=kind.exact, requires_grad=True)
    layer(x).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(layer.get_parameter(name).grad, gradient)


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


# The module


@every_kind
def test_the_adapted_module_tells_what_it_was_and_what_adapts_it(kind: LayerKind) -> None:
    layer, base = adapted(kind, (6, 9), torch.float32)
    assert isinstance(layer, type(base))
    assert adapter_layer(layer).shape == (9, 6)
    assert type(layer).__name__ == f"Adapted{type(base).__name__}"
    assert "default: r=3, num_bases=2, dense" in repr(layer)


@every_kind
def test_hooks_on_the_layer_still_fire(kind: LayerKind) -> None:
    layer, _ = adapted(kind, (6, 9), torch.float32)
    seen: list[torch.Size] = []
    layer.register_forward_hook(lambda _module, _args, output: seen.append(output.shape))
    layer(torch.randn(2, 6))
    assert seen == [torch.Size([2, 9])]


def test_further_arguments_pass_through_to_the_base_layer() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor, factor: float = 1.0, *, shift: float = 0.0) -> Tensor:  # noqa: A002
            return super().forward(input) * factor + shift

    model = nn.Sequential(Scaled(4, 4))
    x = torch.randn(2, 4)
    expected = model[0](x, 3.0, shift=1.0)
    randlora.inject(model, r=2, targets="all-linear")
    assert torch.equal(model[0](x, 3.0, shift=1.0), expected)


def test_the_input_may_be_given_by_name() -> None:
    layer, _ = adapted(LAYER_KINDS[0], (6, 9), torch.float32)
    fill_layer(layer)
    x = torch.randn(2, 6)
    assert torch.equal(layer(input=x), layer(x))


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


@every_kind_and_dtype
def test_trained_parameters_are_float32_whatever_the_base_is(kind: LayerKind, dtype: torch.dtype) -> None:
    layer, _ = adapted(kind, (6, 9), dtype)
    assert [parameter.dtype for parameter in diagonals(layer)] == [torch.float32] * 2


@every_kind
@every_start
def test_one_of_the_fresh_parameters_is_zero_and_the_other_a_constant(kind: LayerKind, init: Init) -> None:
    layer, _ = adapted(kind, (6, 9), torch.float32, r=1, init=init)
    of_lam, of_gamma = (0, 1 / 6) if init == "lambda" else (1 / 6, 0)
    assert torch.equal(layer.get_parameter("randlora_lambda.default"), torch.full((1, 6), float(of_lam)))
    assert torch.equal(layer.get_parameter("randlora_gamma.default"), torch.full((6, 6), float(of_gamma)))


@every_kind
def test_bases_are_neither_parameters_nor_buffers(kind: LayerKind) -> None:
    layer, base = adapted(kind, (6, 9), torch.float32)
    layer(torch.randn(1, 6))
    assert dict(layer.named_buffers()).keys() == dict(base.named_buffers()).keys()
    assert set(layer.state_dict()) == set(base.state_dict()) | {"randlora_lambda.default", "randlora_gamma.default"}


@every_convertible_kind
def test_halving_a_model_leaves_its_bases_exact(kind: LayerKind) -> None:
    layer, _ = adapted(kind, (6, 9), torch.float32)
    fill_layer(layer)
    basis = adapter_layer(layer).adapters["default"].basis
    before = basis.digest(9, 6)
    layer.bfloat16()
    layer(torch.randn(2, 6).bfloat16())
    assert basis.digest(9, 6) == before


@every_kind
def test_copies_and_pickles_compute_the_same(kind: LayerKind) -> None:
    layer, _ = adapted(kind, (6, 9), torch.float32)
    fill_layer(layer)
    x = torch.randn(3, 6)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    assert adapter_layer(twin).adapters["default"].basis is adapter_layer(layer).adapters["default"].basis
    if kind.pickles:
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


@every_dense_kind
@every_start
def test_a_meta_layer_computes_shapes_and_holds_no_bases(kind: LayerKind, init: Init) -> None:
    with torch.device("meta"):
        layer, _ = adapted(kind, (6, 9), torch.float32, init=init)
    assert layer.get_parameter("randlora_lambda.default").is_meta
    assert layer(torch.randn(3, 6, device="meta")).shape == (3, 9)
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():  # whose memory holds anything, NaN for one
        nn.init.normal_(parameter)
    for module in (layer.randlora_lambda, layer.randlora_gamma):  # as FSDP asks each module that holds parameters
        module.reset_parameters()  # type: ignore[operator, union-attr]
    fresh = diagonals(adapted(kind, (6, 9), torch.float32, init=init)[0])
    assert all(torch.equal(reset, own) for reset, own in zip(diagonals(layer), fresh, strict=True))
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), plain(layer)(x))

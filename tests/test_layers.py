"""The laws of the adapter layer, for every row of the capability table, on the device RANDLORA_TEST_DEVICE names.

It is the CPU by default. `python -m benchmarks --device cuda --gate` runs them on a GPU before it times anything there.
"""

import copy
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import randlora
from randlora.config import BasisKind, Init, Stream
from randlora.functional import Compute
from tests import reference
from tests.kit import adapt, assert_unchanged, fill, same_bits, snapshot
from tests.laws import TOKENS, Mixed, adapter_layer, assert_close, diagonals, oracle_of, plain, update_of
from tests.layer_kinds import (
    DEVICE,
    LAYER_KINDS,
    LayerKind,
    every_convertible_kind,
    every_dense_kind,
    every_kind,
    every_kind_and_dtype,
    every_kind_compiled,
)
from tests.strategies import KINDS_AND_STREAMS, every_start

BASES, WAYS = get_args(BasisKind), get_args(Compute)
CODES = {"NF4": torch.float32, "NF4-double": torch.float32, "FP4-double": torch.bfloat16, "8bit": torch.float16}
"""In a dtype that a GPU takes them in without a warning."""
sides = st.integers(1, 20).filter(lambda side: side != 16)  # of rows of 16, bitsandbytes misreads the codes


def adapted(
    kind: LayerKind, shape: tuple[int, int], dtype: torch.dtype = torch.float32, *, bias: bool = True, **options: Any
) -> tuple[nn.Sequential, nn.Module]:
    """Adapt a model of one layer of ``(in, out)`` features; return it, and the layer as it was before."""
    layer = kind.build(*shape, bias, dtype).to(DEVICE)
    model, base, r = nn.Sequential(layer), copy.deepcopy(layer), options.get("r", 3)
    randlora.inject(model, **{"r": r, "alpha": 2 * r, "stream": "portable", **options})
    return model, base


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


@pytest.mark.product
@every_kind_and_dtype
@given(
    shape=st.tuples(sides, sides), r=st.integers(1, 8), basis=st.sampled_from(BASES), bias=st.booleans(),
    compute=st.sampled_from(WAYS), init=st.sampled_from(get_args(Init)),
    leading=st.lists(st.integers(0, 3), max_size=2),
)  # fmt: skip
def test_a_fresh_adapter_leaves_every_bit_of_the_output_and_a_trained_one_adds_the_oracles_update(
    kind: LayerKind, dtype: torch.dtype, shape: tuple[int, int], r: int, basis: BasisKind, bias: bool,
    compute: Compute, init: Init, leading: list[int],
) -> None:  # fmt: skip
    """Laws 1 and 2. Every bit but the sign of a zero: -0.0 + 0.0 is 0.0. Bases are exact whatever a layer becomes."""
    assume(0 not in leading or not kind.rounds_inputs)
    r += 2 * ("sparse" in basis)  # fewer rows may be all zeros
    model, base = adapted(kind, shape, dtype, r=r, basis=basis, bias=bias, init=init)
    randlora.set_compute(model, compute)
    x, layer = random(4, shape[0], dtype=dtype), model[0]
    for has_autocast in (False, True)[: 1 + (dtype == torch.float32)]:
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=has_autocast):
            assert torch.equal(layer(x), base(x))
    assert {value.dtype for value in diagonals(layer)} == {torch.float32}
    assert dict(layer.named_buffers()).keys() == dict(base.named_buffers()).keys()
    assert set(layer.state_dict()) == set(base.state_dict()) | {"randlora_lambda.default", "randlora_gamma.default"}
    fill(model)
    update, x = oracle_of(layer), random(*leading, shape[0], dtype=dtype)
    bias_values: Any = base.bias if bias else None
    weight = kind.weight(base).double().cpu() + update
    expected = reference.linear(x.reshape(-1, shape[0]), weight, bias_values)
    if kind.rounds_inputs:
        expected = base(x).double() + x.double() @ update.T
    found = layer(x)
    assert found.shape == (*leading, shape[1])
    assert_close(found, expected.view(found.shape), dtype)
    assert_close(update_of(layer), update, torch.promote_types(dtype, torch.float32))
    if kind.converts:
        dims, drawn = (max(shape), min(shape)), adapter_layer(layer).adapters["default"].basis
        before = drawn.digest(*dims)
        layer.bfloat16()(random(2, shape[0], dtype=torch.bfloat16))
        assert drawn.digest(*dims) == before


@pytest.mark.product
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (kind, dtype)
        for kind in LAYER_KINDS
        for dtype in kind.dtypes
        if not kind.is_quantized or CODES.get(kind.name) == dtype
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
@pytest.mark.parametrize("basis", BASES)
def test_every_way_is_the_same_and_unmerging_is_exact(kind: LayerKind, dtype: torch.dtype, basis: BasisKind) -> None:
    for tokens in (1, 300):
        model, base = adapted(kind, (128, 64), dtype, r=8, basis=basis)
        x, grad, found = random(tokens, 128, dtype=dtype), random(tokens, 64, dtype=dtype), []
        own = base(x).detach()
        assert torch.equal(model(x), own)
        leaves = [x.requires_grad_(), *randlora.trainable_parameters(fill(model))]
        for compute in WAYS:
            randlora.set_compute(model, compute)
            output = model(x)
            gradients = torch.autograd.grad(output, leaves, grad, retain_graph=True)
            with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=not kind.is_quantized):  # in backward alone
                assert all(map(same_bits, torch.autograd.grad(output, leaves, grad), gradients))
            found.append([output.detach(), *gradients])
            for ours, expected in zip(found[-1], found[0], strict=True):
                assert_close(ours, expected, dtype)
        before, last = snapshot(model), found[-1][0]
        assert_close(last, own.double() + x.double() @ update_of(model[0]).double().T, dtype)
        with randlora.merged(model):
            merged = model(x)
        if not kind.is_quantized:
            assert_close(merged, last, dtype)
        assert_unchanged(model, before)
        assert same_bits(model(x), last)
        assert {tensor.device.type for tensor in model.state_dict().values()} == {torch.device(DEVICE).type}


@pytest.mark.product
@every_convertible_kind
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("compute", WAYS)
def test_gradients_are_those_of_finite_differences(kind: LayerKind, basis: BasisKind, compute: Compute) -> None:
    """In both modes. Also of a weight and a bias that somebody trains beside."""
    for shape in ((5, 7), (7, 5), (6, 6)):
        model, _ = adapted(kind, shape, torch.float64, basis=basis)
        randlora.set_compute(fill(model).double(), compute)
        x = random(2, shape[0], dtype=torch.float64).requires_grad_()
        values = {
            name: value.detach().clone().requires_grad_()
            for name, value in model.named_parameters()
            if value.requires_grad or not kind.is_quantized
        }

        def run(x: Tensor, *given: Tensor, model: nn.Module = model, names: Any = (*values,)) -> Tensor:
            output: Tensor = torch.func.functional_call(model, dict(zip(names, given, strict=True)), (x,))
            return output

        forward_too = kind.is_one_operation or not kind.library  # bitsandbytes' own product in 8 bits is for backward
        assert torch.autograd.gradcheck(run, (x, *values.values()), check_forward_ad=forward_too)


@pytest.mark.product
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_computes_in_the_dtype_of_the_plain_layer(kind: LayerKind, dtype: torch.dtype) -> None:
    held, dtype = (kind.exact, kind.exact) if dtype == torch.float64 else (torch.float32, dtype)
    model, base = adapted(kind, (6, 9), held)
    x = random(5, 6, dtype=dtype).requires_grad_()
    expected = fill(model)(x.detach().to(held))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found, own = model(x), base(x)
    assert found.dtype == own.dtype
    assert_close(found, expected, torch.bfloat16)
    found.sum().backward()
    parameters = {"x": x, **dict(model.named_parameters())}
    trained = {"x": dtype, "0.randlora_lambda.default": torch.float32, "0.randlora_gamma.default": torch.float32}
    assert {name: value.grad.dtype for name, value in parameters.items() if value.grad is not None} == trained


@pytest.mark.medium
@pytest.mark.product
@every_kind_compiled
@pytest.mark.parametrize("basis", ["dense", "block"])
def test_compiling_gives_one_graph_and_the_same_values(kind: LayerKind, basis: BasisKind) -> None:
    model, _ = adapted(kind, (6, 9), basis=basis)
    x, trained = random(4, 6), [*randlora.trainable_parameters(fill(model))]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, expected = ([each, *torch.autograd.grad(each.square().sum(), trained)] for each in (compiled(x), model(x)))
    for ours, own in zip(found, expected, strict=True):
        assert_close(ours, own, torch.float32)


@every_kind
def test_dropout_falls_on_the_adapters_input_alone_and_in_training_alone(kind: LayerKind) -> None:
    model, base = adapted(kind, (50, 9), kind.exact, dropout=0.5)
    x, update = torch.ones(1, 50, dtype=kind.exact, device=DEVICE), update_of(fill(model)[0])
    assert_close(model.eval()(x), base(x) + x @ update.T, kind.exact)
    model.train()
    torch.manual_seed(3)
    found = model(x)
    torch.manual_seed(3)
    assert_close(found, base(x) + nn.functional.dropout(x, 0.5, training=True) @ update.T, kind.exact)
    assert not torch.allclose(found, model(x))


def twice_each(x: Tensor) -> Tensor:
    own = x.to_sparse()
    values = torch.cat([own.values() / 4, own.values() * 0.75])
    return torch.sparse_coo_tensor(own.indices().repeat(1, 2), values, own.shape, check_invariants=True)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("sparse", [Tensor.to_sparse, twice_each, Tensor.to_sparse_csr, Tensor.to_sparse_csc])
@pytest.mark.parametrize("basis", ["dense", "block"])
def test_sparse_inputs_give_values_and_gradients_of_dense(sparse: Callable[[Tensor], Tensor], basis: BasisKind) -> None:
    cases: list[tuple[int, Compute]] = [(0, "auto"), (1, "factored"), (5, "auto"), (5, "materialized"), (3000, "auto")]
    for shape in ((40, 12), (12, 40), (12, 12)):
        model, _ = adapted(LAYER_KINDS[0], shape, basis=basis, r=4)
        trained = [*randlora.trainable_parameters(fill(model))]
        for tokens, compute in cases:
            randlora.set_compute(model, compute)
            x = random(tokens, shape[0]) * (random(tokens, shape[0]) > 1)
            outputs = model(sparse(x)), model(x)
            assert_close(*outputs, torch.float32)
            gradients = [torch.autograd.grad(each.square().sum(), trained) for each in outputs]
            for found, expected in zip(*gradients, strict=True):
                assert_close(found, expected, torch.float32)
        if sparse is not twice_each:
            x = sparse(torch.ones(2, shape[0], device=DEVICE)).requires_grad_()  # torch gives it a dense gradient
            (found,) = torch.autograd.grad(model(x).sum(), x)
            whole = model[0].get_parameter("weight") + update_of(model[0])
            assert_close(found, whole.sum(0).expand(2, -1), torch.float32)


def nested(x: Tensor, layout: torch.layout) -> Tensor:
    return torch.nested.as_nested_tensor([x[:20], x[20:]], layout=layout)


OTHER_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "COO": Tensor.to_sparse,
    "CSR": Tensor.to_sparse_csr,
    "nested": lambda x: nested(x, torch.strided),
    "jagged": lambda x: nested(x, torch.jagged),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("form", OTHER_FORMS)
def test_dropout_falls_on_the_entries_of_a_sparse_or_nested_input(form: str) -> None:
    model, base = adapted(LAYER_KINDS[0], (50, 9), dropout=0.5)
    x = torch.eye(50, device=DEVICE)

    def added() -> Tensor:
        output = model(OTHER_FORMS[form](x))
        return (torch.cat(output.unbind()) if output.is_nested else output) - base(x)  # type: ignore[no-any-return]

    fill(model)
    found, update = added(), update_of(model[0]).T
    is_dropped = found.abs().sum(1) < 1e-6
    assert 10 < is_dropped.sum() < 40
    assert_close(found, torch.where(is_dropped[:, None], 0, 2 * update), torch.float32)
    model.eval()
    assert_close(added(), update, torch.float32)


@every_dense_kind
@every_start
def test_a_meta_layer_computes_shapes_and_starts_as_any_other_once_it_is_reset(kind: LayerKind, init: Init) -> None:
    model = nn.Sequential(layer := kind.build(6, 9, True, torch.float32)).to("meta")
    randlora.inject(model, r=3, stream="portable", init=init)
    assert all(value.is_meta for value in diagonals(layer))
    assert layer(torch.randn(3, 6, device="meta")).shape == (3, 9)
    layer.to_empty(device=DEVICE)
    for parameter in layer.parameters():  # whose memory holds anything, NaN for one
        nn.init.normal_(parameter)
    for module in (layer.randlora_lambda, layer.randlora_gamma):  # as FSDP asks each module that holds parameters
        module.reset_parameters()  # type: ignore[operator, union-attr]
    values = (0.0, 1 / 6) if init == "lambda" else (1 / 6, 0.0)
    fresh = diagonals(adapted(kind, (6, 9), init=init)[0][0])
    for reset, own, value in zip(diagonals(layer), fresh, values, strict=True):
        assert torch.equal(reset, own)
        torch.testing.assert_close(own, torch.full_like(own, value))
    assert torch.equal(layer(x := random(3, 6)), plain(layer)(x))


@pytest.mark.parametrize(("basis", "stream"), KINDS_AND_STREAMS)
def test_a_seed_means_the_same_update_wherever_it_is_drawn_or_moved(basis: BasisKind, stream: Stream) -> None:
    here, there = (Mixed().to(device) for device in (DEVICE, "cpu"))
    for model in (here, there):
        adapt(model, r=4, basis=basis, stream=stream, seed=7)
    for name in ("q", "up", "down"):
        ours, expected = (randlora.delta_weight(model, name) for model in (here, there))
        assert ours.device.type == torch.device(DEVICE).type
        assert_close(ours, expected, torch.float32)
    output = there(TOKENS).detach()
    assert_close(there.to(DEVICE)(TOKENS.to(DEVICE)), output, torch.float32)
    assert same_bits(there.cpu()(TOKENS), output)

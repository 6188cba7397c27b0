"""Weights that other code reads compute as the oracle says, and have its gradients, for every row of the table."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import randlora
from randlora.config import Init
from randlora.functional import Compute
from randlora.layers import registry
from randlora.layers.base import AdapterLayer
from randlora.targets.census import Census
from tests.in_place_models import register
from tests.kit import read, same_bits
from tests.laws import assert_close
from tests.read_kinds import (
    ATTENTION,
    EXPERTS,
    READ_KINDS,
    ReadKind,
    every_family,
    every_read_kind,
    every_read_kind_dtype_and_basis,
    or_medium,
    output_of,
    weighted,
)
from tests.strategies import every_start

SHAPED = pytest.mark.parametrize("basis", ["dense", "block"])


def test_the_table_has_a_row_for_every_weight_of_torchs_modules() -> None:
    served = {
        (type(kind.layer(kind.adapted())), registry.qualified_name(parent))
        for kind in READ_KINDS
        for parent in type(kind.owner(kind.model())).__mro__
    }
    registered: set[tuple[type[AdapterLayer], str]] = {
        (layer, name)
        for name, layers in registry._readers.items()
        for layer in layers.values()
        if name.startswith("torch.")
    }
    registered |= {
        (layer, name)
        for name, layer in registry._layers.items()
        if name.startswith("torch.") and not isinstance(layer, str) and layer.kind != "linear"
    }
    assert len(registered) > 10
    assert registered <= served


@pytest.mark.parametrize("kinds", [ATTENTION, EXPERTS], ids=["attention", "experts"])
def test_the_table_has_wide_tall_and_square_weights_with_and_without_forms(kinds: tuple[ReadKind, ...]) -> None:
    shapes = {kind.layer(kind.adapted()).shape for kind in kinds}
    assert {(out > row) - (out < row) for out, row in shapes} == {-1, 0, 1}
    stacked = {kind.diagonals(kind.adapted())[0].dim() for kind in kinds}
    assert stacked == {2, 3}


@every_read_kind
def test_the_kind_and_the_name_are_those_of_the_row(kind: ReadKind) -> None:
    (site,) = Census.of(kind.adapted()).adapted
    assert (site.fqn, site.layer_class.kind) == (kind.target, kind.kind)


# Identity and the contract


@every_read_kind_dtype_and_basis
@every_start
def test_a_fresh_adapter_leaves_every_bit_of_the_output(
    kind: ReadKind, dtype: torch.dtype, basis: str, init: Init
) -> None:
    model, base = kind.adapted(dtype, filled=False, basis=basis, init=init), kind.model(dtype).requires_grad_(False)
    kind.weight(base).requires_grad_()  # by which torch decides how it computes a linear layer
    assert same_bits(kind.run(model, dtype), kind.run(base, dtype))
    model.eval()
    base.eval().requires_grad_(False)
    with torch.no_grad():
        assert same_bits(kind.run(model, dtype), kind.run(base, dtype))


def assert_contract(kind: ReadKind, dtype: torch.dtype, basis: str, r: int) -> None:
    model, base = kind.adapted(dtype, r=r, basis=basis), kind.model(dtype)
    update = kind.oracle_update(model)
    changed = kind.changed(base, update)
    given = tuple(part.double() if part.is_floating_point() else part for part in kind.arguments(dtype))
    expected = output_of(changed.get_submodule("0")(*given))
    assert (expected - output_of(base.double()[0](*given))).abs().max() > 0.01
    found = kind.run(model, dtype)
    assert found.dtype == dtype
    assert_close(found, expected, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert_close(randlora.delta_weight(model, kind.target), update, wide)
    assert_close(read(model, kind.parameter_fqn), kind.weight(changed), dtype)
    assert getattr(kind.owner(model), kind.attribute) is kind.weight(model)
    model.eval()
    with torch.no_grad():
        assert_close(kind.run(model, dtype), expected, dtype)


@every_read_kind_dtype_and_basis
def test_the_output_is_that_of_the_weight_and_the_oracles_update(
    kind: ReadKind, dtype: torch.dtype, basis: str
) -> None:
    assert_contract(kind, dtype, basis, r=3)


@every_family
@pytest.mark.parametrize(("r", "basis"), [(1, "dense"), (8, "block"), or_medium(False, 8, "dense")])
def test_the_output_is_that_of_the_oracle_for_a_rank_of_one_and_one_of_many(kind: ReadKind, basis: str, r: int) -> None:
    assert_contract(kind, torch.float64, basis, r)


# Gradients and ways to compute


@every_read_kind
@SHAPED
def test_gradients_are_those_of_an_update_formed_by_plain_autograd(kind: ReadKind, basis: str) -> None:
    model, plain = kind.adapted(torch.float64, basis=basis), kind.model(torch.float64)
    part = kind.layer(model).adapters["default"]
    lam, gamma = (value.detach().double().requires_grad_() for value in kind.diagonals(model))
    sides = max(part.shape[-2:]), min(part.shape[-2:])
    A, B = part.basis.slices(*sides, device="cpu", dtype=torch.float64)
    UA = (lam[..., None] * A.squeeze(1)[:, None] * gamma[..., None, :, :]).flatten(-3, -2)
    update = part.scaling * B.flatten(1) @ UA
    update = update if part.shape[-1] == sides[1] else update.mT
    weight = kind.weight(plain)
    changed = {kind.parameter_fqn.removeprefix("0."): weight + kind.in_layout(update, weight)}
    output = output_of(torch.func.functional_call(plain[0], changed, kind.arguments(torch.float64)))
    expected = torch.autograd.grad(weighted(output), (lam, gamma))
    for found, own in zip(kind.gradients(model, torch.float64), expected, strict=True):
        assert own.abs().max() > 0
        assert_close(found, own, torch.float32)


@every_family
def test_gradients_are_those_of_finite_differences(kind: ReadKind) -> None:
    if kind.name == "Embedding-padding":
        pytest.skip("padding gets no gradient, as in torch")
    model = kind.adapted(torch.float64)
    names = [name.removeprefix("0.") for name in kind.diagonal_fqns(model)]
    values = [value.detach().double().requires_grad_() for value in kind.diagonals(model)]

    def run(*given: Tensor) -> Tensor:
        changed = dict(zip(names, given, strict=True))
        return output_of(torch.func.functional_call(model[0], changed, kind.arguments(torch.float64)))

    assert torch.autograd.gradcheck(run, values, fast_mode=True)


@every_family
def test_transforms_compute_the_same_gradients(kind: ReadKind) -> None:
    model = kind.adapted()
    names = kind.diagonal_fqns(model)

    def loss(values: dict[str, Tensor]) -> Tensor:
        changed = {name.removeprefix("0."): value for name, value in values.items()}
        return weighted(output_of(torch.func.functional_call(model[0], changed, kind.arguments())))

    found = torch.func.grad(loss)({name: model.get_parameter(name) for name in names})
    for name, own in zip(names, kind.gradients(model), strict=True):
        assert_close(found[name], own, torch.float32)


@every_family
def test_only_the_adapter_gets_gradients_and_the_bias_none(kind: ReadKind) -> None:
    model = kind.adapted()
    kind.run(model).square().sum().backward()
    with_grad = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_grad == {*kind.diagonal_fqns(model)}


@every_family
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(kind: ReadKind, reentrant: bool) -> None:
    model = kind.adapted()
    kind.run(model).square().sum().backward()
    expected = [parameter.grad for parameter in randlora.trainable_parameters(model)]
    model.zero_grad()
    start = torch.ones((), requires_grad=True)  # without it a reentrant segment of indices gets no gradient

    def segment(start: Tensor) -> Tensor:
        return kind.run(model) * start

    checkpoint(segment, start, use_reentrant=reentrant).square().sum().backward()
    for parameter, gradient in zip(randlora.trainable_parameters(model), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@every_family
@pytest.mark.parametrize("compute", ["factored", "materialized"])
def test_every_way_to_compute_gives_the_same_output_and_gradients(kind: ReadKind, compute: Compute) -> None:
    model = kind.adapted(torch.float64)
    expected, gradients = kind.run(model, torch.float64), kind.gradients(model, torch.float64)
    randlora.set_compute(model, compute)
    assert_close(kind.run(model, torch.float64), expected, torch.float64)
    for found, own in zip(kind.gradients(model, torch.float64), gradients, strict=True):
        assert_close(found, own, torch.float32)


@every_family
def test_autocast_computes_the_same(kind: ReadKind) -> None:
    model, base = kind.adapted(), kind.model()
    expected = kind.run(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, own = kind.run(model), kind.run(base)
    assert found.dtype == own.dtype
    assert_close(found, expected, torch.bfloat16)


# What is selected


def test_a_callable_is_asked_once_for_a_module_whose_weight_is_read() -> None:
    asked: list[str] = []

    def wanted(fqn: str, _: nn.Module) -> bool:
        asked.append(fqn)
        return True

    model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.Linear(6, 6))
    assert randlora.plan(model, r=2, targets=wanted).targets == ("0", "1")
    assert asked == ["0", "1"]


def test_all_linear_leaves_convolutions_and_embeddings_out(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    model = nn.Sequential(nn.Embedding(8, 6), nn.Conv1d(8, 8, 1), nn.Linear(6, 6), nn.Linear(6, 2))
    assert randlora.plan(model, r=2, targets="all-linear").targets == ("2", "3")
    assert randlora.plan(model, r=2, targets=r"\d").targets == ("0", "1", "2", "3")

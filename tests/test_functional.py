"""The operation, its rows and its stacks against the float64 oracle, with their gradients and under transforms."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, vmap

from randlora.functional import (
    Compute,
    DensePair,
    Diagonals,
    adapted_linear,
    cost,
    delta_weight,
    summed_linear,
    update_rows,
)
from randlora.functional.adapted import adapted
from randlora.functional.scratch import is_in_transform
from tests import reference
from tests.pairs import Case, case, every_form
from tests.strategies import ranks, sides
from tests.test_functional_memory import kept_by, storage

every_way = pytest.mark.parametrize("compute", get_args(Compute))


def oracle(made: Case, in_features: int) -> Tensor:
    return reference.delta_weight(made.basis_A, made.basis_B, *made.diagonals, in_features=in_features)


def diagonals_of(made: Case, matrices: int) -> Diagonals:
    """Return Λ and Γ of a weight, or of each matrix of a stack."""
    lam, gamma, scaling = made.diagonals
    if matrices:
        lam, gamma = (torch.randn((matrices, *part.shape), dtype=part.dtype) for part in (lam, gamma))
    return Diagonals(lam, gamma, scaling)


@every_form
@given(out=sides, into=sides, r=ranks, matrices=st.integers(0, 3))
def test_delta_weight_is_the_oracles_for_a_weight_and_for_a_stack(
    form: str, out: int, into: int, r: int, matrices: int
) -> None:
    made = case(form, out, into, r)
    lam, gamma, scaling = diagonals = diagonals_of(made, matrices)
    found = delta_weight(made.pair, diagonals, is_wide=into <= out)
    expected = [
        reference.delta_weight(made.basis_A, made.basis_B, own_lam, own_gamma, scaling, in_features=into)
        for own_lam, own_gamma in (zip(lam, gamma, strict=True) if matrices else [(lam, gamma)])
    ]
    torch.testing.assert_close(found, torch.stack(expected) if matrices else expected[0])


@every_form
@every_way
@given(out=sides, into=sides, r=ranks, tokens=st.integers(0, 40), turned=st.booleans())
def test_output_is_that_of_the_sum_of_weight_and_update(
    form: str, compute: Compute, out: int, into: int, r: int, tokens: int, turned: bool
) -> None:
    """The weight may lie in memory as Conv1D's does."""
    made, x = case(form, out, into, r), torch.randn(tokens, into, dtype=torch.float64)
    weight, bias = torch.randn(out, into, dtype=torch.float64), torch.randn(out, dtype=torch.float64)
    weight = weight.T.contiguous().T if turned else weight
    update, before = oracle(made, into), weight.clone()
    found = adapted_linear(x, made.pair, made.diagonals, weight=weight, bias=bias, compute=compute)
    torch.testing.assert_close(found, x @ (weight + update).T + bias)
    torch.testing.assert_close(adapted_linear(x, made.pair, made.diagonals, compute=compute), x @ update.T)
    assert torch.equal(weight, before)


@every_form
@pytest.mark.parametrize("shape", [(24, 24), (23, 39), (39, 23)], ids=str)
def test_few_tokens_are_taken_through_without_building_the_basis(
    form: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In backward by layers of 256 and more: the further operators cost smaller ones more than they spare."""
    monkeypatch.setattr(cost, "MORE_OPERATORS", 0)
    made, x = case(form, *shape, 8), torch.randn(1, shape[1], dtype=torch.float64)
    weight, is_wide = torch.randn(shape, dtype=torch.float64), shape[1] == min(shape)
    chosen: dict[str, Any] = {"is_wide": is_wide, "has_weight": True, "compute": "auto"}
    assert cost.chosen_forward(1, made.pair, **chosen) == "few_tokens"
    assert cost.chosen_backward(1, made.pair, needs=(True, False, True), **chosen) == ("few_tokens", "few_tokens")

    def run(x: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
        return adapted_linear(x, made.pair, Diagonals(lam, gamma, 0.7), weight=weight)

    lam, gamma = made.diagonals[:2]
    torch.testing.assert_close(run(x, lam, gamma), x @ (weight + oracle(made, shape[1])).T)
    for needs_input in (True, False):
        leaves = x.requires_grad_(needs_input), lam.requires_grad_(), gamma.requires_grad_()
        assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_gradients_through_the_sum_of_a_weight_and_an_update() -> None:
    shapes = (2, 3, 5), (4, 5), (4, 5), (4,)
    for trained in ((1,), (2, 3), (0,), (0, 1, 2, 3)):
        leaves = [
            torch.randn(shape, dtype=torch.float64).requires_grad_(at in trained) for at, shape in enumerate(shapes)
        ]
        assert torch.autograd.gradcheck(summed_linear, leaves)


def test_delta_weight_of_a_case_worked_out_by_hand() -> None:
    """With r = 1 and two bases: row p of UA is lam[0, p]·A·gamma[p], and the update is B's columns times those rows."""
    basis_A = torch.tensor([[[1.0, 2.0]]], dtype=torch.float64)
    basis_B = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    lam = torch.tensor([[3.0, 5.0]], dtype=torch.float64)
    gamma = torch.tensor([[1.0, 1.0], [1.0, 0.5]], dtype=torch.float64)
    found = delta_weight(DensePair(basis_A, basis_B), Diagonals(lam, gamma, 2.0), is_wide=True)
    expected = torch.tensor([[6.0, 12.0], [10.0, 10.0], [16.0, 22.0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_in_bfloat16_the_sum_of_weight_and_update_is_rounded_once() -> None:
    made = case("dense", 64, 48, 8)
    pair = DensePair(made.pair.A.float(), made.pair.B.to(torch.bfloat16))
    weight = torch.randn(64, 48).to(torch.bfloat16)
    layer = adapted(weight, pair, made.diagonals.lam, made.diagonals.gamma, 1e-2, is_wide=True)
    scaled_A = pair.scaled_A(layer.lam, layer.gamma)  # the scaling is in Λ here
    exact = weight.double() + pair.B.double() @ scaled_A.double()
    twice = weight + (pair.B @ scaled_A)
    is_right = [(found == exact.to(torch.bfloat16)).double().mean().item() for found in (layer.total(), twice)]
    assert is_right[0] > 0.995
    assert is_right[1] < is_right[0]


# Gradients


@every_form
@every_way
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6), (1, 6)], ids=str)
def test_gradients_are_those_of_finite_differences_once_and_twice(
    form: str, compute: Compute, shape: tuple[int, int]
) -> None:
    made = case(form, *shape, 3)
    x, weight = torch.randn(2, shape[1], dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    bias, scaling = torch.randn(shape[0], dtype=torch.float64), made.diagonals.scaling
    leaves = tuple(tensor.requires_grad_() for tensor in (x, weight, bias, *made.diagonals[:2]))

    def run(x: Tensor, weight: Tensor, bias: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
        diagonals = Diagonals(lam, gamma, scaling)
        return adapted_linear(x, made.pair, diagonals, weight=weight, bias=bias, compute=compute)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *leaves: run(*leaves).square(), leaves, fast_mode=True)


@every_form
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6)], ids=str)
@pytest.mark.parametrize("matrices", [0, 2])
def test_gradients_of_the_update_are_right_once_and_twice_and_keep_the_diagonals_alone(
    form: str, shape: tuple[int, int], matrices: int
) -> None:
    made = case(form, *shape, 3)
    trained = tuple(part.requires_grad_() for part in diagonals_of(made, matrices)[:2])

    def run(lam: Tensor, gamma: Tensor) -> Tensor:
        return delta_weight(made.pair, Diagonals(lam, gamma, 0.7), is_wide=shape[1] == min(shape))

    assert torch.autograd.gradcheck(run, trained, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *parts: run(*parts).square(), trained, fast_mode=True)
    assert {storage(tensor) for tensor in kept_by(lambda: run(*trained))} == {storage(part) for part in trained}


# Rows


@every_form
@given(
    num_rows=sides,
    row_size=sides,
    r=ranks,
    ids=st.lists(st.integers(0, 39), max_size=12),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_rows_are_those_of_the_oracles_update(
    form: str, num_rows: int, row_size: int, r: int, ids: list[int], dtype: torch.dtype
) -> None:
    made, chosen = case(form, num_rows, row_size, r), torch.tensor(ids, dtype=dtype) % num_rows
    found = update_rows(chosen, made.pair, made.diagonals, num_rows=num_rows, is_wide=row_size <= num_rows)
    assert found.shape == (len(ids), row_size)
    torch.testing.assert_close(found, oracle(made, row_size)[chosen.long()])


@every_form
@pytest.mark.parametrize("shape", [(40, 8), (8, 8), (6, 9)], ids=str)
@pytest.mark.parametrize("ids", [[], [[0, 3], [3, 3]], [5] * 50], ids=["none", "repeated", "many"])
def test_gradients_of_rows_are_right_and_keep_the_diagonals_and_the_indices(
    form: str, shape: tuple[int, int], ids: list[Any]
) -> None:
    made, chosen = case(form, *shape, 4), torch.tensor(ids, dtype=torch.int64) % shape[0]
    trained = tuple(part.requires_grad_() for part in made.diagonals[:2])

    def run(lam: Tensor, gamma: Tensor) -> Tensor:
        table = Diagonals(lam, gamma, 0.7)
        return update_rows(chosen, made.pair, table, num_rows=shape[0], is_wide=shape[1] <= shape[0])

    assert run(*trained).shape == (*chosen.shape, shape[1])
    assert torch.autograd.gradcheck(run, trained, fast_mode=True)
    given, kept = {storage(part) for part in trained}, kept_by(lambda: run(*trained))
    assert {storage(tensor) for tensor in kept} >= given
    others = [tensor for tensor in kept if storage(tensor) not in given]
    if shape[0] >= shape[1] or chosen.numel() >= shape[0]:
        assert all(not tensor.is_floating_point() for tensor in others)
    assert all(tensor.numel() <= chosen.numel() * shape[0] for tensor in others)


@every_form
def test_autocast_does_not_reach_into_the_rows(form: str) -> None:
    made, ids = case(form, 40, 8, 4), torch.tensor([3, 4])
    lam, gamma = (value.float().requires_grad_() for value in made.diagonals[:2])
    pair: Any = type(made.pair)(made.pair.A.float(), made.pair.B.float(), *made.pair.rest)
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = update_rows(ids, pair, Diagonals(lam, gamma, 0.7), num_rows=40, is_wide=True)
            found.append((output, *torch.autograd.grad(output.sum(), (lam, gamma))))
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


# Transforms of torch.func, which the operation knows by a private name: see randlora/functional/scratch.py

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
every_family = pytest.mark.parametrize("form", ["dense", "block(2,4)"])


def prepared(form: str, shape: tuple[int, int], compute: Compute) -> tuple[Loss, list[Tensor]]:
    """Make a loss of ``(x, weight, lam, gamma)``, and values for them."""
    made = case(form, *shape, 4)

    def loss(x: Tensor, weight: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
        output = adapted_linear(x, made.pair, Diagonals(lam, gamma, 0.5), weight=weight, compute=compute)
        return output.square().sum()

    x, weight = torch.randn(3, shape[1], dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    return loss, [x, weight, *made.diagonals[:2]]


@every_family
@every_way
@pytest.mark.parametrize("batched", [0, 1, 2, 3], ids=["x", "weight", "lam", "gamma"])
def test_gradients_of_a_batch_are_those_of_its_members(form: str, compute: Compute, batched: int) -> None:
    loss, values = prepared(form, (9, 12) if batched % 2 else (12, 9), compute)
    values[batched] = torch.stack([values[batched], -values[batched], 2 * values[batched]])
    asked: list[bool] = []

    def watched(*values: Tensor) -> Tensor:
        asked.append(is_in_transform())
        return loss(*values)

    found = vmap(grad(watched, (0, 1, 2, 3)), in_dims=tuple(0 if at == batched else None for at in range(4)))(*values)
    assert asked == [True]
    assert not is_in_transform()
    for member in range(3):
        own = [value[member] if index == batched else value for index, value in enumerate(values)]
        for ours, expected in zip(found, grad(loss, (0, 1, 2, 3))(*own), strict=True):
            torch.testing.assert_close(ours[member], expected)


@every_family
@every_way
def test_the_transform_of_a_gradient_is_differentiated_too(form: str, compute: Compute) -> None:
    """Against autograd's second derivative, which finite differences hold."""
    loss, (x, weight, lam, gamma) = prepared(form, (9, 12), compute)
    found = grad(lambda inner: grad(lambda lam: loss(x, weight, lam, gamma))(inner).square().sum())(lam)
    lam = lam.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(x, weight, lam, gamma), lam, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), lam)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(found, expected)


@every_form
@every_way
@pytest.mark.parametrize("has_weight", [True, False], ids=["weight", "update"])
def test_a_batch_of_gradients_is_led_back_at_once(form: str, compute: Compute, has_weight: bool) -> None:
    """``is_grads_batched`` uses the older of torch's two vmaps."""
    shape = (9, 12) if has_weight else (12, 9)
    made, x = case(form, *shape, 4), torch.randn(3, shape[1], dtype=torch.float64)
    weight = torch.randn(shape, dtype=torch.float64)
    leaves = tuple(tensor.requires_grad_() for tensor in (x, weight, *made.diagonals[:2]))
    output = adapted_linear(x, made.pair, made.diagonals, weight=weight if has_weight else None, compute=compute)
    output, grads = output if has_weight else output + x @ weight.T, torch.randn(5, *output.shape, dtype=torch.float64)
    found = torch.autograd.grad(output, leaves, grads, is_grads_batched=True, retain_graph=True)
    for member, grad_output in enumerate(grads):
        expected = torch.autograd.grad(output, leaves, grad_output, retain_graph=True)
        torch.testing.assert_close(tuple(ours[member] for ours in found), expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own import
def test_forward_mode_is_right_where_no_gradient_is_wanted_and_refused_elsewhere() -> None:
    loss, (x, weight, lam, gamma) = prepared("dense", (9, 12), "auto")
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(x, weight, forward_ad.make_dual(lam, lam), gamma)).tangent
        with pytest.raises(NotImplementedError, match="jvp"):
            loss(x.requires_grad_(), weight, forward_ad.make_dual(lam, lam), gamma)
    (expected,) = torch.autograd.grad(loss(x, weight, lam.requires_grad_(), gamma), lam)
    torch.testing.assert_close(tangent, (expected * lam.detach()).sum())

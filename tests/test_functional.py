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

every_way = pytest.mark.parametrize("compute", get_args(Compute))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def oracle(made: Case, in_features: int, lam: Tensor | None = None, gamma: Tensor | None = None) -> Tensor:
    own_lam, own_gamma, scaling = made.diagonals
    lam, gamma = own_lam if lam is None else lam, own_gamma if gamma is None else gamma
    return reference.delta_weight(made.basis_A, made.basis_B, lam, gamma, scaling, in_features=in_features)


@every_form
@every_way
@given(
    out=sides, into=sides, r=ranks, tokens=st.integers(0, 40), turned=st.booleans(),
    ids=st.lists(st.integers(0, 39), max_size=12), dtype=st.sampled_from([torch.int32, torch.int64]),
)  # fmt: skip
def test_output_update_and_rows_are_those_of_the_oracle(
    form: str, compute: Compute, out: int, into: int, r: int, tokens: int, turned: bool, ids: list[int],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """The weight may lie in memory as Conv1D's does."""
    made, x, weight, bias = case(form, out, into, r), random(tokens, into), random(out, into), random(out)
    weight = weight.T.contiguous().T if turned else weight
    update, before, is_wide = oracle(made, into), weight.clone(), into <= out
    found = adapted_linear(x, made.pair, made.diagonals, weight=weight, bias=bias, compute=compute)
    torch.testing.assert_close(found, x @ (weight + update).T + bias)
    torch.testing.assert_close(adapted_linear(x, made.pair, made.diagonals, compute=compute), x @ update.T)
    assert torch.equal(weight, before)
    torch.testing.assert_close(delta_weight(made.pair, made.diagonals, is_wide=is_wide), update)
    lam, gamma = (random(3, *part.shape) for part in made.diagonals[:2])
    stack = delta_weight(made.pair, Diagonals(lam, gamma, 0.7), is_wide=is_wide)
    torch.testing.assert_close(stack, torch.stack([oracle(made, into, *each) for each in zip(lam, gamma, strict=True)]))
    chosen = torch.tensor(ids, dtype=dtype) % out
    found = update_rows(chosen, made.pair, made.diagonals, num_rows=out, is_wide=is_wide)
    assert found.shape == (len(ids), into)
    torch.testing.assert_close(found, update[chosen.long()])


def test_delta_weight_of_a_case_worked_out_by_hand() -> None:
    """With r = 1 and two bases: row p of UA is lam[0, p]·A·gamma[p], and the update is B's columns times those rows."""
    basis_A = torch.tensor([[[1.0, 2.0]]], dtype=torch.float64)
    basis_B = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    lam = torch.tensor([[3.0, 5.0]], dtype=torch.float64)
    gamma = torch.tensor([[1.0, 1.0], [1.0, 0.5]], dtype=torch.float64)
    found = delta_weight(DensePair(basis_A, basis_B), Diagonals(lam, gamma, 2.0), is_wide=True)
    assert found.tolist() == [[6.0, 12.0], [10.0, 10.0], [16.0, 22.0]]


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
    made, is_wide = case(form, *shape, 3), shape[1] <= shape[0]
    x, weight, bias, scaling = random(2, shape[1]), random(*shape), random(shape[0]), made.diagonals.scaling
    leaves = tuple(tensor.requires_grad_() for tensor in (x, weight, bias, *made.diagonals[:2]))
    stacked = tuple(random(2, *part.shape).requires_grad_() for part in leaves[3:])

    def run(x: Tensor, weight: Tensor, bias: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
        diagonals = Diagonals(lam, gamma, scaling)
        return adapted_linear(x, made.pair, diagonals, weight=weight, bias=bias, compute=compute)

    def update(lam: Tensor, gamma: Tensor) -> Tensor:
        return delta_weight(made.pair, Diagonals(lam, gamma, scaling), is_wide=is_wide)

    checked: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [(run, leaves)]
    if compute == "auto":
        checked += [(update, leaves[3:]), (update, stacked)]
    for function, inputs in checked:
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda *leaves: function(*leaves).square(), inputs, fast_mode=True)  # noqa: B023


@every_form
@pytest.mark.parametrize("shape", [(40, 8), (8, 8), (6, 9)], ids=str)
def test_gradients_of_rows_are_right_also_under_autocast(form: str, shape: tuple[int, int]) -> None:
    made, is_wide = case(form, *shape, 4), shape[1] <= shape[0]
    for ids in ([], [[0, 3], [3, 3]], [5] * 50):
        chosen = torch.tensor(ids, dtype=torch.int64) % shape[0]

        def run(lam: Tensor, gamma: Tensor, pair: Any = made.pair, chosen: Tensor = chosen) -> Tensor:
            return update_rows(chosen, pair, Diagonals(lam, gamma, 0.7), num_rows=shape[0], is_wide=is_wide)

        trained = tuple(part.requires_grad_() for part in made.diagonals[:2])
        assert run(*trained).shape == (*chosen.shape, shape[1])
        assert torch.autograd.gradcheck(run, trained, fast_mode=True)
        trained = tuple(value.detach().float().requires_grad_() for value in trained)
        single: Any = type(made.pair)(made.pair.A.float(), made.pair.B.float(), *made.pair.rest)
        found = []
        for enabled in (True, False):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                output = run(trained[0], trained[1], single)
                found.append((output, *torch.autograd.grad(output.sum(), trained)))
        assert all(torch.equal(*both) for both in zip(*found, strict=True))


@every_form
@pytest.mark.parametrize("shape", [(24, 24), (23, 39), (39, 23)], ids=str)
def test_few_tokens_are_taken_through_without_building_the_basis(
    form: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In backward by layers of 256 and more: the further operators cost smaller ones more than they spare."""
    monkeypatch.setattr(cost, "MORE_OPERATORS", 0)
    made, x, weight, is_wide = case(form, *shape, 8), random(1, shape[1]), random(*shape), shape[1] == min(shape)
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
    for trained in ((1,), (2, 3), (0,), (0, 1, 2, 3)):
        shapes = (2, 3, 5), (4, 5), (4, 5), (4,)
        leaves = [random(*shape).requires_grad_(at in trained) for at, shape in enumerate(shapes)]
        assert torch.autograd.gradcheck(summed_linear, leaves)


# Transforms of torch.func, which the operation knows by a private name: see randlora/functional/scratch.py


def prepared(
    form: str, shape: tuple[int, int], compute: Compute
) -> tuple[Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], list[Tensor]]:
    """Make a loss of ``(x, weight, lam, gamma)``, and values for them."""
    made = case(form, *shape, 4)

    def loss(x: Tensor, weight: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
        output = adapted_linear(x, made.pair, Diagonals(lam, gamma, 0.5), weight=weight, compute=compute)
        return output.square().sum()

    return loss, [random(3, shape[1]), random(*shape), *made.diagonals[:2]]


@pytest.mark.parametrize("form", ["dense", "block(2,4)"])
@every_way
def test_transforms_of_gradients_are_those_of_each_member_and_differentiated_too(form: str, compute: Compute) -> None:
    for batched in range(4):
        loss, values = prepared(form, (9, 12) if batched % 2 else (12, 9), compute)
        values[batched] = torch.stack([values[batched], -values[batched], 2 * values[batched]])
        asked: list[bool] = []

        def watched(*values: Tensor, loss: Any = loss, asked: list[bool] = asked) -> Any:
            asked.append(is_in_transform())
            return loss(*values)

        in_dims = tuple(0 if at == batched else None for at in range(4))
        found = vmap(grad(watched, (0, 1, 2, 3)), in_dims=in_dims)(*values)
        assert (asked, is_in_transform()) == ([True], False)
        for member in range(3):
            own = [value[member] if index == batched else value for index, value in enumerate(values)]
            for ours, wanted in zip(found, grad(loss, (0, 1, 2, 3))(*own), strict=True):
                torch.testing.assert_close(ours[member], wanted)
    loss, (x, weight, lam, gamma) = prepared(form, (9, 12), compute)
    second = grad(lambda inner: grad(lambda lam: loss(x, weight, lam, gamma))(inner).square().sum())(lam)
    lam = lam.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(x, weight, lam, gamma), lam, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), lam)  # which finite differences hold
    assert expected.abs().sum() > 0
    torch.testing.assert_close(second, expected)


@every_form
@every_way
def test_a_batch_of_gradients_is_led_back_at_once(form: str, compute: Compute) -> None:
    """``is_grads_batched`` uses the older of torch's two vmaps."""
    for shape, has_weight in (((9, 12), True), ((12, 9), False)):
        made, x, weight = case(form, *shape, 4), random(3, shape[1]), random(*shape)
        leaves = tuple(tensor.requires_grad_() for tensor in (x, weight, *made.diagonals[:2]))
        output = adapted_linear(x, made.pair, made.diagonals, weight=weight if has_weight else None, compute=compute)
        output = output if has_weight else output + x @ weight.T
        grads = random(5, *output.shape)
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

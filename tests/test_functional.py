"""The operation against the float64 oracle, for every form of bases and every way to compute."""

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from randlora.functional import Compute, DensePair, Diagonals, adapted_linear, delta_weight
from randlora.functional.adapted import adapted
from randlora.functional.cost import chosen_forward
from tests import reference
from tests.pairs import Case, case, every_form
from tests.strategies import ranks, sides

every_way = pytest.mark.parametrize("compute", get_args(Compute))
every_shape = pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6), (1, 6), (6, 1)], ids=str)


def oracle(made: Case, in_features: int) -> Tensor:
    return reference.delta_weight(made.basis_A, made.basis_B, *made.diagonals, in_features=in_features)


@every_form
@given(out_features=sides, in_features=sides, r=ranks)
def test_delta_weight_is_the_oracles(form: str, out_features: int, in_features: int, r: int) -> None:
    made = case(form, out_features, in_features, r)
    found = delta_weight(made.pair, made.diagonals, is_wide=in_features <= out_features)
    assert found.shape == (out_features, in_features)
    torch.testing.assert_close(found, oracle(made, in_features))


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
@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (40, 24), (23, 39), (39, 23)], ids=str)
def test_few_tokens_are_taken_through_without_building_the_basis(form: str, shape: tuple[int, int]) -> None:
    made, x = case(form, *shape, 8), torch.randn(1, shape[1], dtype=torch.float64)
    weight = torch.randn(shape, dtype=torch.float64)
    is_wide = shape[1] == min(shape)
    assert chosen_forward(1, made.pair, is_wide=is_wide, has_weight=True, compute="auto") == "few_tokens"
    expected = x @ (weight + oracle(made, shape[1])).T
    torch.testing.assert_close(adapted_linear(x, made.pair, made.diagonals, weight=weight), expected)


def test_delta_weight_of_a_case_worked_out_by_hand() -> None:
    """With r = 1 and two bases: row p of UA is lam[0, p]·A·gamma[p], and the update is B's columns times those rows."""
    basis_A = torch.tensor([[[1.0, 2.0]]], dtype=torch.float64)
    basis_B = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    lam = torch.tensor([[3.0, 5.0]], dtype=torch.float64)
    gamma = torch.tensor([[1.0, 1.0], [1.0, 0.5]], dtype=torch.float64)
    found = delta_weight(DensePair(basis_A, basis_B), Diagonals(lam, gamma, 2.0), is_wide=True)
    expected = torch.tensor([[6.0, 12.0], [10.0, 10.0], [16.0, 22.0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


@every_form
@every_way
@every_shape
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
@every_shape
def test_the_update_is_differentiable(form: str, shape: tuple[int, int]) -> None:
    made = case(form, *shape, 3)
    trained = tuple(tensor.requires_grad_() for tensor in made.diagonals[:2])
    assert torch.autograd.gradcheck(
        lambda lam, gamma: delta_weight(made.pair, Diagonals(lam, gamma, 0.7), is_wide=shape[1] == min(shape)), trained
    )


@every_form
@every_way
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=["input", "adapter", "nothing"])
@pytest.mark.parametrize("shape", [(9, 12), (12, 9)], ids=["down", "up"])
def test_a_gradient_is_computed_for_whom_asks(
    form: str, compute: Compute, needs: tuple[bool, bool], shape: tuple[int, int]
) -> None:
    made, x = case(form, *shape, 4), torch.randn(3, shape[1], dtype=torch.float64)
    weight = torch.randn(shape, dtype=torch.float64)
    lam, gamma, _ = made.diagonals
    x.requires_grad_(needs[0])
    lam.requires_grad_(needs[1])
    gamma.requires_grad_(needs[1])
    output = adapted_linear(x, made.pair, made.diagonals, weight=weight, compute=compute)
    assert output.requires_grad == any(needs)
    if any(needs):
        output.square().sum().backward()
    assert ((x.grad is not None), (lam.grad is not None), (gamma.grad is not None)) == (needs[0], needs[1], needs[1])


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

"""Gradients on the ways that small models do not take by themselves are those of the output."""

import pytest
import torch
from torch.autograd import gradcheck

from randlora.functional import Diagonals, adapted_linear, cost, summed_linear
from tests.pairs import case, every_form


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@every_form
@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (40, 24)], ids=str)
def test_gradients_of_a_few_tokens(form: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which layers of 256 and more take: the further operators cost smaller ones more than they spare."""
    monkeypatch.setattr(cost, "MORE_OPERATORS", 0)
    made, weight = case(form, *shape, 8), random(*shape).detach()
    needs, is_wide = (True, False, True), shape[1] == min(shape)
    ways = cost.chosen_backward(1, made.pair, is_wide=is_wide, has_weight=True, needs=needs, compute="auto")
    assert ways == ("few_tokens", "few_tokens")
    lam, gamma = (each.clone().requires_grad_() for each in made.diagonals[:2])
    for needs_input in (True, False):
        x = random(1, shape[1]).requires_grad_(needs_input)
        assert gradcheck(
            lambda x, lam, gamma: adapted_linear(x, made.pair, Diagonals(lam, gamma, 0.7), weight=weight),
            (x, lam, gamma),
        )


def test_gradients_through_the_sum_of_a_weight_and_an_update() -> None:
    x, weight, delta, bias = random(2, 3, 5), random(4, 5), random(4, 5), random(4)
    for trained in ((weight,), (delta, bias), (x,), (x, weight, delta, bias)):
        for each in (x, weight, delta, bias):
            each.requires_grad_(any(each is one for one in trained))
        assert gradcheck(summed_linear, (x, weight, delta, bias))

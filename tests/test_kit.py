"""What the other tests rely on: a snapshot tells of every change, and what `make slow` runs has a representative."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import randlora
from tests.kit import bits, fill, same_bits, untouched
from tests.laws import Mixed

CHANGES: dict[str, Callable[[Mixed], object]] = {
    "value head.weight": lambda model: model.get_parameter("head.weight").data[0, 0].nextafter_(torch.tensor(9.0)),
    "value zeros": lambda model: model.get_buffer("zeros").neg_(),
    "parameter q.bias": lambda model: model.q.bias.requires_grad_(),
    "parameter up.weight": lambda model: setattr(model.up, "weight", nn.Parameter(model.up.weight.data, False)),
    "module q": lambda model: model.q.eval(),
    "module down": lambda model: setattr(model.down, "note", 1),
    "module norm": lambda model: setattr(model, "norm", nn.LayerNorm(12)),
    "adapters": lambda model: randlora.activate(model, {"default": 0.5}),
    "value q.randlora_lambda.default": fill,
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_snapshot_tells_what_changed(what: str) -> None:
    model = Mixed()
    model.register_buffer("zeros", torch.zeros(3), persistent=False)
    randlora.inject(model, r=4)
    with untouched(model):
        model(torch.arange(9))
    with pytest.raises(AssertionError, match=what), untouched(model):
        CHANGES[what](model)


def test_bits_tell_zeros_apart_and_not_nan() -> None:
    nan, zero = torch.tensor([float("nan")]), torch.zeros(1)
    assert same_bits(nan, nan.clone())
    for other in (-zero, torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1)):
        assert not same_bits(zero, other)
    assert bits(torch.zeros(2, device="meta")) == bits(torch.ones(2, device="meta"))

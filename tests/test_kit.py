"""What the other tests rely on: a snapshot tells of every change."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import randlora
from tests.kit import fill, untouched
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

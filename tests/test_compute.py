"""`set_compute`: how a model's layers do their arithmetic."""

from typing import get_args

import pytest
import torch
from torch import nn

import randlora
from randlora.errors import AdapterError, ConfigError
from randlora.functional import Compute
from tests.kit import fill, untouched
from tests.laws import TOKENS, Mixed, assert_close


def adapted(basis: str = "dense") -> Mixed:
    model = Mixed()
    randlora.inject(model, r=4, targets="all-linear", basis=basis)  # type: ignore[arg-type]
    fill(model)
    return model


@pytest.mark.parametrize("basis", ["dense", "sparse", "very_sparse", "block"])
def test_every_way_gives_the_same_output_and_gradients(basis: str) -> None:
    model = adapted(basis)
    found = []
    for compute in get_args(Compute):
        randlora.set_compute(model, compute)
        model.zero_grad()
        output = model(TOKENS)
        output.square().sum().backward()
        found.append([output, *(p.grad for p in randlora.trainable_parameters(model) if p.grad is not None)])
    for others in found[1:]:
        for ours, expected in zip(others, found[0], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_choice_serves_adapters_that_come_later_and_ends_with_them() -> None:
    model = adapted()
    randlora.set_compute(model, "factored")
    randlora.inject(model, r=4, targets="all-linear", name="other")
    assert randlora.state.adapted_root(model)[1].compute == "factored"
    randlora.eject(model)
    randlora.inject(model, r=4, targets="all-linear")
    assert randlora.state.adapted_root(model)[1].compute == "auto"


def test_another_word_is_refused_and_changes_nothing() -> None:
    model = adapted()
    before = model(TOKENS)
    with untouched(model), pytest.raises(ConfigError, match="one of auto, factored, materialized, got 'fast'"):
        randlora.set_compute(model, "fast")  # type: ignore[arg-type]
    assert_close(model(TOKENS), before, torch.float32)


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(AdapterError):
        randlora.set_compute(nn.Linear(4, 4))

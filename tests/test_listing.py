"""`adapters`: what a model has, in words."""

from collections.abc import Callable

import pytest
from torch import nn

import randlora
from tests.kit import fill
from tests.laws import Mixed

OPTIONS = "r=3, alpha=60"


def with_two() -> Mixed:
    model = Mixed()
    randlora.inject(model, r=3, targets=["q", "up", "down"], name="a")
    randlora.inject(model, r=3, targets=["q"], train_also=["norm"], name="b")
    fill(model, "a")
    fill(model, "b", seed=1)
    return model


@pytest.mark.parametrize(
    ("change", "states"),
    [
        (randlora.adapters, ("active, trainable", "inactive, frozen")),
        (lambda model: randlora.activate(model, "b"), ("inactive, trainable", "active, frozen")),
        (lambda model: randlora.set_trainable(model, "a", False), ("active, frozen", "inactive, frozen")),
        (lambda model: randlora.activate(model, {"a": -0.25}), ("active with the factor -0.25, trainable", None)),
        (
            lambda model: randlora.activate(model, "a", layers=["q"]),
            ("active with a factor for each layer, trainable", None),
        ),
        (lambda model: randlora.merge(model, reversible=True), ("active, trainable, merged", "inactive, frozen")),
    ],
)
def test_an_adapter_prints_as_its_options_and_state(
    change: Callable[[nn.Module], object], states: tuple[str, str | None]
) -> None:
    model = with_two()
    change(model)
    first, second = randlora.adapters(model)
    assert str(first) == f"'a': {OPTIONS}, 3 layers, {states[0]}"
    assert (
        str(second)
        == f"'b': {OPTIONS}, 1 layer, {states[1] or 'inactive, frozen'}\nalso trained: norm.weight, norm.bias"
    )


def test_what_a_model_has_no_more_is_said() -> None:
    model = with_two()
    model.up = nn.Linear(5, 7)
    info = randlora.adapters(model)[0]
    assert info.problems
    assert " ".join(str(info).split()).endswith(" ".join(info.problems[0].split()))


def test_a_line_break_in_a_name_begins_no_line() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"x\ny": nn.LayerNorm(8)}))
    randlora.inject(model, r=2, targets=["0"], train_also=["1"])
    assert str(randlora.adapters(model)[0]).splitlines() == [
        "'default': r=2, alpha=40, 1 layer, active, trainable",
        "also trained: 1.x\\ny.weight, 1.x\\ny.bias",
    ]

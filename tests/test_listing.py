"""`adapters`: what a model has, in words and with the norms of the updates."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import randlora
from randlora.errors import AdapterError
from tests.kit import fill, untouched
from tests.laws import Mixed

OPTIONS = "r=3, alpha=60"


def with_two() -> Mixed:
    model = Mixed()
    randlora.inject(model, r=3, targets=["q", "up", "down"], name="a")
    randlora.inject(model, r=3, targets=["q"], train_also=["norm"], name="b")
    fill(model, "a")
    fill(model, "b", seed=1)
    return model


def test_norms_are_those_of_each_adapter_and_only_if_asked_for() -> None:
    model = with_two()
    with untouched(model):
        assert [info.norms for info in randlora.adapters(model)] == [None, None]
        for info in randlora.adapters(model, norms=True):
            expected = {fqn: norm.item() for fqn, norm in randlora.update_norms(model, name=info.name).items()}
            assert info.norms == expected
            assert info.norms.keys() == set(info.targets)
            assert min(expected.values()) > 0


@pytest.mark.parametrize(
    ("change", "states"),
    [
        (randlora.adapters, ("active, trainable", "inactive, frozen")),
        (lambda model: randlora.activate(model, "b", trainable=True), ("inactive, trainable", "active, trainable")),
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


def test_the_smallest_and_the_largest_norm_are_printed_with_their_layers() -> None:
    model = with_two()
    randlora.limit_norms(model, {"q": 0.5, "up": 0.25, "down": 0.125}, name="a")
    info = randlora.adapters(model, norms=True)[0]
    assert str(info).splitlines()[1:] == ["norms of the updates, about: 0.125 (down) to 0.5 (q)"]


def test_what_a_model_has_no_more_is_said_beside_the_norms_of_the_rest() -> None:
    model = with_two()
    model.up = nn.Linear(5, 7)
    info = randlora.adapters(model, norms=True)[0]
    assert info.norms is not None
    assert info.norms.keys() == {"q", "down"}
    assert info.problems
    assert " ".join(str(info).split()).endswith(" ".join(info.problems[0].split()))


def test_one_norm_alone_and_those_that_are_not_finite_are_printed() -> None:
    model = with_two()
    randlora.limit_norms(model, 0.25, name="b")
    assert str(randlora.adapters(model, norms=True)[1]).splitlines()[-1] == "norms of the updates, about: 0.25 (q)"
    randlora.limit_norms(model, {"q": 0.5, "up": 0.25, "down": 0.125}, name="a")
    for layer, value in ((model.q, math.nan), (model.down, math.inf)):
        with torch.no_grad():
            layer.get_submodule("randlora_lambda").get_parameter("a")[0, 0] = value
    assert str(randlora.adapters(model, norms=True)[0]).splitlines()[1:] == [
        "norms of the updates, about: 0.25 (up)",
        "the norm of the update is not finite: q, down",
    ]


def test_a_line_break_in_a_name_begins_no_line() -> None:
    model = nn.ModuleDict({"x\ny": nn.Linear(8, 8)})
    randlora.inject(model, r=2, targets="all-linear")
    assert str(randlora.adapters(model, norms=True)[0]).splitlines() == [
        "'default': r=2, alpha=40, 1 layer, active, trainable",
        "norms of the updates, about: 0 (x\\ny)",
    ]


def test_values_that_are_not_there_have_no_norms() -> None:
    model = with_two().to("meta")
    assert [info.norms for info in randlora.adapters(model)] == [None, None]
    with pytest.raises(AdapterError, match="cannot compute the norms of 'a': Λ and Γ of q, up, down have no values"):
        randlora.adapters(model, norms=True)

"""`adapters`: what a model has, in words and with the norms of the updates."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import randlora
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
    assert str(info).splitlines()[1:] == ["norms of the updates: 0.125 (down) to 0.5 (q)"]


def test_what_a_model_has_no_more_is_said_beside_the_norms_of_the_rest() -> None:
    model = with_two()
    model.up = nn.Linear(5, 7)
    info = randlora.adapters(model, norms=True)[0]
    assert info.norms is not None
    assert info.norms.keys() == {"q", "down"}
    assert info.problems
    assert " ".join(str(info).split()).endswith(" ".join(info.problems[0].split()))


def test_norms_are_no_part_of_a_graph() -> None:
    model = with_two()
    before = torch.get_rng_state()
    for info in randlora.adapters(model, norms=True):
        assert all(type(norm) is float for norm in (info.norms or {}).values())
    assert torch.equal(torch.get_rng_state(), before)

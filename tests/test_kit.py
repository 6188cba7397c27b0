"""What the other tests rely on: a snapshot tells of every change, and what `make slow` runs has a representative."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import randlora
from tests.further import REPEATS_OTHERS, STANDS_FOR_OTHERS, name_of, which_are_further
from tests.kit import bits, fill, same_bits, untouched
from tests.laws import Mixed
from tests.layer_kinds import LAYER_KINDS
from tests.read_kinds import READ_KINDS

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


TABLES: dict[str, list[Any]] = {
    "kind": [*LAYER_KINDS, *READ_KINDS],
    "basis": ["dense", "block", "sparse"],
    "dtype": [torch.float32, torch.float64],
    "other": [None, lambda: 1, lambda: 2],
}
ROWS = [dict(zip(TABLES, row, strict=True)) for row in product(*TABLES.values())]


def staying(tests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [test for test, is_further in zip(tests, which_are_further(tests), strict=True) if not is_further]


@given(st.lists(st.sampled_from(ROWS), min_size=1, max_size=30))
def test_each_value_that_does_not_repeat_others_is_in_a_test_that_stays(tests: list[dict[str, Any]]) -> None:
    stay = staying(tests)
    assert stay
    for name in TABLES:
        values = {id(test[name]) for test in tests if name != "kind" or test[name].name not in REPEATS_OTHERS}
        assert {id(test[name]) for test in stay} >= values


def test_of_all_combinations_few_stay_and_every_name_is_one_of_a_table() -> None:
    usual = STANDS_FOR_OTHERS["kind"]
    for test in staying(ROWS):
        assert test["kind"].name not in REPEATS_OTHERS
        assert (test["kind"].name in usual) + (test["basis"] == "dense") + (test["dtype"] == torch.float32) >= 2
    assert {name_of(kind) for kind in TABLES["kind"]} >= {*REPEATS_OTHERS}
    assert not {*REPEATS_OTHERS} & {*usual}

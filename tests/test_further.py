"""What `make test` leaves to `make slow` has a representative that it does not."""

from itertools import product
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.further import REPEATS_OTHERS, STANDS_FOR_OTHERS, name_of, which_are_further
from tests.layer_kinds import LAYER_KINDS
from tests.models import TRANSFORMERS_MODELS
from tests.read_kinds import READ_KINDS

TABLES: dict[str, list[Any]] = {
    "kind": [*LAYER_KINDS, *READ_KINDS, *TRANSFORMERS_MODELS],
    "basis": ["dense", "block", "sparse"],
    "seed": [0, 1],
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
        assert (test["kind"].name in usual) + (test["basis"] == "dense") + (test["seed"] == 0) >= 2
    assert {name_of(kind) for kind in TABLES["kind"]} >= {*REPEATS_OTHERS}
    assert not {*REPEATS_OTHERS} & {*usual}

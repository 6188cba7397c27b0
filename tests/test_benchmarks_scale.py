"""The tables of docs/scale.md are what the formulas give, and no model in them was forgotten."""

import re

import pytest

import randlora
from benchmarks import scale
from tests.further import further

PAGE = scale.PAGE.read_text(encoding="utf-8")


def lines(table: str) -> list[str]:
    """Return the rows of a table of the page."""
    found = re.search(rf"<!-- {table} -->\n(.*?)<!-- end -->", PAGE, re.DOTALL)
    assert found is not None
    return found[1].splitlines()


@pytest.mark.medium
@pytest.mark.parametrize("name", ["Llama-3 8B", *map(further, ("Mixtral-8x7B, experts too", "Qwen3-235B-A22B"))])
def test_the_rows_of_a_model_are_what_the_formulas_give(name: str) -> None:
    assert scale.sizes_row(name, scale.MODELS[name]) in lines("sizes")
    assert scale.totals_row(name, scale.MODELS[name]) in lines("totals")


@pytest.mark.medium
@pytest.mark.parametrize("name", ["Llama-3 405B, 64 devices, fsdp2", "Llama-3 70B, 8 devices, tp"])
def test_the_parts_of_a_sum_are_what_the_formulas_give(name: str) -> None:
    assert scale.parts_row(name) in lines("parts")


@pytest.mark.medium
@pytest.mark.parametrize("name", ["Llama-3 8B", *map(further, list(scale.MODELS)[1:])])
def test_no_model_is_given_a_learning_rate_that_ruins_one_of_its_size(name: str) -> None:
    shape = scale.MODELS[name]
    model = shape.build()
    rate = randlora.plan(model, scale.R, targets=scale.targets_of(shape, model)).learning_rate
    assert rate is not None
    assert 2e-5 < rate <= 3e-4


@pytest.mark.parametrize(
    ("table", "names"), [("sizes", scale.MODELS), ("totals", scale.MODELS), ("parts", scale.PARTS)]
)
def test_every_model_has_its_row(table: str, names: dict[str, object]) -> None:
    head, _, *rows = lines(table)
    assert head == f"| {' | '.join(scale.HEADS[table])} |"
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(names)

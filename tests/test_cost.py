"""The choice among ways to compute: a pure function of sizes."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from randlora.functional.cost import (
    ON_CPU,
    ON_GPU,
    SMALL_WEIGHT,
    Sizes,
    Way,
    backward_ways,
    forward_way,
    is_small,
    pass_over,
)

DENSE, BLOCK = (1.0, 1.0, 1.0), (1 / 4, 1 / 8, 1 / 32)


def sizes(
    tokens: int,
    into: int = 1024,
    out: int = 1024,
    shares: tuple[float, float, float] = DENSE,
    *,
    has_weight: bool = True,
) -> Sizes:
    max_dim, min_dim = max(into, out), min(into, out)
    num_bases = -(-min_dim // 32)
    return Sizes(tokens, max_dim, min_dim, 32 * num_bases, num_bases, shares, into <= out, has_weight)


@pytest.mark.parametrize(
    ("tokens", "shares", "forward", "backward"),
    [
        (1, DENSE, "few_tokens", ("few_tokens", "few_tokens")),
        (128, DENSE, "factored", ("factored", "factored")),
        (8192, DENSE, "materialized", ("materialized", "materialized")),
        (1, BLOCK, "few_tokens", ("few_tokens", "few_tokens")),
        (128, BLOCK, "factored", ("factored", "factored")),
        (8192, BLOCK, "materialized", ("materialized", "factored")),
    ],
)
def test_a_square_layer_takes_the_ways_that_were_measured_fastest(
    tokens: int, shares: tuple[float, float, float], forward: Way, backward: tuple[Way, Way]
) -> None:
    found = sizes(tokens, shares=shares)
    assert forward_way(found) == forward
    assert backward_ways(found, needs_input=True, needs_diagonals=True) == backward


shapes = st.tuples(st.integers(1, 5000), st.integers(1, 5000))


@given(shape=shapes, tokens=st.integers(0, 100_000), shares=st.sampled_from([DENSE, BLOCK]), fold=st.booleans())
def test_more_tokens_never_lead_away_from_the_materialized_way(
    shape: tuple[int, int], tokens: int, shares: tuple[float, float, float], fold: bool
) -> None:
    few, many = (sizes(count, *shape, shares, has_weight=fold) for count in (tokens, 2 * tokens + 1))
    assume(forward_way(few) == "materialized")
    assert forward_way(many) in ({"materialized"} if fold else {"materialized", "factored"})


@given(shape=st.tuples(st.integers(500, 5000), st.integers(500, 5000)), tokens=st.integers(1, 64))
def test_few_tokens_are_laid_out_only_where_they_take_no_more_room_than_the_weight(
    shape: tuple[int, int], tokens: int
) -> None:
    found = sizes(tokens, *shape)
    assume(forward_way(found) == "few_tokens")
    assert tokens * found.num_bases * found.min_dim <= shape[0] * shape[1]


@given(shape=shapes, tokens=st.integers(1, 100_000))
def test_what_is_there_already_is_not_paid_for_again(shape: tuple[int, int], tokens: int) -> None:
    found = sizes(tokens, *shape)
    _, beside_weight = backward_ways(found, needs_input=False, needs_diagonals=True, needs_weight=True)
    _, alone = backward_ways(found, needs_input=False, needs_diagonals=True)
    assume(alone == "materialized")
    assert beside_weight == "materialized"


def test_an_update_without_a_weight_to_be_added_to_is_formed_later() -> None:
    """Then the tokens pass one product more."""
    assert forward_way(sizes(900)) == "materialized"
    assert forward_way(sizes(900, has_weight=False)) == "factored"
    assert forward_way(sizes(1400, has_weight=False)) == "materialized"


def test_what_a_pass_costs_says_whether_it_was_measured() -> None:
    assert pass_over("cpu", torch.bfloat16) == ON_CPU
    assert ON_CPU.is_measured
    assert not any(found.is_measured for found in ON_GPU.values())
    assert pass_over("cuda", torch.bfloat16).multiply_adds > pass_over("cuda", torch.float32).multiply_adds
    assert pass_over("xpu", torch.float8_e4m3fn) == ON_GPU[torch.float32]


def test_where_passes_are_dear_more_tokens_are_taken_through_both_factors() -> None:
    cheap, dear = (sizes(600, shares=BLOCK)._replace(entry=entry) for entry in (40, 400))
    assert (forward_way(cheap), forward_way(dear)) == ("materialized", "factored")


@pytest.mark.parametrize(
    ("side", "way"), [(64, "factored"), (128, "factored"), (256, "few_tokens"), (1024, "few_tokens")]
)
def test_a_small_layer_takes_the_way_of_fewer_operators_in_backward(side: int, way: Way) -> None:
    found = backward_ways(sizes(1, side, side), needs_input=True, needs_diagonals=True)
    assert found == (way, way)


def test_only_little_work_is_small_and_none_of_what_is_no_number_yet() -> None:
    assert is_small(16, 256 * 256)
    assert not is_small(17, 256 * 256)
    assert is_small(4, SMALL_WEIGHT)
    assert not is_small(1.0, 1)  # type: ignore[arg-type]

"""The choice among ways to compute: a pure function of sizes."""

import pytest
import torch
from hypothesis import given
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
    ("found", "forward", "backward"),
    [
        (sizes(1), "few_tokens", ("few_tokens", "few_tokens")),
        (sizes(128), "factored", ("factored", "factored")),
        (sizes(8192), "materialized", ("materialized", "materialized")),
        (sizes(1, shares=BLOCK), "few_tokens", ("few_tokens", "few_tokens")),
        (sizes(128, shares=BLOCK), "factored", ("factored", "factored")),
        (sizes(8192, shares=BLOCK), "materialized", ("materialized", "factored")),
        (sizes(1, 128, 128), "few_tokens", ("factored", "factored")),  # of fewer operators
        (sizes(1, 256, 256), "few_tokens", ("few_tokens", "few_tokens")),
    ],
    ids=str,
)
def test_a_square_layer_takes_the_ways_that_were_measured_fastest(
    found: Sizes, forward: Way, backward: tuple[Way, Way]
) -> None:
    assert forward_way(found) == forward
    assert backward_ways(found, needs_input=True, needs_diagonals=True) == backward


shapes = st.tuples(st.integers(1, 5000), st.integers(1, 5000))


@given(shape=shapes, tokens=st.integers(0, 100_000), shares=st.sampled_from([DENSE, BLOCK]), fold=st.booleans())
def test_more_tokens_lead_to_the_materialized_way_and_what_is_there_is_not_paid_for_again(
    shape: tuple[int, int], tokens: int, shares: tuple[float, float, float], fold: bool
) -> None:
    few, many = (sizes(count, *shape, shares, has_weight=fold) for count in (tokens, 2 * tokens + 1))
    way = forward_way(few)
    if way == "materialized":
        assert forward_way(many) in ({"materialized"} if fold else {"materialized", "factored"})
    elif way == "few_tokens":  # which takes no more room than the weight
        assert tokens * few.num_bases * few.min_dim <= shape[0] * shape[1]
    _, alone = backward_ways(few, needs_input=False, needs_diagonals=True)
    _, beside_weight = backward_ways(few, needs_input=False, needs_diagonals=True, needs_weight=True)
    assert alone != "materialized" or beside_weight == "materialized"


def test_an_update_without_a_weight_to_be_added_to_is_formed_later_and_where_passes_are_dear() -> None:
    """Then the tokens pass one product more."""
    assert forward_way(sizes(900)) == "materialized"
    assert forward_way(sizes(900, has_weight=False)) == "factored"
    assert forward_way(sizes(1400, has_weight=False)) == "materialized"
    cheap, dear = (sizes(600, shares=BLOCK)._replace(entry=entry) for entry in (40, 400))
    assert (forward_way(cheap), forward_way(dear)) == ("materialized", "factored")


def test_what_a_pass_costs_depends_on_the_device_and_the_dtype_and_little_work_is_small() -> None:
    assert pass_over("cpu", torch.bfloat16) == ON_CPU
    assert pass_over("cuda", torch.bfloat16).multiply_adds > pass_over("cuda", torch.float32).multiply_adds
    assert pass_over("xpu", torch.float8_e4m3fn) == ON_GPU[torch.float32]
    assert [ON_CPU.is_measured, any(found.is_measured for found in ON_GPU.values())] == [True, False]
    assert is_small(16, 256 * 256)
    assert not is_small(17, 256 * 256)
    assert is_small(4, SMALL_WEIGHT)
    assert not is_small(1.0, 1)  # type: ignore[arg-type]

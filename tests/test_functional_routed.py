"""Tokens of several adapters on the same bases, each with its own update."""

from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from randlora.functional import Diagonals
from randlora.serving import stacked
from randlora.serving.stacked import Stack, Way, goes_together, one_by_one, stacked_update
from tests import reference
from tests.pairs import Case, case, every_form
from tests.strategies import ranks, sides

at_once = st.sampled_from([1, 2**22])
every_count = st.lists(st.integers(1, 4), min_size=1, max_size=5)


def updates(form: str, out: int, into: int, r: int, many: int) -> tuple[Case, list[Diagonals], list[Tensor]]:
    """Make bases, Λ, Γ and the scaling of some updates, and what the oracle says they are."""
    made = case(form, out, into, r)
    lam, gamma, _ = made.diagonals
    diagonals = [
        Diagonals(torch.randn_like(lam), torch.randn_like(gamma), scaling)
        for scaling in torch.rand(many, dtype=torch.float64).tolist()
    ]
    return (
        made,
        diagonals,
        [reference.delta_weight(made.basis_A, made.basis_B, *one, in_features=into) for one in diagonals],
    )


def expected(x: Tensor, counts: list[int], deltas: list[Tensor]) -> Tensor:
    return torch.cat([part @ delta.T for part, delta in zip(x.split(counts), deltas, strict=True)])


@every_form
@given(out=sides, into=sides, r=ranks, counts=every_count, way=st.sampled_from([*get_args(Way), None]), at_once=at_once)
def test_each_token_gets_the_oracles_update(
    form: str, out: int, into: int, r: int, counts: list[int], way: Way | None, at_once: int
) -> None:
    made, diagonals, deltas = updates(form, out, into, r, len(counts))
    if way == "by term" and made.pair.A.shape[0] > 1:
        way = None
    x, is_wide = torch.randn(sum(counts), into, dtype=torch.float64), into <= out
    wanted = expected(x, counts, deltas)
    in_turn = one_by_one(x, made.pair, diagonals, counts, is_wide=is_wide)
    torch.testing.assert_close(in_turn, wanted, rtol=1e-12, atol=1e-12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(stacked.AT_ONCE, "cpu", at_once)
        stacked._parts.cache_clear()
        stack = Stack.of(made.pair, diagonals)
        found = stacked_update(x, made.pair, stack, counts, is_wide=is_wide, way=way)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "form"), [((64, 48), "dense"), ((48, 64), "dense"), ((64, 48), "block(2,4)")], ids=str
)
@pytest.mark.parametrize("way", get_args(Way))
def test_in_bfloat16_it_is_as_close_as_one_by_one(shape: tuple[int, int], form: str, way: Way) -> None:
    if form != "dense" and way == "by term":
        return
    made, diagonals, deltas = updates(form, *shape, 8, 3)
    kind = type(made.pair)
    pair = kind(made.pair.A.float(), made.pair.B.bfloat16(), *made.pair.rest)
    x, counts = torch.randn(6, shape[1], dtype=torch.float64).bfloat16(), [1, 2, 3]
    wanted, is_wide = expected(x.double(), counts, deltas), shape[1] <= shape[0]
    near = one_by_one(x, pair, diagonals, counts, is_wide=is_wide)
    found = stacked_update(x, pair, Stack.of(pair, diagonals), counts, is_wide=is_wide, way=way)
    errors = [(each.double() - wanted).norm() / wanted.norm() for each in (near, found)]
    assert errors[1] < 2 * errors[0] + 1e-3


def test_what_goes_together() -> None:
    made, diagonals, _ = updates("dense", 32, 32, 4, 2)
    x = torch.randn(6, 32, dtype=torch.float64)
    parts = [part.detach() for one in diagonals for part in one[:2]]

    def together(counts: list[int], **options: Any) -> bool:
        return goes_together(x, parts, made.pair, counts, **{"is_wide": True, "compute": "auto", **options})

    assert together([3, 3])
    assert not together([6])
    assert not together([3, 3], compute="materialized")
    assert not together([3000, 3])
    parts[2].requires_grad_()
    assert not together([3, 3])
    with torch.no_grad():
        assert together([3, 3])


def test_a_few_tokens_of_each_adapter_build_no_large_factor() -> None:
    few, many = ({part.way for part in stacked._parts((count, count), (1, 8, 8, 64), "cpu", None)} for count in (1, 64))
    assert few < {"by row", "by term"}
    assert many == {"whole"}

"""Tokens of several adapters on the same bases, each with its own update."""

from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from randlora.functional import Compute, Diagonals, cost
from randlora.functional import routed as rooted
from randlora.functional.routed import all_at_once, routed_update
from tests import reference
from tests.pairs import Case, case, every_form
from tests.strategies import ranks, sides

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
@given(out=sides, into=sides, r=ranks, counts=every_count, compute=st.sampled_from(get_args(Compute)))
def test_each_token_gets_the_oracles_update(
    form: str, out: int, into: int, r: int, counts: list[int], compute: Compute
) -> None:
    made, diagonals, deltas = updates(form, out, into, r, len(counts))
    x = torch.randn(sum(counts), into, dtype=torch.float64)
    found = routed_update(x, made.pair, diagonals, counts, is_wide=into <= out, compute=compute)
    torch.testing.assert_close(found, expected(x, counts, deltas), rtol=1e-12, atol=1e-12)
    together = all_at_once(x, made.pair, diagonals, counts, is_wide=into <= out)
    torch.testing.assert_close(together, expected(x, counts, deltas), rtol=1e-12, atol=1e-12)


@every_form
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6)], ids=str)
@pytest.mark.parametrize("is_term_by_term", [True, False])
def test_both_ways_without_gradients(
    form: str, shape: tuple[int, int], is_term_by_term: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(tokens: int, pair: Any, **_: Any) -> bool:
        chosen.append(is_term_by_term)
        return is_term_by_term

    chosen: list[bool] = []
    monkeypatch.setattr(rooted, "chosen_terms", choose)
    monkeypatch.setattr(rooted, "chosen_forward", lambda *_, **__: "factored")
    made, diagonals, deltas = updates(form, *shape, 3, 3)
    x = torch.randn(6, shape[1], dtype=torch.float64)
    found = routed_update(x, made.pair, diagonals, [1, 3, 2], is_wide=shape[1] <= shape[0])
    torch.testing.assert_close(found, expected(x, [1, 3, 2], deltas), rtol=1e-12, atol=1e-12)
    assert chosen == [is_term_by_term]


def test_few_tokens_of_many_adapters_build_no_large_factor() -> None:
    pair = case("dense", 64, 64, 8).pair
    assert cost.chosen_terms(1, pair, is_wide=True)
    assert not cost.chosen_terms(64, pair, is_wide=True)

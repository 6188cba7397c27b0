"""The benchmark of LoRAs of an adapter: every rank has its row, with its error, its loss and its size."""

import pytest

from benchmarks import low_rank
from benchmarks.command import Settings
from tests.peer import THEIR_WARNINGS

pytestmark = [*THEIR_WARNINGS, pytest.mark.medium]


def test_every_rank_has_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"LAYERS": 1, "SIDE": 32, "STEPS": 2, "ROWS": 2, "LENGTH": 512, "R": 4, "RANKS": (2,), "TOLERANCES": (0.3,)}
    for name, value in small.items():
        monkeypatch.setattr(low_rank, name, value)
    adapter, low, tolerant = low_rank.run(Settings("cpu", is_quick=True))
    assert (adapter.case, low.case) == ("adapter", "rank 2")
    assert tolerant.case.startswith("tolerance 0.3, padded to rank ")
    assert {frozenset(row.figures) for row in (adapter, low, tolerant)} == {
        frozenset({"relative error", "what the adapter gains in loss", "file"})
    }
    assert adapter.figures["relative error"].best == 0
    assert tolerant.figures["relative error"].best <= 30 < low.figures["relative error"].best

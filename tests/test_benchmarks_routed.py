"""The benchmark of routed batches: every contestant runs, and all rows are there."""

import pytest

from benchmarks import routed
from benchmarks.command import Settings


@pytest.mark.medium
@pytest.mark.parametrize("is_quick", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_case_has_its_contestants(is_quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "LAYERS": 1,
        "SIDE": 64,
        "ROWS": 4,
        "LOADED": {1: 1, 6: 4, 64: 4},
        "REPEATS": 1,
        "FEW_REPEATS": 1,
    }.items():
        monkeypatch.setattr(routed, name, value)
    monkeypatch.setattr(routed, "TOKENS", {"decode": 1, "prefill": 3})
    found = routed.run(Settings("cpu", is_quick=is_quick))
    assert len(found) == (1 if is_quick else 6)
    contestants = {"merged", "one adapter", "block, one adapter", "dense", "block", "LoRA"}
    more = set() if is_quick else {"dense, a block each", "one by one"}
    assert {frozenset(row.figures) for row in found} == {frozenset(contestants | more)}

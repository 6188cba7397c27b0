"""The benchmark of what adapters cost: all figures are there, and those of bytes are what the sizes say."""

import pytest

from benchmarks import pool
from benchmarks.command import Settings
from benchmarks.layers import RANK

OURS = {"load", "remove", "swap, disk", "swap, memory", "state", "block", "bytes", "bases"}


@pytest.mark.medium
def test_every_size_has_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "SIZES", ((1, 64), (2, 64)))
    monkeypatch.setattr(pool, "REPEATS", 1)
    first, second = pool.run(Settings("cpu", is_quick=False))
    assert first.figures.keys() == {*OURS, "LoRA load", "LoRA remove", "LoRA bytes"}
    per_layer = 7 * 4 * (2 * RANK + 2 * 64)  # Λ and Γ of two bases
    assert (first.figures["bytes"].best, second.figures["bytes"].best) == (per_layer, 2 * per_layer)
    assert first.figures["bases"].best == second.figures["bases"].best
    assert len(pool.run(Settings("cpu", is_quick=True))) == 1

"""The benchmark of what adapters cost: all figures are there, and those of bytes are what the sizes say."""

import pytest

from benchmarks import pool
from benchmarks.command import Settings
from benchmarks.layers import RANK
from benchmarks.targets import TARGETS

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


def test_every_size_has_targets() -> None:
    cases = {target.case: target.is_quick for target in TARGETS if target.benchmark == "pool"}
    assert list(cases.items()) == [(pool.name_of(*size), size == pool.SIZES[0]) for size in pool.SIZES]
    names = {name for target in TARGETS if target.benchmark == "pool" for name in (target.first, target.second)}
    assert names <= {*OURS, "LoRA load"}

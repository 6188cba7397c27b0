"""Adapters that come and go: the model is what it was, and memory does not grow."""

from __future__ import annotations

import gc
import os
import time
import tracemalloc
from pathlib import Path

import torch

import randlora
from tests.checkpoint_files import HEADED
from tests.kit import snapshot
from tests.torture.row import Row

CYCLES, TRACED = 10_000, 1000  # tracing makes a cycle five times as long
WARM_UP = 200  # after which every cache is full
GROWTH, TRACED_GROWTH = 4 * 2**20, 16 * 2**10  # bytes of the process, and of objects of Python


def resident() -> int:
    """Return the memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def cycles(scale: float) -> Row:
    """Inject, train, merge and eject again and again in one model."""
    start, failures = time.monotonic(), list[str]()
    number, traced_number = (max(1, round(most * scale)) for most in (CYCLES, TRACED))
    model = HEADED.build()
    before = snapshot(model)
    x, y = torch.randn(4, 6), torch.randn(4, 3)

    def cycle(turn: int) -> None:
        randlora.inject(model, r=2, seed=turn % 3, targets=["0", "2"], train_also=["head"])
        optimizer = torch.optim.AdamW(randlora.trainable_parameters(model), lr=0.1)
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            alone = model(x)
            with randlora.merged(model):
                torch.testing.assert_close(model(x), alone)
        randlora.eject(model)

    def run(turns: int) -> None:
        for turn in range(turns):
            cycle(turn)
        gc.collect()

    tracemalloc.start()
    run(WARM_UP)
    traced_before, _ = tracemalloc.get_traced_memory()
    run(traced_number)
    traced = tracemalloc.get_traced_memory()[0] - traced_before
    tracemalloc.stop()
    resident_before = resident()
    run(number)
    grown = resident() - resident_before
    if snapshot(model) != before:
        failures.append("the model is not what it was")
    if grown > GROWTH or traced > TRACED_GROWTH:
        failures.append(f"memory grew by {grown:,} bytes, objects of Python by {traced:,}")
    notes = (
        f"memory grew by {grown / 2**10:,.0f} KiB, objects of Python by {traced / 2**10:,.1f} KiB "
        f"in {traced_number:,} more"
    )
    return Row("cycles", "inject, train, merge, eject", number, tuple(failures), time.monotonic() - start, notes)

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

CYCLES = 10_000
WARM_UP = 200  # after which every cache is full
GROWTH, TRACED_GROWTH = 4 * 2**20, 64 * 2**10  # bytes of the process, and of objects of Python


def resident() -> int:
    """Return the memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def cycles(scale: float) -> Row:
    """Inject, train, merge and eject again and again in one model."""
    torch.set_num_threads(1)
    start, number, failures = time.monotonic(), max(1, round(CYCLES * scale)), list[str]()
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

    tracemalloc.start()
    for turn in range(WARM_UP):
        cycle(turn)
    gc.collect()
    resident_before, (traced_before, _) = resident(), tracemalloc.get_traced_memory()
    for turn in range(number):
        cycle(turn)
    gc.collect()
    grown, traced = resident() - resident_before, tracemalloc.get_traced_memory()[0] - traced_before
    tracemalloc.stop()
    if snapshot(model) != before:
        failures.append("the model is not what it was")
    if grown > GROWTH or traced > TRACED_GROWTH:
        failures.append(f"memory grew by {grown:,} bytes, objects of Python by {traced:,}")
    notes = f"memory grew by {grown / 2**10:,.0f} KiB, objects of Python by {traced / 2**10:,.0f} KiB"
    return Row("cycles", "inject, train, merge, eject", number, tuple(failures), time.monotonic() - start, notes)

"""How much memory of a process `save` takes beside the model, as a share of the adapter."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

import randlora
from tests.distributed.engines import sharded, zero
from tests.distributed.processes import in_two

pytestmark = [
    in_two,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell the most memory since a moment"),
]

LAYERS, WIDTH = 16, 2048
"""Of an adapter of 256 MiB, in tensors of 16 MiB, if r is 1."""

MAKE: dict[str, Callable[[Any], Any]] = {
    "one process": lambda model: model,
    "FSDP2": partial(sharded, parts=[str(index) for index in range(LAYERS)]),
    "ZeRO-3": partial(zero, stage="3"),
    "ZeRO-3, bf16": partial(zero, stage="3", bf16={"enabled": True}),
}


def resident(key: str) -> int:
    """Return the memory of this process, or the most since it was last cleared, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("bases", ["seed", "stored"])
@pytest.mark.parametrize("engine", MAKE)
def test_save_takes_the_memory_of_some_tensors(engine: str, bases: Any, tmp_path: Path) -> None:
    model: Any = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    randlora.inject(model, r=1, targets="all")
    nbytes = 4 * sum(each.numel() for each in randlora.trainable_parameters(model))
    run = MAKE[engine](model)
    place = tmp_path / (str(dist.get_rank()) if engine == "one process" else "all")
    randlora.save(run, place, bases=bases)  # gathers for the first time, and draws
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # give back what is free, of which the next call would not take more
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = resident("VmRSS")
    randlora.save(run, place, bases=bases)
    share = (resident("VmHWM") - before) / nbytes
    print(f"rank {dist.get_rank()}, {engine}, {bases}: {share:.2f} of an adapter of {nbytes / 2**20:.0f} MiB")  # noqa: T201
    assert share < 0.5  # what gathers need varies

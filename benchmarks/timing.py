"""Times contestants in turn, so that whatever else the machine does hits all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

REPEATS = 9
SETTLING_BYTES = 31 * 2**20


@dataclass(frozen=True)
class Figure:
    """One contestant's result in one case.

    Attributes:
        best: The smallest of the repeats: what the work takes when nothing disturbs it.
        median: The middle one.
        unit: ``s``, ``B``, ``%``, or what is counted.
    """

    best: float
    median: float
    unit: str

    @classmethod
    def of(cls, values: list[float], unit: str) -> "Figure":
        """Sum up some measurements."""
        return cls(min(values), statistics.median(values), unit)


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    *,
    device: str,
    repeats: int = REPEATS,
    calls: int = 1,
    settle: bool = True,
) -> dict[str, Figure]:
    """Time each of some functions, one call after the other, again and again, in every other round the last one first.

    Args:
        runs: What to call, by name.
        device: ``cuda`` is waited for.
        repeats: Rounds that count, after one that does not.
        calls: Calls timed together, for what is too short for a clock.
        settle: Bring the memory allocator into the state that it has in the middle of a training run.
    """
    if settle:
        _settle_allocator()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name in runs if turn % 2 else reversed(list(runs)):
            taken = _seconds(runs[name], device, calls)
            if turn:
                seconds[name].append(taken / calls)
    return {name: Figure.of(values, "s") for name, values in seconds.items()}


def _settle_allocator() -> None:
    """Free one large block, as any batch of a real model does.

    glibc gives memory back to the system, page by page, above a limit that it learns from the largest block it has
    freed, up to 32 MiB. Before that a case's times depend on the cases that came before it.
    """
    torch.zeros(SETTLING_BYTES, dtype=torch.uint8)


def _seconds(run: Callable[[], object], device: str, calls: int) -> float:
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    wait()
    return time.perf_counter() - start

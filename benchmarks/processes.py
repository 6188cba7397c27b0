"""Runs a measurement in a process of its own, whose peak of memory is then its alone."""

import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

Measured = TypeVar("Measured")

KIBIBYTE = 1024
STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """Return the most memory that this process ever held.

    Linux counts what the parent had into a child's ``ru_maxrss``, but not into its own high-water mark.
    """
    if STATUS.is_file():
        facts = dict(line.split(":", 1) for line in STATUS.read_text(encoding="utf-8").splitlines())
        return int(facts["VmHWM"].split()[0]) * KIBIBYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIBIBYTE


def in_own_process(run: Callable[..., Measured], *args: Any) -> Measured:
    """Call a function of some module in a fresh process and return what it measured."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sending, run, args))
    process.start()
    sending.close()
    try:
        found: Measured = receiving.recv()
    finally:
        process.join()
    return found


def _send(sending: Connection, run: Callable[..., object], args: tuple[Any, ...]) -> None:
    sending.send(run(*args))
    sending.close()

"""Runs a measurement in a process of its own, whose peak of memory is then its alone."""

import ctypes
import gc
import multiprocessing
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

Measured = TypeVar("Measured")

KIBIBYTE = 1024
STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """Return the most memory that this process ever held, or since `forget_peak`.

    Linux counts what the parent had into a child's ``ru_maxrss``, but not into its own high-water mark.
    """
    if STATUS.is_file():
        return _status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * KIBIBYTE


def forget_peak() -> None:
    """Let `peak_bytes` count from now on, with what is not in use given back; elsewhere than on Linux do nothing."""
    gc.collect()
    if STATUS.is_file():
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def held_bytes() -> int:
    """Return the memory that this process holds now; where the system does not tell, the most that it ever held."""
    return _status("VmRSS") if STATUS.is_file() else peak_bytes()


def _status(field: str) -> int:
    facts = dict(line.split(":", 1) for line in STATUS.read_text(encoding="utf-8").splitlines())
    return int(facts[field].split()[0]) * KIBIBYTE


def in_own_process(run: Callable[..., Measured], *args: Any) -> Measured:
    """Call a function of some module in a fresh process, with as many threads as here, and return what it measured.

    Raises:
        RuntimeError: Where the process ended without a result; it has printed why.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sending, torch.get_num_threads(), run, args))
    process.start()
    sending.close()
    try:
        found: Measured = receiving.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process of {run.__name__}{args} ended with status {process.exitcode}") from None
    process.join()
    return found


def _send(sending: Connection, threads: int, run: Callable[..., object], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    sending.send(run(*args))
    sending.close()

"""Processes that form a group of torch.distributed with gloo, and run functions together until they are stopped."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, is_hypothesis_test, settings

Result = TypeVar("Result")

CONTEXT = multiprocessing.get_context("forkserver")
"""Processes are forked from one that has imported what they need, which takes each longer than most of its tests."""

SECONDS = 120
WAIT = float(os.environ.get("PATIENCE", SECONDS))  # longer in tests/mutants, where the machine is busy
"""How long a call may take; processes that wait for each other for ever are stopped then."""

LAW = settings(
    max_examples=5,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example has a directory of its own
)
"""Of laws that processes are asked for. Examples are not shrunk, because each one that fails ends the processes."""


class ProcessError(AssertionError):
    """What a function raised in one of the processes, or that they did not come to an end."""


def import_once() -> None:
    modules = (path.stem for path in Path(__file__).parent.glob("test_*.py"))
    CONTEXT.set_forkserver_preload([f"tests.distributed.{name}" for name in modules if name != "test_trainers"])
    multiprocessing.forkserver.ensure_running()


class Processes:
    """A group of processes.

    A function that they run must be importable, and so must the classes of its arguments and results, which are
    pickled. A failure in one of them ends the group, and the next call starts another.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._running: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def run(self, function: Callable[..., Result], *args: Any, seconds: float = WAIT, **kwargs: Any) -> list[Result]:
        """Call a function in every process at once and return what it returned, by rank."""
        self._start()
        call = pickle.dumps((function, args, kwargs))
        for _, connection in self._running:
            connection.send_bytes(call)
        results: list[Any] = []
        problems: list[str] = []
        for rank, (process, connection) in enumerate(self._running):
            if not connection.poll(seconds if not problems else 5):  # the others may wait for the one that failed
                problems.append(f"rank {rank} did not return in {seconds} s")
                continue
            try:
                succeeded, value = pickle.loads(connection.recv_bytes())
            except EOFError:
                process.join(5)
                succeeded, value = False, f"ended with exit code {process.exitcode}"
            results.append(value)
            if not succeeded:
                problems.append(f"rank {rank}: {value}")
        if problems:
            self.stop()
            raise ProcessError("\n".join(problems))
        return results

    def stop(self) -> None:
        for _, connection in self._running:
            connection.close()
        for process, _ in self._running:
            process.join(3)  # which returns its semaphores to the system
            process.kill()
            process.join()
        self._running = []

    def _start(self) -> None:
        if self._running and all(process.is_alive() for process, _ in self._running):
            return
        self.stop()
        meeting = Path(tempfile.mkdtemp()) / "meeting"
        for rank in range(self.count):
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(there, rank, self.count, meeting), daemon=True)
            process.start()
            there.close()
            self._running.append((process, here))


PAIR, ZERO_PAIR, FOUR = Processes(2), Processes(2), Processes(4)
"""The groups that all tests share. DeepSpeed, which replaces functions of torch in a process, has two by itself."""

in_two, in_two_of_zero, in_four = map(pytest.mark.in_group, (PAIR, ZERO_PAIR, FOUR))
"""Mark a test that all processes of a group run, with one of the last two those of DeepSpeed or the four.

A test in two processes that has an ``engine`` whose name begins with ZeRO is run in those of DeepSpeed.
"""


def run_test(module: str, name: str, arguments: dict[str, Any]) -> None:
    function = getattr(importlib.import_module(module), name)
    own = function.hypothesis.inner_test if is_hypothesis_test(function) else function
    own(**arguments)


def on_all(value: Result) -> list[Result]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _serve(calls: Connection, rank: int, count: int, meeting: Path) -> None:
    # a process that waits for one that failed must raise before it is given up
    patience = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count, timeout=patience)
    imported = 0
    while True:
        try:
            call = calls.recv_bytes()
        except EOFError:
            return
        torch.manual_seed(0)
        if len(sys.modules) > imported:
            gc.collect()
            gc.freeze()  # or each of the many calls that look for engines among all objects takes 0.1 s more
            imported = len(sys.modules)
        try:
            function, args, kwargs = pickle.loads(call)  # imports modules, which may fail
            answer = True, function(*args, **kwargs)
        except BaseException:  # it is reported in the other process
            answer = False, traceback.format_exc()
        calls.send_bytes(pickle.dumps(answer))

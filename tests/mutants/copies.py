"""Copies of a tree that may be changed, and children forked from this process that run tests in them."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

IMPORTED = ("torch._dynamo", "torch.distributed.fsdp", "hypothesis", "transformers", "peft", "pytest", "coverage")
TREE = Path(__file__).parents[2]
MEMORY = 16 << 30

Item = TypeVar("Item")
_fork, _forking = multiprocessing.get_context("fork"), threading.Lock()


class Answer(NamedTuple):
    result: Any
    is_late: bool


class Copy:
    """A copy of the last commit of a tree, without its history, and without the fault of a run that was ended."""

    def __init__(self, tree: Path, place: Path) -> None:
        self.root, self.place = place / "tree", place
        self.root.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(["git", "-C", tree, "archive", "HEAD"], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", self.root], check=True, input=archive)

    @contextmanager
    def changed(self, file: str, text: str) -> Iterator[None]:
        """Give a file another text in a block, and another time, so that bytecode of the old one is not used."""
        path = self.root / file
        before, times = path.read_bytes(), path.stat()
        path.write_text(text, encoding="utf-8")
        try:
            yield
        finally:
            path.write_bytes(before)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def call(self, function: Callable[..., Any], *args: Any, wall: int, cpu: int = resource.RLIM_INFINITY) -> Answer:
        """Return what a function returns in a child; end it and all that it started when its time is over."""
        with _forking:  # or another child would hold the ends of this one's pipes
            receiver, sender = _fork.Pipe(duplex=False)
            child = _fork.Process(target=_as_child, args=(self, sender, cpu, function, args))
            child.start()
            sender.close()
        is_here = bool(wait([receiver, child.sentinel], wall))
        try:
            result = receiver.recv() if is_here else None
        except EOFError:  # it ended without one
            result = None
        with suppress(ProcessLookupError):
            os.killpg(child.pid or 0, signal.SIGKILL)
        child.join()
        return Answer(result, not is_here or child.exitcode == -signal.SIGXCPU)


def _as_child(copy: Copy, sender: Connection, cpu: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Call a function in a copy of the tree, with what it prints in a file beside it, and send what it returns."""
    os.setpgid(0, 0)  # a session would be a group of the scheduler too, which does not have this one's priority
    log = os.open(copy.place / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(copy.root)
    sys.path[:] = [str(copy.root), *(entry for entry in sys.path if entry and Path(entry) != TREE)]
    sys.modules["tests"].__path__ = [str(copy.root / "tests")]
    sys.modules["__main__"] = ModuleType("__main__")  # which processes that tests spawn would import
    sys.dont_write_bytecode = cpu != resource.RLIM_INFINITY
    os.environ |= {
        "PYTHONPATH": str(copy.root),
        "PATIENCE": "600",  # of distributed tests, which take longer while they are measured
        "PYTHONDONTWRITEBYTECODE": "1" if sys.dont_write_bytecode else "",
        "TORCHINDUCTOR_CACHE_DIR": str(copy.place / "inductor"),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(copy.place / "hypothesis"),
    }
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    try:
        sender.send(function(copy, *args))
    except BaseException:  # there is nobody else to tell
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()


class Copies:
    def __init__(self, tree: Path, place: Path, count: int) -> None:
        os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
        for name in IMPORTED:
            importlib.import_module(name)
        gc.collect()
        gc.freeze()
        self._count = count
        self._free: SimpleQueue[Copy] = SimpleQueue()
        for number in range(count):
            self._free.put(Copy(tree, place / f"copy-{number}"))

    def each(self, work: Callable[[Copy, Item], None], items: Iterable[Item]) -> None:
        def one(item: Item) -> None:
            free = self._free.get()
            try:
                work(free, item)
            finally:
                self._free.put(free)

        with ThreadPoolExecutor(self._count) as threads:
            for done in [threads.submit(one, item) for item in items]:
                done.result()

"""What a call may use, of the processor, of memory and of the file system, and what it may raise."""

import os
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Never, TypeVar

from randlora.errors import RandLoRAError
from tests.torture.faults import NAMES

Result = TypeVar("Result")


class Violation(BaseException):  # no `except Exception` of the code under test may catch it
    """A promise that was broken."""


def outcome(call: Callable[..., Result], *args: object) -> Result | RandLoRAError:
    """Return the result of a call, or the error of ours that it raised; whatever else it raises goes through."""
    with warnings.catch_warnings(action="ignore"):
        try:
            return call(*args)
        except RandLoRAError as error:
            str(error).encode("utf-8", "backslashreplace")
            return error


@contextmanager
def bounded(seconds: float, mib: int) -> Iterator[None]:
    """Raise a `Violation` if the block takes more time of the processor, its system calls included.

    Refuse it more address space than that beside what the process has.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    previous = signal.signal(signal.SIGPROF, _late)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # what waits for ever is stopped by atheris, or by pytest
    resource.setrlimit(resource.RLIMIT_AS, (held + mib * 2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def _late(*_: object) -> Never:
    raise Violation("it took too long")


WRITES = dict.fromkeys([*NAMES, "chown", "setxattr"], (0,)) | {"rename": (0, 1), "link": (1,), "symlink": (1,)}
"""Calls of `os` that change a file, each with an event of Python's audit, and which of its arguments name the file."""
FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pty.spawn")

_allowed = threading.local()
_hooks: list[object] = []  # which can be added once and never removed


@contextmanager
def writing_only(root: Path) -> Iterator[None]:
    """Refuse whatever the block, in this thread, would write outside of a directory, as a read-only disk does."""
    if not _hooks:
        _hooks.append(_audit)
        sys.addaudithook(_audit)
    _allowed.root = os.path.realpath(root)
    try:
        yield
    finally:
        _allowed.root = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    root = getattr(_allowed, "root", None)
    if root is None:
        return
    if event in FORBIDDEN:
        raise Violation(f"it called {event}{arguments!r:.200}")
    paths = [arguments[place] for place in WRITES.get(event.removeprefix("os."), ())]
    if event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        paths = [arguments[0]]
    for place in (os.fsdecode(path) for path in paths if not isinstance(path, int)):
        parent, name = os.path.split(place.rstrip(os.sep) or os.sep)  # a link itself is what is renamed or removed
        real = os.path.realpath(place) if event == "open" else str(Path(os.path.realpath(parent), name))
        if real != os.devnull and not real.startswith(f"{root}{os.sep}"):
            raise PermissionError(13, "outside of the directory", place)

"""What a call may use: time of the processor, memory, and the part of the file system that it may write to."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Never

PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 2**20
WAITING = 15
"""How much longer than its time of the processor a call may take, as one that waits for a pipe would for ever."""


class Violation(BaseException):  # no `except Exception` of the code under test may catch it
    """A promise that was broken."""


@contextmanager
def bounded(seconds: float, mib: int) -> Iterator[None]:
    """Raise a `Violation` if the block takes more time of the processor, or waits; refuse it more memory than that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * PAGE
    previous = signal.signal(signal.SIGVTALRM, _late)
    # the alarm of the clock itself is atheris's
    waiting = threading.Timer(WAITING * seconds, os.kill, (os.getpid(), signal.SIGVTALRM))
    waiting.start()
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (held + mib * MIB, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        waiting.cancel()
        waiting.join()
        signal.signal(signal.SIGVTALRM, previous)


def _late(_signal: int, _frame: FrameType | None) -> Never:
    raise Violation("it took too long")


WRITES = {
    "os.mkdir": (0,),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.rename": (0, 1),
    "os.link": (1,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "os.chown": (0,),
    "os.utime": (0,),
    "os.setxattr": (0,),
}
"""Events of Python's audit that change a file, and which of their arguments name it."""

FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pty.spawn")

_allowed = threading.local()


@contextmanager
def writing_only(root: Path) -> Iterator[None]:
    """Refuse whatever the block, in this thread, would write outside of a directory, as a read-only disk does."""
    _install()
    _allowed.root = os.path.realpath(root)
    try:
        yield
    finally:
        _allowed.root = None


def _install(installed: list[bool] = []) -> None:  # noqa: B006  # a hook can be added once and never removed
    if not installed:
        installed.append(True)
        sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    root = getattr(_allowed, "root", None)
    if root is None:
        return
    if event in FORBIDDEN:
        raise Violation(f"it called {event}{arguments!r:.200}")
    if event == "open":
        path, _, flags = arguments
        is_write = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        paths = (path,) if is_write and isinstance(path, str | bytes | os.PathLike) else ()
    else:
        paths = tuple(arguments[place] for place in WRITES.get(event, ()))
    for path in paths:
        if isinstance(path, int):
            continue
        place = os.fsdecode(path)
        # a name itself, not what a link of this name leads to, is what is renamed or removed
        real = os.path.realpath(place) if event == "open" else _real_name(place)
        if real != os.devnull and not real.startswith(f"{root}{os.sep}"):
            raise PermissionError(13, "outside of the directory", place)


def _real_name(place: str) -> str:
    parent, name = os.path.split(place.rstrip(os.sep) or os.sep)
    return os.path.join(os.path.realpath(parent), name)  # noqa: PTH118

"""Stopping a process, or failing, at each of the system calls by which files change.

Every such call is intercepted where Python makes it. Those on names raise an audit event (`sys.addaudithook`) in C,
just before the call, whoever makes it. Writing and flushing raise none: `open` is replaced by one whose files count
their writes, and `os.fsync` by a function that counts.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

EVENTS = {
    "os.chmod": "chmod",
    "os.link": "link",
    "os.mkdir": "mkdir",
    "os.remove": "unlink",
    "os.rename": "rename",
    "os.rmdir": "rmdir",
    "os.symlink": "symlink",
    "os.truncate": "truncate",
    "os.utime": "utime",
}
"""Calls that change names or modes, by their audit events. ``open`` is one too if it creates or truncates."""

ERRORS = (errno.ENOSPC, errno.EIO)


class Call(NamedTuple):
    """One call that changes files, with the paths it was given or those that its descriptors stand for."""

    name: str
    paths: tuple[str, ...]


@dataclass
class Faults:
    """Lists the calls of a process that change files, and interferes with one of them.

    ``at`` is the call, counted from 1, before which the process is killed, or which fails with ``error``, a number of
    `errno`. Of a write, half is done before the kill.
    """

    at: int | None = None
    error: int | None = None
    calls: list[Call] = field(default_factory=list)

    def call(self, name: str, *paths: str, half: Callable[[], object] = lambda: None) -> None:
        """List one call, and interfere if it is the one."""
        self.calls.append(Call(name, paths))
        if len(self.calls) != self.at:
            return
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        half()
        os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Intercept calls for the rest of the life of this process."""
        fsync, real_open = os.fsync, io.open

        def counted_fsync(descriptor: Any) -> None:
            self.call("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink()))
            fsync(descriptor)

        def counted_open(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
            if not set(mode) & set("wxa+"):
                return real_open(file, mode, buffering, *args, **options)
            raw = _Counted(os.fspath(file), mode.replace("b", "").replace("t", ""), self)
            if "b" in mode:
                return raw if buffering == 0 else io.BufferedWriter(raw)
            return io.TextIOWrapper(io.BufferedWriter(raw), *args, **options)

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            paths = [os.fspath(argument) for argument in arguments if isinstance(argument, str | os.PathLike)]
            if event in EVENTS:
                self.call(EVENTS[event], *map(str, paths))
            elif event == "open" and (arguments[2] or 0) & (os.O_CREAT | os.O_TRUNC):
                self.call("open", *map(str, paths[:1]))

        sys.dont_write_bytecode = True
        os.fsync = counted_fsync  # type: ignore[assignment]
        io.open = builtins.open = counted_open  # the first is what pathlib calls
        sys.addaudithook(audit)


class _Counted(io.FileIO):
    def __init__(self, path: str, mode: str, faults: Faults) -> None:
        super().__init__(path, mode)
        self._path, self._faults = path, faults

    def write(self, data: Any) -> int:
        view, write = memoryview(data).cast("B"), super().write
        self._faults.call("write", self._path, half=lambda: write(view[: len(view) // 2]))
        return write(view)


@dataclass(frozen=True)
class Outcome:
    """How a process ended: killed, or what it raised, if anything; and its calls, unless it was killed.

    ``raised`` is ``"OSError"`` for the error that was asked for, else a traceback.
    """

    was_killed: bool
    raised: str = ""
    calls: tuple[Call, ...] = ()


def in_child(action: Callable[[], object], at: int | None = None, error: int | None = None) -> Outcome:
    """Run an action in a forked process, with a fault at one of its calls."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        faults, raised = Faults(at, error), ""
        try:
            faults.install()
            action()
        except BaseException as failure:
            is_expected = isinstance(failure, OSError) and failure.errno == error
            raised = "OSError" if is_expected else "".join(traceback.format_exception(failure))
        os.write(writing, json.dumps([raised, faults.calls]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return Outcome(was_killed=True)
    raised, calls = json.loads(text)
    return Outcome(was_killed=False, raised=raised, calls=tuple(Call(name, tuple(paths)) for name, paths in calls))


@contextmanager
def fast_disk() -> Iterator[Path]:
    """Yield a new directory, in memory where there is such a file system, where flushing takes no time."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as directory:
        yield Path(directory).resolve()


def places(directory: Path) -> dict[str, bytes | None]:
    """Return all that is in a directory at any depth: the bytes of files, ``None`` for directories."""
    return {
        os.fspath(path.relative_to(directory)): None if path.is_dir() else path.read_bytes()
        for path in sorted(directory.rglob("*"))
    }

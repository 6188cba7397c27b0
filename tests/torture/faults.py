"""Stopping a process, or failing, at each of the system calls by which files change, seen where Python makes them."""

import builtins
import errno
import io
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

NAMES = {"chmod", "link", "mkdir", "remove", "rename", "rmdir", "symlink", "truncate", "utime"}
"""Calls of `os` that change names or modes, each with an audit event. `open` is one too if it creates or truncates."""

ERRORS = (errno.ENOSPC, errno.EIO)
FORK = multiprocessing.get_context("fork")


class Call(NamedTuple):
    name: str
    paths: tuple[str, ...]


class Outcome(NamedTuple):
    was_killed: bool
    raised: str = ""
    calls: tuple[Call, ...] = ()


class _Counted(io.FileIO):
    """A file that reports each write, with a function that does half of it, before it writes."""

    def __init__(self, path: str, mode: str, called: Callable[..., None]) -> None:
        super().__init__(path, mode)
        self._path, self._called = path, called

    def write(self, data: Any) -> int:
        view, write = memoryview(data).cast("B"), super().write
        self._called("write", self._path, half=lambda: write(view[: len(view) // 2]))
        return write(view)


def _intercept(called: Callable[..., None]) -> None:
    """Report calls before they are made, for the rest of the life of this process."""
    fsync, real_open = os.fsync, io.open

    def counted_fsync(descriptor: Any) -> None:
        called("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def counted_open(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
        if not {*mode} & {*"wxa+"}:
            return real_open(file, mode, buffering, *args, **options)
        raw = _Counted(os.fspath(file), mode.replace("b", "").replace("t", ""), called)
        if "b" in mode:
            return raw if buffering == 0 else io.BufferedWriter(raw)
        return io.TextIOWrapper(io.BufferedWriter(raw), *args, **options)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        paths = [str(os.fspath(argument)) for argument in arguments if isinstance(argument, str | os.PathLike)]
        if (name := event.removeprefix("os.")) in NAMES:
            called(name.replace("remove", "unlink"), *paths)
        elif event == "open" and (arguments[2] or 0) & (os.O_CREAT | os.O_TRUNC):
            called("open", *paths[:1])

    sys.dont_write_bytecode = True
    os.fsync = counted_fsync  # type: ignore[assignment]
    io.open = builtins.open = counted_open  # the first is what pathlib calls
    sys.addaudithook(audit)


def _act(action: Callable[[], object], at: int | None, error: int | None, sending: Connection) -> None:
    calls, raised = list[Call](), ""

    def called(name: str, *paths: str, half: Callable[[], object] = lambda: None) -> None:
        calls.append(Call(name, paths))
        if len(calls) == at and error is not None:
            raise OSError(error, os.strerror(error), *paths[:1])  # as the system does
        if len(calls) == at:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        _intercept(called)
        action()
    except BaseException as failure:
        is_expected = isinstance(failure, OSError) and failure.errno == error
        is_expected &= "unfinished" not in str(getattr(failure, "filename", None) or "unfinished")
        raised = "OSError" if is_expected else "".join(traceback.format_exception(failure))
    sending.send(Outcome(was_killed=False, raised=raised, calls=tuple(calls)))
    os._exit(0)


def in_child(action: Callable[[], object], at: int | None = None, error: int | None = None) -> Outcome:
    receiving, sending = FORK.Pipe(duplex=False)
    child = FORK.Process(target=_act, args=(action, at, error, sending))
    child.start()
    sending.close()
    with receiving:
        try:
            outcome: Outcome = receiving.recv()
        except EOFError:
            outcome = Outcome(was_killed=True)
    child.join()
    return outcome


@contextmanager
def fast_disk() -> Iterator[Path]:
    """Yield a new directory, in memory where there is such a file system, where flushing takes no time."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as directory:
        yield Path(directory).resolve()


def places(directory: Path) -> dict[str, bytes | None]:
    return {
        os.fspath(path.relative_to(directory)): None if path.is_dir() else path.read_bytes()
        for path in sorted(directory.rglob("*"))
    }

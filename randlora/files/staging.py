"""A directory that appears under its name when it is complete, or not at all."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from randlora.checkpoint.write import flush
from randlora.errors import CheckpointError


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Give a block a directory beside ``out`` to write into, and rename it when the block ends well.

    Whoever fills it flushes its files. When the block raises, what it wrote is removed. When the process is killed, it
    stays under its hidden name, and the next call removes it.

    Args:
        out: The directory to make; nothing may have that name.

    Raises:
        CheckpointError: When another process is writing this directory.
        OSError: When the disk refuses.
    """
    new_parents = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{out.name}.unfinished")
    lock = _claim(scratch)
    try:
        yield scratch
        flush(scratch)
        scratch.rename(out)
        flush(out.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):  # somebody else may have put something there meanwhile
                parent.rmdir()
        raise
    finally:
        _close(lock)


def _claim(scratch: Path) -> int | None:
    """Take the directory, made now or left by a killed process; it is whose lock holds what stands at its name."""
    while True:
        scratch.mkdir(exist_ok=True)
        lock = _lock(scratch)
        if lock is None or _stands_at(scratch, lock):
            _empty(scratch)
            return lock
        os.close(lock)  # another process had it, and removed or renamed it before it could be locked here


def _lock(directory: Path) -> int | None:
    """Hold a directory while this process lives; where the system has no such locks, hold nothing."""
    if sys.platform == "win32":
        return None
    import fcntl  # noqa: PLC0415 (Windows has none)

    lock = os.open(directory, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise CheckpointError(f"{directory} is being written by another process: wait for it") from error
    return lock


def _stands_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _close(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)

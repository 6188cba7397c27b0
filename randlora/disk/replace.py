"""Files and directories that appear complete or not at all.

They are written under a hidden name on the same file system, flushed to disk and renamed. What a killed process leaves
under such a name is removed by the next call for the same directory.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

Writer = Callable[[Path], object]
"""Writes a whole file to the path it is given."""


def write_files(directory: Path, writers: Mapping[str, Writer]) -> int:
    """Write files of a directory, all or none, and return their total size in bytes. Its other files remain.

    A directory that does not exist is created with its files. If the disk refuses, nothing changes.
    """
    if directory.exists():
        with scratch_directory(directory, directory.name) as scratch:
            new, old = scratch / "new", scratch / "old"
            new.mkdir()
            old.mkdir()
            _write_all(new, writers)
            _move_all(writers, new, directory, old)
        flush(directory)
    else:
        with new_directory(directory) as new:
            _write_all(new, writers)
    return sum((directory / name).stat().st_size for name in writers)


def _write_all(directory: Path, writers: Mapping[str, Writer]) -> None:
    for name, writer in writers.items():
        path = directory / name
        path.touch()
        mode = path.stat().st_mode  # of any new file here; a writer may create one that fewer people may read
        writer(path)
        path.chmod(mode)
        flush(path)


def _move_all(names: Iterable[str], new: Path, directory: Path, old: Path) -> None:
    """Move every file into the directory or, if a move fails, none; ``old`` keeps those that were there."""
    for name in names:
        if (directory / name).exists():
            try:
                (old / name).hardlink_to(directory / name)
            except OSError:  # a file system without links
                shutil.copy2(directory / name, old / name)
    moved: list[str] = []
    try:
        for name in names:
            (new / name).replace(directory / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            (old / name).replace(directory / name) if (old / name).exists() else (directory / name).unlink()
        raise


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a directory to write into, which is renamed to ``out`` at the end of the block, or removed if it raises.

    ``out`` must not exist; its parents are created. The block flushes its files.
    """
    new_parents = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with scratch_directory(out.parent, out.name) as scratch:
            new = scratch / "new"
            new.mkdir()  # with the permissions of any new directory
            yield new
            flush(new)
            new.rename(out)
        flush(out.parent)
    except BaseException:
        for parent in new_parents:
            with suppress(OSError):  # another process may have written something there
                parent.rmdir()
        raise


@contextmanager
def scratch_directory(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new hidden directory in ``parent``, which is removed at the end of the block.

    Its name contains ``name``, which tells what it is for. Those for the same name that no process uses are removed.
    """
    prefix = f".{name}.unfinished-"
    guard = _lock(parent, wait=True)  # so that no other process removes the directory before it is locked
    try:
        if guard is not None:
            _remove_abandoned(parent, prefix)
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = _lock(scratch)
    finally:
        _unlock(guard)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        _unlock(lock)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for path in parent.glob(f"{glob.escape(prefix)}*"):
        lock = _lock(path)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            _unlock(lock)


def _lock(directory: Path, *, wait: bool = False) -> int | None:
    """Lock a directory until `_unlock` or the end of this process; return ``None`` if it is locked or cannot be."""
    if sys.platform == "win32":
        return None
    descriptor = None
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        _unlock(descriptor)
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def flush(path: Path) -> None:
    """Flush a file, or a directory's list of files, to disk."""
    if os.name != "posix" and path.is_dir():
        return  # only POSIX opens a directory
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

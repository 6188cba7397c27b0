"""Files and directories that appear complete or not at all.

They are written under a hidden name on the same file system, flushed to disk and renamed. What a killed process leaves
under such a name is removed by the next call for the same directory. Files of a directory that exists are renamed one
after the other: a process that is killed in between leaves some of the old and some of the new ones.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

PATIENCE = 10.0  # seconds to wait for another process, which holds locks for milliseconds

Writer = Callable[[Path], object]
"""Writes a whole file to the path it is given."""


def write_files(directory: Path, writers: Mapping[str, Writer]) -> int:
    """Write files of a directory, all or none, and return their total size in bytes. Its other files remain.

    A directory that does not exist is created with its files. If the disk refuses, nothing changes.
    """
    is_created = False
    if not directory.exists():
        with suppress(FileExistsError):  # another process created it meanwhile
            with new_directory(directory) as new:
                _write_all(new, writers)
            is_created = True
    if not is_created:
        with scratch_directory(directory, directory.name) as scratch:
            new, old = scratch / "new", scratch / "old"
            new.mkdir()
            old.mkdir()
            _write_all(new, writers)
            with _locked(directory, seconds=PATIENCE):  # so that no files of another call get between these
                _move_all(writers, new, directory, old)
        flush(directory)
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
            try:
                new.rename(out)
            except OSError as error:
                if os.path.lexists(out):
                    raise FileExistsError(errno.EEXIST, "another process created it meanwhile", str(out)) from error
                raise
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
    with ExitStack() as held:
        with _locked(parent, seconds=PATIENCE) as is_locked:  # so that none is removed before it is locked
            if is_locked:
                _remove_abandoned(parent, prefix)
            scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            held.enter_context(_locked(scratch))
            held.callback(shutil.rmtree, scratch, ignore_errors=True)
        yield scratch


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for path in parent.glob(f"{glob.escape(prefix)}*"):
        if not path.is_symlink():
            with _locked(path) as is_abandoned:
                if is_abandoned:
                    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(directory: Path, *, seconds: float = 0) -> Iterator[bool]:
    """Lock a directory during the block, if it can be locked within some seconds; yield whether it is."""
    if sys.platform == "win32":
        yield False
        return
    with ExitStack() as held:
        is_locked, end = False, time.monotonic() + seconds
        with suppress(OSError):  # a directory may be unreadable, and a file system without locks
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            held.callback(os.close, descriptor)
            while not is_locked:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    is_locked = True
                    held.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)  # a forked process may keep the file open
                except BlockingIOError:
                    if time.monotonic() >= end:
                        break
                    time.sleep(0.01)
        yield is_locked


def flush(path: Path) -> None:
    """Flush a file, or a directory's list of files, to disk."""
    if os.name != "posix" and path.is_dir():
        return  # only POSIX opens a directory
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files that appear whole or not at all, whenever the machine stops.

They are written into a hidden directory on the same disk, flushed, and renamed to their names one by one. The first
*decides*: it tells a reader everything, and the others are copies of parts of it, for other programs. If it does not
tell everything, a second file that readers need is removed before and appears after it.

A killed process leaves its hidden directory and the first few of the renames. The next call for the same name does all
of them again and removes the hidden directory: a lock, which the system releases, tells that it is abandoned. A power
failure may lose whatever was not flushed, in any combination. So each file is flushed before its rename, the directory
after each and before the next, and each new directory into its parent.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

if sys.platform != "win32":
    import fcntl

PATIENCE = 10.0  # seconds to wait for another process, which holds locks for milliseconds

NEW, OLD = "new", "old"  # the only entries of a hidden directory: what is written, and what it replaces
RANDOM = 8  # characters at the end of a name of `tempfile.mkdtemp`
LONGEST = 100  # bytes of a name that are in the name of its hidden directory, for file systems that allow 143 in all

UNFLUSHABLE = (errno.EINVAL, errno.ENOTSUP)  # file systems on a network that flush no directories


class Files(NamedTuple):
    """Files to write into a directory, which is created if it does not exist and keeps its other files."""

    directory: Path
    writers: Mapping[str, Callable[[Path], object]]  # by name, what writes to a path, or begins to; the first decides
    withdrawn: str | None = None  # without which readers ignore the others, if the first does not tell everything


def write_files(*each: Files) -> list[int]:
    """Write files into directories, as `staged_files` does, and return the total size in bytes for each directory."""
    with staged_files(*each) as sizes:
        pass
    return sizes


@contextmanager
def staged_files(*each: Files) -> Iterator[list[int]]:
    """Call the writers of files, which appear when all are complete at the end of the block, or not if it raises.

    A file that its writer has begun may be written within the block. The list yielded has the sizes after the block.
    If the disk refuses a rename, completed directories remain, and the others are as they were.
    """
    with ExitStack() as held:
        scratches = [held.enter_context(scratch_for(files.directory)) for files in each]
        for files, scratch in zip(each, scratches, strict=True):
            (scratch / NEW).mkdir()
            for name, write in files.writers.items():
                write(scratch / NEW / name)
        sizes: list[int] = []
        yield sizes
        for files, scratch in zip(each, scratches, strict=True):
            sizes.append(sum(_complete(scratch / NEW / name, files.directory / name) for name in files.writers))
        for files, scratch in zip(each, scratches, strict=True):
            _reveal(files, scratch)


def _complete(path: Path, replaced: Path) -> int:
    """Flush a new file, with the permissions of the file that it replaces, and return its size."""
    with suppress(FileNotFoundError):  # what was private stays private
        shutil.copymode(replaced, path)
    flush(path)
    return path.stat().st_size


def _reveal(files: Files, scratch: Path) -> None:
    """Move every file out of a hidden directory to its place or, if a step fails, none."""
    directory, old = scratch.parent, scratch / OLD
    old.mkdir()
    with _locked(directory, seconds=PATIENCE):  # so that no files of another call get between these
        present = [name for name in files.writers if (directory / name).exists()]
        for name in present:
            try:
                (old / name).hardlink_to(directory / name)
            except OSError:  # a file system without links
                shutil.copy2(directory / name, old / name)
        try:
            if files.withdrawn in present:
                (directory / files.withdrawn).unlink(missing_ok=True)
                flush(directory)
            for name in files.writers:
                (scratch / NEW / name).replace(directory / name)
                flush(directory)
        except BaseException:
            if files.withdrawn is not None:
                (directory / files.withdrawn).unlink(missing_ok=True)
            for name in files.writers:
                if name in present:
                    (old / name).replace(directory / name)
                else:
                    (directory / name).unlink(missing_ok=True)
            flush(directory)
            raise


@contextmanager
def new_directory(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a directory to write into, which is renamed to ``out`` at the end of the block, or removed if it raises.

    A process that is killed after it moved the old directory away leaves none; the next call moves the old one back.
    """
    with scratch_for(out, is_inside=False) as scratch:
        out, new = Path(os.path.realpath(out)), scratch / NEW
        if not overwrite and out.is_dir() and not is_free(out):  # now, not after all is written
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(out))
        new.mkdir()  # with the permissions of any new directory
        yield new
        for path in (*new.rglob("*"), new):
            flush(path)
        with ExitStack() as undo:
            if overwrite and out.is_dir():
                out.rename(scratch / OLD)
                undo.callback((scratch / OLD).rename, out)
            new.rename(out)
            undo.callback(out.rename, new)
            flush(out.parent)
            undo.pop_all()


@contextmanager
def scratch_for(directory: Path, *, is_inside: bool = True) -> Iterator[Path]:
    """Yield a new hidden directory inside of a directory, or beside it, and remove it after the block.

    The directory that contains it is created, with its parents, and these are removed if the block raises. Whatever a
    killed process left there is removed, which is why a hidden directory may contain only `NEW` and `OLD`.
    """
    for path in (directory, *directory.parents):
        if path.name == "..":  # which leads out of a directory that exists, as for those who read there
            path.stat()
    real = Path(os.path.realpath(directory))  # unlike Path.resolve, of links in a circle too
    place, name = real if is_inside else real.parent, real.name
    with _naming(directory, _prefix(name)), ExitStack() as undo:
        for missing in reversed([each for each in (place, *place.parents) if not each.exists()]):
            undo.callback(_remove_if_empty, missing)
            missing.mkdir(exist_ok=True)
            flush(missing.parent)
        with ExitStack() as held:
            with _locked(place, seconds=PATIENCE) as is_locked:  # so that none is removed before it is locked
                if is_locked:
                    _remove_abandoned(place, name, is_whole=not is_inside)
                scratch = Path(tempfile.mkdtemp(prefix=_prefix(name), dir=place))
                held.callback(shutil.rmtree, scratch, ignore_errors=True)
                held.enter_context(_locked(scratch))
            yield scratch
        undo.pop_all()


def is_free(directory: Path) -> bool:
    """Whether a directory contains nothing but what a killed process left there."""
    left = _prefix(Path(os.path.realpath(directory)).name)
    return all(path.name.startswith(left) for path in directory.iterdir())


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):  # another process may have written something there
        directory.rmdir()


@contextmanager
def _naming(directory: Path, prefix: str) -> Iterator[None]:
    """Have errors of the disk name a directory, if they would name what is hidden in or beside it, or nothing."""
    try:
        yield
    except OSError as error:
        named = [str(each) for each in (error.filename, error.filename2) if each is not None]
        if error.errno is None or (named and not any(prefix in each for each in named)):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(directory)) from error


def _prefix(name: str) -> str:
    """Return how the names of hidden directories begin, which tells what they are for."""
    whole = os.fsencode(name)
    if len(whole) > LONGEST:  # cut, where a character may have several bytes, but not to the name of a different one
        name = f"{whole[:LONGEST].decode(errors='ignore')}~{hashlib.sha256(whole).hexdigest()[:16]}"
    return f".{name}.unfinished-"


def _remove_abandoned(place: Path, name: str, *, is_whole: bool) -> None:
    """Remove hidden directories of killed processes; a whole directory that was moved there comes back first."""
    for path in place.glob(f"{glob.escape(_prefix(name))}{'?' * RANDOM}"):
        if not path.is_symlink():
            with suppress(OSError), _locked(path) as is_abandoned:  # its own process may be removing it
                if is_abandoned and {held.name for held in path.iterdir()} <= {NEW, OLD}:  # else it is of somebody else
                    if is_whole and (path / OLD).exists() and not os.path.lexists(place / name):
                        (path / OLD).rename(place / name)
                        flush(place)
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
    except OSError as error:
        if error.errno not in UNFLUSHABLE or not path.is_dir():
            error.filename = os.fspath(path)  # of which a descriptor tells nothing
            raise
    finally:
        os.close(descriptor)

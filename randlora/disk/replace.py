"""Files and directories that appear complete or not at all.

Everything is first written to a hidden directory on the same disk. What then makes it visible is

- for a directory that does not exist, one rename of the whole directory;
- for files of a directory that exists, one rename for each. The first of them is that of the file that *decides*: what
  it holds tells a reader everything, and the other files are copies of parts of it, for other programs. So the rename
  of one file is the step from the old contents to the new ones. A copy that would be taken at its word beside the wrong
  file is *withdrawn*: it is removed before that rename and appears after it, so that nobody finds it beside a file of
  another call.

A process that is killed leaves its hidden directory and, of the visible steps, the first few. The next call for the
same name takes all of them and removes the hidden directory: a lock, which the system releases when a process ends,
tells that it is abandoned.

**After a power failure** a file system may have forgotten whatever was not flushed, in any combination: the bytes of a
file, its name, a rename but not the one before it. So

- each file is flushed before its rename. A name that survives is never that of an empty or a partial file;
- the directory is flushed after each visible step and before the next one. The steps that survive are the first few, as
  after a kill, and before a call returns all of them are on disk;
- a new directory is flushed before its rename, which gives it its files, and its parent after it. Each parent that had
  to be created is flushed into its own before anything is put into it.

A rename itself is atomic in POSIX, and in what a journal replays. On a disk that reports writes as flushed which are
not, nothing of this holds.
"""

from __future__ import annotations

import errno
import filecmp
import glob
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

if sys.platform != "win32":
    import fcntl

PATIENCE = 10.0  # seconds to wait for another process, which holds locks for milliseconds

NEW, OLD = "new", "old"
"""What there may be in a hidden directory: what is written, and what it replaces."""
RANDOM = 8  # characters at the end of a name of `tempfile.mkdtemp`

UNFLUSHABLE = (errno.EINVAL, errno.ENOTSUP)  # file systems on a network that flush no directories

Writer = Callable[[Path], object]
"""Writes a whole file to the path it is given."""


class Files(NamedTuple):
    """Files to write into a directory.

    Attributes:
        directory: The directory, created with its files if it does not exist. Its other files remain.
        writers: What writes each, by name. The first of the files decides.
        withdrawn: Those that are never seen beside one of another call, unless they are equal in both.
    """

    directory: Path
    writers: Mapping[str, Writer]
    withdrawn: Container[str] = ()


def write_files(directory: Path, writers: Mapping[str, Writer], withdrawn: Container[str] = ()) -> int:
    """Write files of a directory, all or none, and return their total size in bytes; see `Files`.

    If the disk refuses, nothing changes.
    """
    (size,) = write_directories([Files(directory, writers, withdrawn)])
    return size


def write_directories(each: Iterable[Files]) -> list[int]:
    """Write files of several directories, and return the total size in bytes of those of each.

    All are whole on disk before the first is seen. If the disk refuses until then, nothing changes; if it refuses a
    rename later, those directories that are complete remain.
    """
    with ExitStack() as held:
        staged = [(files, held.enter_context(_staged(files))) for files in each]
        return [_reveal(files, scratch) for files, scratch in staged]


@contextmanager
def _staged(files: Files) -> Iterator[Path]:
    """Write files into a hidden directory, and yield that."""
    directory = files.directory.resolve()
    with scratch_for(directory) as scratch:
        new = scratch / NEW
        new.mkdir()  # with the permissions of any new directory
        for name, writer in files.writers.items():
            _write(new / name, writer, like=directory / name)
        yield scratch


def _reveal(files: Files, scratch: Path) -> int:
    """Move files out of a hidden directory, and return their total size in bytes."""
    directory, new, old = files.directory.resolve(), scratch / NEW, scratch / OLD
    size = sum((new / name).stat().st_size for name in files.writers)  # later another process may be replacing them
    is_created = False
    if not directory.exists():
        with suppress(FileExistsError):  # another process created it meanwhile
            _publish(new, directory)
            is_created = True
    if not is_created:
        old.mkdir()
        with _locked(directory, seconds=PATIENCE):  # so that no files of another call get between these
            _replace(list(files.writers), files.withdrawn, new, directory, old)
    return size


def _write(path: Path, writer: Writer, like: Path) -> None:
    """Write a file that those may read who may read the one that it replaces, or if there is none, any new file."""
    path.touch()
    mode = path.stat().st_mode  # a writer may create a file that fewer people may read
    with suppress(FileNotFoundError):
        mode = like.stat().st_mode
    writer(path)
    path.chmod(stat.S_IMODE(mode))
    flush(path)


def _replace(names: Sequence[str], withdrawn: Container[str], new: Path, directory: Path, old: Path) -> None:
    """Move every file into the directory or, if a step fails, none, going back step by step."""
    present = [name for name in names if (directory / name).exists()]
    for name in present:
        try:
            (old / name).hardlink_to(directory / name)
        except OSError:  # a file system without links
            shutil.copy2(directory / name, old / name)
    changing = [
        name for name in present if name in withdrawn and not filecmp.cmp(new / name, directory / name, shallow=False)
    ]
    with ExitStack() as undo:
        undo.callback(flush, directory)
        for name in changing:
            undo.callback((old / name).replace, directory / name)
            (directory / name).unlink()
            flush(directory)
        for name in names:
            if name in present and name not in changing:
                undo.callback((old / name).replace, directory / name)
            else:
                undo.callback(partial((directory / name).unlink, missing_ok=True))
            (new / name).replace(directory / name)
            flush(directory)
        undo.pop_all()


def _publish(new: Path, out: Path) -> None:
    """Rename a directory that is complete; a `FileExistsError` if something has that name meanwhile."""
    flush(new)
    try:
        new.rename(out)
    except OSError as error:
        if os.path.lexists(out):
            raise FileExistsError(errno.EEXIST, "another process created it meanwhile", str(out)) from error
        raise
    try:
        flush(out.parent)
    except BaseException:
        out.rename(new)
        raise


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a directory to write into, which is renamed to ``out`` at the end of the block, or removed if it raises.

    ``out`` must not exist; its parents are created. The block flushes its files.
    """
    out = out.resolve()
    with scratch_for(out) as scratch:
        new = scratch / NEW
        new.mkdir()
        yield new
        _publish(new, out)


@contextmanager
def scratch_for(directory: Path) -> Iterator[Path]:
    """Yield a new hidden directory on the disk of a directory, which need not exist, and remove it after the block.

    It is in the directory, or beside it if it does not exist; then its parents are created, and removed if the block
    raises. Those that a killed process left in either place are removed: that is why nothing may be in it but `NEW` and
    `OLD`. The path must be resolved.
    """
    parent, name = directory.parent, directory.name
    with ExitStack() as undo:
        if directory.is_dir():
            with _locked(parent, seconds=PATIENCE) as is_locked:
                if is_locked:
                    _remove_abandoned(parent, name)
            parent = directory
        for missing in reversed([parent for parent in directory.parents if not parent.exists()]):
            undo.callback(_remove_if_empty, missing)
            missing.mkdir(exist_ok=True)
            flush(missing.parent)
        with _scratch_in(parent, name) as scratch:
            yield scratch
        undo.pop_all()


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):  # another process may have written something there
        directory.rmdir()


@contextmanager
def _scratch_in(parent: Path, name: str) -> Iterator[Path]:
    with ExitStack() as held:
        with _locked(parent, seconds=PATIENCE) as is_locked:  # so that none is removed before it is locked
            if is_locked:
                _remove_abandoned(parent, name)
            scratch = Path(tempfile.mkdtemp(prefix=_prefix(name), dir=parent))
            held.callback(shutil.rmtree, scratch, ignore_errors=True)
            held.enter_context(_locked(scratch))
        yield scratch


def _prefix(name: str) -> str:
    """Return how the names of hidden directories begin, which tells what they are for."""
    return f".{name}.unfinished-"


def _remove_abandoned(parent: Path, name: str) -> None:
    for path in parent.glob(f"{glob.escape(_prefix(name))}{'?' * RANDOM}"):
        if not path.is_symlink():
            with suppress(OSError), _locked(path) as is_abandoned:  # its own process may be removing it
                if is_abandoned and {held.name for held in path.iterdir()} <= {NEW, OLD}:  # else it is of somebody else
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
            raise
    finally:
        os.close(descriptor)

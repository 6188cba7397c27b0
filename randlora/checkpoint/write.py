"""Writing files so that a save which fails or is killed leaves the old ones whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from randlora.errors import CheckpointError

Writer = Callable[[Path], object]


def write_together(directory: Path, writers: Mapping[str, Writer]) -> None:
    """Write some files of a directory beside it, flush them to disk, then move them in.

    Args:
        directory: Where; it is made if it is missing.
        writers: By file name, what writes the whole file to the path it is given.

    Raises:
        OSError: When the disk refuses; whatever was there before is there again.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        old.mkdir()
        for name, writer in writers.items():
            _write(new / name, writer)
        _move_all(writers, new, directory, old)
    flush(directory)


def write_output(directory: Path, writers: Mapping[str, Writer], *, overwrite: bool = False) -> None:
    """Write the files of a directory that is not there yet, which appears with all of them in it or not at all.

    Args:
        directory: Where; an empty directory counts as not there.
        writers: As for `write_together`.
        overwrite: Write into a directory that is there, as `write_together` does.

    Raises:
        CheckpointError: When there is something already and ``overwrite`` is false, or a file is in the way.
        OSError: When the disk refuses; then nothing has appeared.
    """
    check_output(directory, overwrite=overwrite)
    if directory.exists():
        write_together(directory, writers)
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        whole = Path(scratch, directory.name)
        write_together(whole, writers)
        whole.rename(directory)
    _flush(directory.parent)


def check_output(directory: Path, *, overwrite: bool = False) -> None:
    """Refuse to write where something is, before any work is done.

    Raises:
        CheckpointError: When there is something already and ``overwrite`` is false, or a file is in the way.
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file: expected the name of a directory to write to")
    if not overwrite and directory.is_dir() and any(directory.iterdir()):
        raise CheckpointError(f"{directory} exists and is not empty: choose another name, or ask for overwriting")


def _write(path: Path, writer: Writer) -> None:
    path.touch()
    mode = path.stat().st_mode  # what any new file has here; a writer may make a file of its own that is less readable
    writer(path)
    path.chmod(mode)
    flush(path)


def _move_all(names: Iterable[str], new: Path, directory: Path, old: Path) -> None:
    """Move every file into the directory or, where one move fails, none; ``old`` keeps those that were there."""
    for name in names:
        if (directory / name).exists():
            _keep(directory / name, old / name)
    moved: list[str] = []
    try:
        for name in names:
            (new / name).replace(directory / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            (old / name).replace(directory / name) if (old / name).exists() else (directory / name).unlink()
        raise


def _keep(path: Path, second: Path) -> None:
    """Give a file a second name, or copy it where the file system has no links."""
    try:
        second.hardlink_to(path)
    except OSError:
        shutil.copy2(path, second)


def flush(path: Path) -> None:
    """Make sure that a file, or the list of a directory's files, is on the disk."""
    if os.name != "posix" and path.is_dir():
        return  # only POSIX opens a directory
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Writing files so that a save which fails or is killed leaves the old ones whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

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

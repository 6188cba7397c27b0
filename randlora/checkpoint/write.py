"""Writing files so that a save which fails or is killed leaves the old ones whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

Writer = Callable[[Path], object]


def write_together(directory: Path, writers: Mapping[str, Writer]) -> None:
    """Write some files of a directory under temporary names, flush them to disk, then give them their names.

    Args:
        directory: Where; it is made if it is missing.
        writers: By file name, what writes the whole file to the path it is given.

    Raises:
        OSError: When the disk refuses; whatever was there before is there again.
    """
    directory.mkdir(parents=True, exist_ok=True)
    temporary: dict[str, Path] = {}
    try:
        for name, writer in writers.items():
            temporary[name] = _reserve(directory, name)
            writer(temporary[name])
            _flush(temporary[name])
        _rename_all(directory, temporary)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    _flush(directory)


def _rename_all(directory: Path, temporary: Mapping[str, Path]) -> None:
    """Rename every file or, where one rename fails, none."""
    kept = {name: _keep(directory / name) for name in temporary if (directory / name).exists()}
    renamed: list[str] = []
    try:
        for name, path in temporary.items():
            path.replace(directory / name)
            renamed.append(name)
    except BaseException:
        for name in renamed:
            kept[name].replace(directory / name) if name in kept else (directory / name).unlink()
        raise
    finally:
        for path in kept.values():
            path.unlink(missing_ok=True)


def _keep(path: Path) -> Path:
    """Give a file a second, temporary name; copy it where the file system has no links."""
    second = _reserve(path.parent, path.name)
    second.unlink()
    try:
        second.hardlink_to(path)
    except OSError:
        shutil.copy2(path, second)
    return second


def _reserve(directory: Path, name: str) -> Path:
    descriptor, path = tempfile.mkstemp(prefix=f".{name}.", dir=directory)
    os.close(descriptor)
    umask = os.umask(0)
    os.umask(umask)
    Path(path).chmod(0o666 & ~umask)  # mkstemp keeps a file to its owner
    return Path(path)


def _flush(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return  # only POSIX opens a directory
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

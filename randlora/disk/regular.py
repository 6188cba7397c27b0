"""Regular files, and nothing else, opened without waiting: a pipe may have no writer, and a device no end."""

from __future__ import annotations

import os
import stat
from io import FileIO
from pathlib import Path

from randlora.errors import CheckpointError

FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)

KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: Path) -> FileIO:
    """Open a regular file, or a link to one, to read it without a buffer.

    Raises:
        CheckpointError: If it is a pipe, a device, a directory or a socket.
        OSError: If it cannot be opened.
    """
    require_regular(path)  # before it is opened, which a device may act upon
    file = FileIO(os.open(path, FLAGS))
    try:
        _require_regular(path, os.fstat(file.fileno()))  # another may have its name by now
    except CheckpointError:
        file.close()
        raise
    return file


def read_regular(path: Path, most: int) -> bytes:
    """Return the contents of a regular file of at most ``most`` bytes; errors are as of `open_regular`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise CheckpointError(f"{path} has {size:,} bytes, expected at most {most:,}: it is another file")
        return file.read(size)


def is_there(path: Path) -> bool:
    """Return whether there is anything of this name, which may be any text."""
    try:
        path.stat()
    except (OSError, ValueError):  # `Path.exists` raises some of them
        return False
    return True


def path_of(file: FileIO, path: Path) -> Path:
    """Return a path that means an open file, whatever has its own path by now, if the system has such paths."""
    opened = Path(f"/dev/fd/{file.fileno()}")
    return opened if opened.exists() else path


def require_regular(path: Path) -> os.stat_result:
    """Return the status of a regular file, or of one that a link leads to; errors are as of `open_regular`."""
    try:
        found = path.stat()
    except ValueError as error:  # a name that no system has
        raise CheckpointError(f"there is no file {str(path)!r} ({error})") from error
    _require_regular(path, found)
    return found


def _require_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "no file")
        raise CheckpointError(f"{path} is {kind}: expected a file")

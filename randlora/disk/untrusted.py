"""Reading files that may contain anything: only regular files are opened, and JSON is read strictly, with limits.

A pipe may have no writer, and a device no end. Values that nest too deep or are not Unicode could not be written again.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from io import FileIO
from pathlib import Path
from typing import Any

from randlora.errors import CheckpointError

FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)

KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
    stat.S_IFSOCK: "a socket",
}

MOST_BYTES = 2**24
"""The largest JSON file that is read: 16 MiB, enough for 100,000 names of layers."""
DEEPEST = 64  # what is nested deeper cannot be written again: Python's encoder recurses
MOST_DIGITS = 309  # of an integer, as many as the largest float has


def open_regular(path: Path) -> FileIO:
    """Open a regular file, or a link to one, to read it without a buffer.

    A pipe, a device, a directory or a socket raises a `CheckpointError`.
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
    """Return the contents of a regular file of at most ``most`` bytes. Raises the errors of `open_regular`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise CheckpointError(
                f"{path} has {size:,} bytes, expected at most {most:,}: it is not the file that was meant"
            )
        return file.read(size)


def is_there(path: Path) -> bool:
    """Whether anything exists under this name, which may be any text."""
    try:
        path.stat()
    except (OSError, ValueError):  # `Path.exists` raises some of them
        return False
    return True


def path_of(file: FileIO, path: Path) -> Path:
    """Return a path of an open file that stays valid if its own path is replaced, on systems with such paths."""
    opened = Path(f"/dev/fd/{file.fileno()}")
    return opened if opened.exists() else path


def require_regular(path: Path) -> os.stat_result:
    """Return the status of a regular file, or of one that a link leads to. Raises the errors of `open_regular`."""
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


def read_json(path: Path, *, is_lenient: bool = False) -> Any:
    """Return the contents of a JSON file of at most 16 MiB; see `parse_json`. Raises the errors of `open_regular`."""
    return parse_json(read_regular(path, MOST_BYTES).decode("utf-8"), is_lenient=is_lenient)


def parse_json(text: str, *, is_lenient: bool = False) -> Any:
    """Return the value of a JSON text.

    A `ValueError` is raised for nesting deeper than 64 levels, integers of more than 309 digits, and strings that are
    not Unicode. Unless ``is_lenient`` (for the files of a base model, which may have them), NaN, infinite numbers and
    repeated keys raise it too.
    """
    strict: dict[str, Any] = {"object_pairs_hook": _object, "parse_constant": _constant, "parse_float": _float}
    try:
        value = json.loads(text, parse_int=_integer, **({} if is_lenient else strict))
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from error
    _require_flat(value)
    if "\\ud" in text or "\\uD" in text:  # only an escape can be half of a character
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has {name!r:.200} twice")
    return found


def _constant(text: str) -> float:
    raise ValueError(f"it has {text}, which is not JSON")


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it has the number {text:.40}, which is too large")
    return number


def _integer(text: str) -> int:
    if len(text.removeprefix("-")) > MOST_DIGITS:
        raise ValueError(f"it has an integer of {len(text)} digits, which is too large")
    return int(text)


def _require_flat(value: Any) -> None:
    level: list[Any] = [[value]]
    for _ in range(DEEPEST + 1):
        children = (child for held in level for child in (held.values() if isinstance(held, dict) else held))
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {DEEPEST} levels")

"""JSON that has one meaning, and that can be written again: read with limits, which `json` does not have."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from randlora.disk.regular import read_regular

MOST_BYTES = 2**24
"""The size of a JSON file that is read: 16 MiB, for 100,000 names of layers."""
DEEPEST = 64  # what is nested deeper cannot be written again: Python's encoder recurses
MOST_DIGITS = 309  # of an integer, as many as the largest float has


def read_json(path: Path, *, is_lenient: bool = False) -> Any:
    """Return the contents of a JSON file, as `parse_json` does.

    Raises:
        CheckpointError: If it is not a regular file of at most 16 MiB.
        OSError: If it cannot be opened.
        ValueError: If it is not JSON.
    """
    return parse_json(read_regular(path, MOST_BYTES).decode("utf-8"), is_lenient=is_lenient)


def parse_json(text: str, *, is_lenient: bool = False) -> Any:
    """Return the value of a JSON text.

    A `ValueError` is raised for what is nested deeper than 64 levels, integers of more than 309 digits, and strings
    that are no Unicode. Unless ``is_lenient``, as for the files of a base model, which may have them, also for NaN,
    infinite numbers, and keys that are there twice.
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

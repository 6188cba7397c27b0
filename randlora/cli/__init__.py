"""The `randlora` command: each verb on files is a command, with the verb's docstring as its help.

It needs typer and rich (the extra ``cli``), which no other room imports.

Here is how results and errors are printed: as text or JSON, with names from files that give a terminal no commands.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import typer
from rich.console import Console

FILES_ERROR, USAGE_ERROR = 1, 2
"""Exit codes: for errors with files and failed checks, and for command lines that cannot be used."""


def show(text: str) -> None:
    """Print a result."""
    typer.echo(visible(text))


def complain(message: str) -> None:
    """Print an error on stderr."""
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print("error:", visible(message), style=None)


def visible(text: str) -> str:
    """Return text with unprintable characters escaped as in JSON: names in files may contain terminal commands."""
    return "".join(each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in text)


def plain(value: Any) -> Any:
    """Return a result as JSON values: dataclasses as objects, with numbers that are properties; paths as strings."""
    if is_dataclass(value) and not isinstance(value, type):
        found = {field.name: plain(getattr(value, field.name)) for field in fields(value)}
        more = {name: getattr(value, name) for name, each in vars(type(value)).items() if isinstance(each, property)}
        return found | {name: each for name, each in more.items() if each is None or isinstance(each, int | float)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    is_json = value is None or isinstance(value, str | int | float)
    return value if is_json else str(value).removeprefix("torch.")  # a dtype's, else a path

"""What the commands share: arguments, and output: results on stdout, as text or JSON; progress and errors on stderr."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from randlora import options as choices

if TYPE_CHECKING:
    import torch

    from randlora.report import Progress

Adapter = Annotated[str, typer.Argument(help="Directory that this library or PEFT wrote, or `user/repo` on the Hub.")]
BaseForShapes = Annotated[
    str | None,
    typer.Option("--base", help="The base model, whose headers give the shapes that PEFT does not store."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the adapter's repository on the Hub.")]
BaseRevision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the base model's repository.")]
Prefix = Annotated[
    str | None,
    typer.Option(help="The prefix by which the names in the adapter and in the model differ, such as `bert`."),
]
FileStream = Annotated[
    choices.Stream | None,
    typer.Option(
        "--stream",
        help="The stream of the bases, if PEFT stored none: `torch-2.11` if trained under torch 2.11 or older.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]

ARGUMENT = re.compile(
    r"""\b(\w+)=(True\b|"[^"]*"|'[^']*'|\[[^]]*\]|(?<=rank=)\w+|(?<=tolerance=)[\d.e-]*\d|(?![\w.({-]))"""
)
"""An argument in a message of the library: with a value in quotes or brackets, or a number, or with none."""

OPTIONS: set[str] = set()
"""The options of all commands, which `randlora.cli.app` puts here: the commands import this file."""

WIDEST = 100_000  # the width of a pipe, where nothing is cut or wrapped


def show_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table, with the first column left-aligned and the others right-aligned. Headings may be none."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=bool(headings))
    for index, heading in enumerate(headings or [""] * len(rows[0])):
        table.add_column(heading, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else WIDEST, highlight=False, markup=False).print(table)


def show(value: object) -> None:
    """Print a result as text."""
    typer.echo(visible(in_options(str(value))))


def in_options(text: str) -> str:
    """Return a message of the library with its arguments as the options of this command line."""

    def option(found: re.Match[str]) -> str:
        name, value = found.groups()
        if (shown := f"--{name.replace('_', '-')}") not in OPTIONS:
            return found[0]
        values = re.sub(r"[\[\]\"'\s]", "", value)
        return f"{shown} {values}" if values not in ("", "True") else shown

    return ARGUMENT.sub(option, text)


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return the dtype of this name."""
    import torch  # noqa: PLC0415 - it takes seconds, which `--help` should not

    return None if name is None else getattr(torch, name)


def visible(text: str) -> str:
    """Return text with what is not printed written out, as in JSON: names in files may hold a terminal's commands."""
    return "".join(each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in text)


def show_json(value: object) -> None:
    """Print a result as one JSON object."""
    typer.echo(visible(json.dumps(plain(value), indent=2, ensure_ascii=False)))


def plain(value: Any) -> Any:
    """Return a result as JSON values: dataclasses as objects, paths and dtypes as strings."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    is_json = value is None or isinstance(value, str | int | float)
    return value if is_json else str(value).removeprefix("torch.")  # a dtype's, else a path


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Yield a callback that shows progress on a terminal, and nothing in a pipe or a log."""
    from randlora.report import no_progress  # noqa: PLC0415 - as above

    if not sys.stderr.isatty():
        yield no_progress
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda done, total, doing: bars.update(task, completed=done, total=total, description=visible(doing))


def complain(message: str) -> None:
    """Print an error on stderr."""
    message = visible(in_options(message))
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print("error:", message, style=None)

"""The command line: its commands, and how it reports errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated

import typer

import randlora
from randlora.cli.convert import convert
from randlora.cli.demo import demo
from randlora.cli.inspect import inspect
from randlora.cli.merge import merge
from randlora.cli.plan import plan
from randlora.cli.shared import OPTIONS, complain
from randlora.cli.verify import verify
from randlora.errors import RandLoRAError

app = typer.Typer(
    name="randlora",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(plan)
app.command()(merge)
app.command()(inspect)
app.command()(verify)
app.command()(convert)
app.command()(demo)

OPTIONS.update(
    option
    for command in typer.main.get_group(app).commands.values()
    for parameter in command.params
    for option in parameter.opts
)

USER_ERROR = 1


def _show_version(wanted: bool) -> None:  # noqa: FBT001 (typer calls it so)
    if wanted:
        typer.echo(f"randlora {randlora.__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_show_version, help="Show the version.")]


@app.callback()
def describe(version: Version = False) -> None:  # noqa: FBT002
    """RandLoRA adapters as files. Models are trained by trainers, not here.

    Results go to stdout, errors and progress to stderr. The exit code is 0; 1 for an error with files; 2 for an invalid
    command line. Every command takes `--json`.
    """


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 for an error with files, 2 for an invalid command line."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: an old terminal's encoding may lack Λ
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app(None if args is None else list(args), prog_name="randlora")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0
    except RandLoRAError as error:
        complain(str(error))
    except OSError as error:
        complain(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    return USER_ERROR

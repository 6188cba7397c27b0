"""The command line: its commands, and how it reports errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated

import typer

import randlora
from randlora.cli.commands import COMMANDS
from randlora.cli.output import complain
from randlora.errors import ConfigError, RandLoRAError, TargetError, on_command_line

app = typer.Typer(
    name="randlora",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _command in COMMANDS.items():
    app.command(_name)(_command.callback(_name))

FILES_ERROR, USAGE_ERROR = 1, 2


def _show_version(wanted: bool) -> None:  # noqa: FBT001 (typer calls it so)
    if wanted:
        typer.echo(f"randlora {randlora.__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_show_version, help="Show the version.")]


@app.callback()
def describe(version: Version = False) -> None:  # noqa: FBT002
    """RandLoRA adapters as files. Models are trained by trainers, not here.

    Results go to stdout, errors and progress to stderr. The exit code is 0; 1 for an error with files; 2 for a command
    line that cannot be used. Every command takes `--json`.
    """


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 for an error with files, 2 for an unusable command line."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: an old terminal's encoding may lack Λ
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with on_command_line():
            app(None if args is None else list(args), prog_name="randlora")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0
    except (ConfigError, TargetError) as error:
        complain(str(error))
        return USAGE_ERROR
    except RandLoRAError as error:
        complain(str(error))
    except OSError as error:
        complain(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    return FILES_ERROR

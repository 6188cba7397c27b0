"""The command line: which commands there are, and how a run of one ends.

Importing a verb takes seconds, as torch does, so a command is made when it is used. Results go to stdout; progress and
errors go to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import randlora
from randlora.cli import FILES_ERROR, USAGE_ERROR, complain, visible
from randlora.errors import ConfigError, RandLoRAError, TargetError

COMMANDS = {
    "plan": (
        "Print the report that `randlora.inject` would return for the model in a directory, without its weights.",
        "Llama-3-8B",
        "meta-llama/Llama-3.2-1B --r 16 --targets q_proj,v_proj",
        "gpt2 --targets all-linear --basis block --json",
        "Llama-3-8B --like-lora 32",
        'gpt2 --r c_attn=16 --r ".*=32"',
        "Llama-3-70B --devices 8 --strategy fsdp2 --tokens 4096 --checkpointing",
    ),
    "merge": (
        "Merge adapters into a checkpoint and write the result to a new directory, without loading the model.",
        "my-adapter merged --base Llama-3-8B",
        "user/adapter merged --base meta-llama/Llama-3.2-1B",
        "my-adapter merged --overwrite",
        "a b merged --base Llama-3-8B --scale 0.7 --scale 0.3 --dtype bfloat16",
    ),
    "inspect": (
        "Print a summary of an adapter on disk: options, bases, layers, and the norms of their updates.",
        "my-adapter",
        "from-peft --base Llama-3-8B",
        "my-adapter --no-norms --json",
    ),
    "verify": (
        "Check an adapter's files: contents, checksum, bases, and whether they fit a base model.",
        "my-adapter",
        "my-adapter --base Llama-3-8B --json",
        "user/adapter --base meta-llama/Llama-3.2-1B",
    ),
    "convert": (
        "Convert an adapter to a different format, and write it to a new directory.",
        "my-adapter for-peft --to peft",
        "from-peft mine --to native --base Llama-3-8B",
        "my-adapter a-lora --to lora --rank 64 --tolerance 0.3",
        "my-adapter for-pipeline --to lora --format diffusers",
    ),
}
"""The commands: the first line of the docstring, with Print for Return, and examples without program and command."""

FORM: dict[str, Any] = {
    "pretty_exceptions_enable": False,
    "rich_markup_mode": "markdown",
    "context_settings": {"help_option_names": ["-h", "--help"]},
}


class Command(TyperCommand):
    """Says what was given for a bad value, and, if one word is for several arguments, which is missing.

    The parser takes that word for the last one.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Return the words left, as the parser does."""
        words = [*args]
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            parsed = self.make_parser(ctx).parse_args(words)[0].items()
            given = {name: typed for name, typed in parsed if isinstance(typed, Sequence)}  # click has UNSET for none
            arguments: list[Any] = [each for each in self.params if each.param_type_name == "argument"]
            if error.param is arguments[0] and given.get(arguments[-1].name):
                error.param = arguments[-1]
            elif typed := given.get(getattr(error.param, "name", "")):
                got = typed if isinstance(typed, str) else " ".join(typed)
                error.message = f"{error.message.rstrip('.')}, got {visible(got)}"
            raise


class Commands(TyperGroup):
    """Knows the names of the commands, and makes the one that is used."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return the command that some words name, and the words after its name."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None:
            from randlora.cli.commands import callback  # noqa: PLC0415 (it imports torch)

            alone = typer.Typer(add_completion=False, **FORM)
            alone.command(name, cls=Command)(callback(name, *COMMANDS[name]))
            command = typer.main.get_command(alone)
        return name, command, rest


app = typer.Typer(name="randlora", cls=Commands, no_args_is_help=True, **FORM)
for _name, (_summary, *_) in COMMANDS.items():
    app.command(_name, help=_summary)(lambda: None)


def _show_version(wanted: bool) -> None:  # noqa: FBT001 (typer calls it so)
    if wanted:
        typer.echo(f"randlora {randlora.__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_show_version, help="Show the version.")]


@app.callback()
def describe(version: Version = False) -> None:  # noqa: FBT002
    """Inspect, plan, merge and convert RandLoRA adapters on disk. To train one, use Python or a trainer.

    Results go to stdout, errors and progress to stderr. The exit code is 0 on success, 1 for an error with files, and 2
    for a command line that cannot be used. Every command takes `--json`.
    """


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 for an error with files, 2 for an unusable command line."""
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
        return USAGE_ERROR if isinstance(error, ConfigError | TargetError) else FILES_ERROR
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        complain(f"{error.strerror or error}{place}".replace("\n", r"\n"))
    return FILES_ERROR

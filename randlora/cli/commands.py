"""What the commands do: each calls the verb of its name, from whose signature and docstring its options are made."""

from __future__ import annotations

import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from inspect import Parameter
from types import GenericAlias, NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

import randlora
from randlora import files
from randlora.cli import FILES_ERROR, plain, show, visible
from randlora.errors import ConfigError, named, on_command_line, spelled, typed
from randlora.files.adapter import open_base
from randlora.files.model_directory import no_progress
from randlora.files.plan import checkpoint_memory, plan_checkpoint
from randlora.hints import UNIONS, mistyped
from randlora.model.memory import Setup
from randlora.targets.left_out import DOUBT

Dtype = Literal["float32", "bfloat16", "float16", "float64"]

ABSENT = frozenset({"active", "config", "model", "name", "progress", "save_pretrained", "trainable"})
"""Parameters that need Python, or say nothing about files."""

AS_JSON = Parameter(
    "as_json",
    Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")],
)

Printed = tuple[str, dict[str, Any]]  # a result as text and as JSON


def callback(name: str, summary: str, *examples: str) -> Callable[..., None]:
    """Return the function that typer calls for a command."""
    verb, action = getattr(files, name), ACTIONS.get(name, partial(_call, name))
    taken: dict[str, tuple[Parameter, Callable[[Any], Any]]] = {}
    for function in (*DESCRIBED.get(name, ()), verb):
        for parameter, value in _parameters(function):
            taken.setdefault(parameter.name, (parameter, value))

    arguments = {parameter.name for parameter, _ in taken.values() if parameter.default is Parameter.empty}

    def run(*, as_json: bool, **given: Any) -> None:
        with on_command_line(arguments):
            values = {name: None if words in (None, []) else taken[name][1](words) for name, words in given.items()}
            text, facts = action(**values)
        show(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else text)
        if facts.get("passed") is False:
            raise typer.Exit(FILES_ERROR)

    _, *more = _about_and_args(verb)[0].split("\n\n")
    run.__doc__ = "\n\n".join([summary, *more, "**Examples**", *(f"`randlora {name} {each}`" for each in examples)])
    signed = [*(parameter for parameter, _ in taken.values()), AS_JSON]
    vars(run)["__signature__"] = inspect.Signature(signed)
    run.__annotations__ = {each.name: each.annotation for each in signed}
    return run


def _parameters(function: Callable[..., Any]) -> Iterator[tuple[Parameter, Callable[[Any], Any]]]:
    """Yield the parameters of a function as typer takes them, each with what makes its value of the words given."""
    hints, (_, docs) = get_type_hints(inspect.unwrap(function)), _about_and_args(function)
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in docs or name not in hints or name in ABSENT:  # options that are passed on have no hint here
            continue
        hint = hints[name]
        kinds = [kind for kind in (get_args(hint) if get_origin(hint) in UNIONS else (hint,)) if kind is not NoneType]
        kind, value, info = _words_for(name, kinds)
        info["help"] = docs[name]
        if parameter.default is Parameter.empty:
            as_typer = typer.Argument(**info | {"metavar": name.upper()})
        else:
            flag = f"--{name.replace('_', '-')}"
            as_typer = typer.Option(*([] if parameter.default is True else [flag]), **info)  # it has --no-… for it too
        optional: Any = kind if parameter.default is not None else kind | None
        yield parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=Annotated[optional, as_typer]), value


def _about_and_args(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Return what a docstring says of a function, and of each of its parameters: a line, and those further in."""
    about, _, rest = (inspect.getdoc(function) or "").replace("``", "`").partition("\n\nArgs:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", rest.partition("\n\n")[0], re.MULTILINE)
    return about, {name: " ".join(text.split()) for name, text in entries}


def _words_for(name: str, kinds: Sequence[Any]) -> tuple[Any, Callable[[Any], Any], dict[str, Any]]:
    """Return the type that typer reads for values of some types, what makes a value of it, and typer's options."""
    inside = {get_origin(kind): get_args(kind) for kind in kinds}
    if Mapping in inside:
        number = inside[Mapping][-1]
        if get_origin(number) is Sequence:
            numbers = partial(_by_name, name, lambda text: [*map(int, text.split(","))])
            return list[str], numbers, {"metavar": "NAME=NUMBER,NUMBER"}
        return list[str], partial(_by_name, name, number), {"metavar": "NUMBER|NAME=NUMBER"}
    if Sequence in inside and str in kinds:
        return list[str], partial(_names_or_regex, name), {"metavar": "NAMES|REGEX"}
    if Sequence in inside:
        return GenericAlias(list, inside[Sequence]), list, {}
    if Literal in inside or torch.dtype in kinds:  # which the verb checks, and answers with the nearest choice
        choices: tuple[str, ...] = inside.get(Literal, get_args(Dtype))

        def beginning(incomplete: str) -> list[str]:
            return [choice for choice in choices if choice.startswith(incomplete)]

        value: Callable[[Any], Any] = str if Literal in inside else partial(_dtype, name)
        return str, value, {"metavar": "|".join(choices), "autocompletion": beginning}
    return (str, str, {}) if str in kinds else (kinds[0], lambda given: given, {})


def _names_or_regex(name: str, given: Sequence[str]) -> list[str] | str:
    """Return names, with commas between or repeated, or a rule, or a regex."""
    if any(re.search(r"[^\w.,-]", text) for text in given):
        if len(given) > 1:
            raise ConfigError(f"{spelled(name)} takes names or one regex, got {', '.join(given)}")
        return given[0]
    names = [each for text in given for each in text.split(",") if each]
    return names[0] if names in (["all-linear"], ["all"]) else names


def _by_name(name: str, number: Callable[[str], Any], given: Sequence[str]) -> Any:
    """Return the number that is given for all, or those given as ``NAME=NUMBER``."""
    split = [text.rpartition("=") for text in given]
    if len(split) > 1 and not all(separator for _, separator, _ in split):
        raise ConfigError(f"{spelled(name)} must be NAME=VALUE each time, got {', '.join(given)}")
    if len({pattern for pattern, _, _ in split}) < len(split):
        raise ConfigError(f"{spelled(name)} is given twice for one name, got {', '.join(given)}")
    values = {}
    for pattern, _, text in split:
        try:
            values[pattern] = number(text)
        except ValueError as error:
            raise ConfigError(f"{spelled(name)} must be a number or NAME=NUMBER, got {typed(text)}") from error
    return values if split[0][1] else values[""]


def _dtype(name: str, given: str) -> Any:
    if wrong := [*mistyped(given, Dtype, named(name))]:
        raise ConfigError(wrong[0])
    return getattr(torch, given)


def _call(name: str, **given: Any) -> Printed:
    """Call a verb, and return its report."""
    with progress_bar() as progress:
        report = getattr(files, name)(**given, progress=progress)
    return str(report), plain(report)


def _merge(adapters: Sequence[str], *, scale: Sequence[float] | None = None, **given: Any) -> Printed:
    """Merge adapters with their factors.

    Args:
        adapters: Directories of adapters, or `user/repo` on the Hub. Updates add.
        scale: Factor of the update, one for each adapter, in order.
        **given: The other options of the verb.
    """
    if scale is None:
        return _call("merge", adapters=adapters, **given)
    if len(scale) != len(adapters):
        raise ConfigError(f"expected one {spelled('scale')} for each adapter, got {len(scale)} for {len(adapters)}")
    scales = dict(zip(adapters, scale, strict=True))
    if len(scales) < len(adapters):
        raise ConfigError(f"an adapter is given twice: give it once, with a larger {spelled('scale')}")
    return _call("merge", adapters=scales, **given)


def _plan(**given: Any) -> Printed:
    """Return the report and the memory, for which the headers are read once."""
    setup = {field.name: given.pop(field.name) for field in fields(Setup)}
    base = open_base(given.pop("directory"), given.pop("revision"), needs_weights=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", DOUBT, UserWarning)  # the report says it
        report, memory = plan_checkpoint(base, **given), checkpoint_memory(base, **given, **setup)
    return f"{report}\n\n{memory}", {**plain(report), "training_memory": plain(memory)}


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], object]]:
    """Yield a callback that shows progress on a terminal, and nothing in a pipe or a log."""
    if not sys.stderr.isatty():
        yield no_progress
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=None)

        def show_step(done: int, total: int, doing: str) -> None:
            bars.update(task, completed=done, total=total, description=visible(doing.replace("\n", r"\n")))

        yield show_step


ACTIONS: dict[str, Callable[..., Printed]] = {"plan": _plan, "merge": _merge}  # what is called in place of the verb

DESCRIBED = {"plan": (randlora.inject, randlora.training_memory), "merge": (_merge,)}
"""Functions whose parameters a command has before its verb's, with their descriptions."""

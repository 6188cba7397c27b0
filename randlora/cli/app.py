"""The commands, each of which calls the verb of its name in `randlora.files`, and what they print.

The parameters of verbs are read from signatures and docstrings in the source, because importing a verb would import
torch and take seconds. Results go to stdout, as text or JSON; progress and errors go to stderr.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache, partial
from importlib.resources import files
from inspect import Parameter as Signed
from inspect import Signature
from io import TextIOWrapper
from types import GenericAlias, NoneType, SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

import randlora
import randlora.config
from randlora.errors import ConfigError, RandLoRAError, TargetError, on_command_line, spelled
from randlora.hints import UNIONS, mistyped

Dtype = Literal["float32", "bfloat16", "float16", "float64"]

NAMES = {**vars(randlora.config), "torch": SimpleNamespace(dtype=Dtype)}
"""The names used in annotations of verbs."""

ABSENT = frozenset({"active", "config", "model", "name", "progress", "save_pretrained", "trainable"})
"""Parameters that need Python, or say nothing about files."""

FLAGS = {"model_class": "--class"}
"""Options whose names differ from their parameters."""


class Parameter(NamedTuple):
    """A parameter of a verb.

    Attributes:
        name: The name.
        hint: The type of its values.
        default: The default, or ``Signed.empty``.
        doc: Its description in the docstring.
        is_option: Whether it is given by name.
    """

    name: str
    hint: Any
    default: Any
    doc: str
    is_option: bool = True

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types of its values other than ``None``."""
        kinds = get_args(self.hint) if get_origin(self.hint) in UNIONS else (self.hint,)
        return tuple(kind for kind in kinds if kind is not NoneType)

    def inside(self, form: Any) -> Any:
        """Return the type of the values of a mapping or a sequence, if the parameter may be one, else ``None``."""
        return next((get_args(kind)[-1] for kind in self.kinds if get_origin(kind) is form), None)

    def signed(self) -> Signed:
        """Return the parameter as typer takes it."""
        kind: Any = self.kinds[0]
        given: dict[str, Any] = {"help": self.doc}
        if get_origin(kind) is Literal:  # which the verb checks, and answers with the nearest choice
            choices: tuple[str, ...] = get_args(kind)
            given["autocompletion"] = lambda incomplete: [each for each in choices if each.startswith(incomplete)]
            kind, given["metavar"] = str, "|".join(choices)
        elif number := self.inside(Mapping):
            value = "VALUE" if number is str else "NUMBER"
            kind, given["metavar"] = list[str], f"{f'{value}|' if len(self.kinds) > 1 else ''}NAME={value}"
        elif entry := self.inside(Sequence):
            kind, given["metavar"] = GenericAlias(list, (entry,)), "NAMES|REGEX" if str in self.kinds else None
        elif str in self.kinds:
            kind = str
        if self.is_option:
            flag = FLAGS.get(self.name, f"--{self.name.replace('_', '-')}")
            info = typer.Option(*([] if self.default is True else [flag]), **given)  # typer has --no-… for it too
        else:
            info = typer.Argument(**given | {"metavar": self.name.upper()})
        optional = kind if self.default is not None else kind | None
        return Signed(self.name, Signed.KEYWORD_ONLY, default=self.default, annotation=Annotated[optional, info])

    def value(self, given: Any) -> Any:
        """Return the value of the words given on a command line."""
        if given is None or given == []:
            return None
        if number := self.inside(Mapping):
            return _by_name(self.name, given, number, may_be_one=len(self.kinds) > 1)
        if self.inside(Sequence) is str and str in self.kinds:
            return _names_or_regex(self.name, given)
        return _dtype(self.name, given) if self.kinds == (Dtype,) else given


@cache
def read_verb(module: str, name: str) -> tuple[str, dict[str, Parameter]]:
    """Return the description of a function of the package, from its docstring, and its parameters."""
    tree = ast.parse(files("randlora").joinpath(f"{module}.py").read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    about, _, rest = (ast.get_docstring(found) or "").replace("``", "`").partition("\n\nArgs:\n")
    docs = _entries(rest.partition("\n\n")[0])
    signature = found.args
    required = [None] * (len(signature.args) - len(signature.defaults))
    defaults = [*required, *signature.defaults, *signature.kw_defaults]
    parameters = {}
    for each, default in zip((*signature.args, *signature.kwonlyargs), defaults, strict=True):
        if each.arg not in ABSENT and each.annotation is not None:
            hint = eval(ast.unparse(each.annotation), NAMES)  # noqa: S307 (our own source)
            value = Signed.empty if default is None else ast.literal_eval(default)
            is_option = default is not None or each in signature.kwonlyargs
            parameters[each.arg] = Parameter(each.arg, hint, value, docs[each.arg], is_option)
    return about, parameters


def _entries(section: str) -> dict[str, str]:
    """Return the entries of a section of a docstring by name: a line each, and those further in that continue it."""
    entries: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line.startswith("        "):
            entries[name] += f" {line.strip()}"
        else:
            name, _, text = line.strip().partition(": ")
            entries[name] = text
    return entries


def _names_or_regex(name: str, given: Sequence[str]) -> list[str] | str:
    """Return names, with commas between or repeated, or a rule, or a regex."""
    if any(re.search(r"[^\w.,-]", text) for text in given):
        if len(given) > 1:
            raise ConfigError(f"{spelled(name)} takes names or one regex, got {', '.join(given)}")
        return given[0]
    names = [each for text in given for each in text.split(",") if each]
    return names[0] if names in (["all-linear"], ["all"]) else names


def _by_name(name: str, given: Sequence[str], number: Callable[[str], Any], *, may_be_one: bool) -> Any:
    """Return the value that is given for all, or those given as ``NAME=VALUE``."""
    split = [text.rpartition("=") for text in given]
    if may_be_one and len(split) == 1 and not split[0][1]:
        return _number(name, split[0][2], number)
    if not all(separator for _, separator, _ in split):
        raise ConfigError(f"{spelled(name)} must be NAME=VALUE each time, got {', '.join(given)}")
    if len({pattern for pattern, _, _ in split}) < len(split):
        raise ConfigError(f"{spelled(name)} is given twice for one name, got {', '.join(given)}")
    return {pattern: _number(name, text, number) for pattern, _, text in split}


def _number(name: str, text: str, number: Callable[[str], Any]) -> Any:
    try:
        return number(text)
    except ValueError as error:
        raise ConfigError(f"{spelled(name)} must be a number or NAME=NUMBER, got {text!r}") from error


def _dtype(name: str, given: str) -> Any:
    import torch  # noqa: PLC0415 - it takes seconds, which `--help` should not

    if wrong := [*mistyped(given, Dtype, name)]:
        raise ConfigError(wrong[0])
    return getattr(torch, given)


FILES_ERROR, USAGE_ERROR = 1, 2
"""Exit codes: for errors with files and failed checks, and for command lines that cannot be used."""

AS_JSON = Signed(
    "as_json",
    Signed.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")],
)

Printed = tuple[str, dict[str, Any]]
"""A result as text and as JSON."""


class Command(NamedTuple):
    """A command: the verb of its name.

    Attributes:
        examples: Command lines, each without the program and the command.
        action: The function called with the values of its parameters, if it is not the verb itself.
        file: Where the verb is, if not in the file of its name in ``files/``.
        others: Files and names of further functions whose parameters the command has too, with their descriptions.
        own: Parameters that differ on a command line, or that only the command has.
    """

    examples: tuple[str, ...]
    action: Callable[..., Printed] | None = None
    file: str = ""
    others: tuple[tuple[str, str], ...] = ()
    own: tuple[Parameter, ...] = ()

    def callback(self, name: str) -> Callable[..., None]:
        """Return the function that typer calls."""
        verb = self.file or f"files/{name}", name
        action = self.action or partial(_call, name)
        parameters = {parameter.name: parameter for parameter in self.own}
        for each in (*self.others, verb):
            for parameter in read_verb(*each)[1].values():
                parameters.setdefault(parameter.name, parameter)

        def run(*, as_json: bool, **given: Any) -> None:
            text, facts = action(**{option: parameters[option].value(words) for option, words in given.items()})
            show_json(facts) if as_json else show(text)
            if facts.get("passed") is False:
                raise typer.Exit(FILES_ERROR)

        about, _ = read_verb(*verb)
        described = f"Print{about.removeprefix('Return')}" if about.startswith("Return ") else about
        examples = (f"`randlora {name} {example}`" for example in self.examples)
        run.__doc__ = "\n\n".join([described, "**Examples**", *examples])
        signed = [*(parameter.signed() for parameter in parameters.values()), AS_JSON]
        vars(run)["__signature__"] = Signature(signed)
        run.__annotations__ = {each.name: each.annotation for each in signed}
        return run


def _call(name: str, **given: Any) -> Printed:
    """Call a verb, and return its report."""
    with progress_bar() as progress:
        report = getattr(randlora.files, name)(**given, progress=progress)
    return str(report), plain(report)


def _merge(adapters: Sequence[str], scale: Sequence[float] | None, **given: Any) -> Printed:
    if scale is None:
        return _call("merge", adapters=adapters, **given)
    if len(scale) != len(adapters):
        raise ConfigError(f"expected one {spelled('scale')} for each adapter, got {len(scale)} for {len(adapters)}")
    scales = dict(zip(adapters, scale, strict=True))
    if len(scales) < len(adapters):
        raise ConfigError(f"an adapter is given twice: give it once, with a larger {spelled('scale')}")
    return _call("merge", adapters=scales, **given)


def _plan(**given: Any) -> Printed:
    # these import torch, which takes seconds, and `--help` should not
    from randlora.files.plan import checkpoint_memory, open_to_plan, plan_checkpoint  # noqa: PLC0415
    from randlora.targets.left_out import DOUBT  # noqa: PLC0415

    setup = {name: given.pop(name) for name in read_verb(*MEMORY)[1].keys() & given.keys() - {"r", "like_lora"}}
    base = open_to_plan(*(given.pop(name) for name in ("directory", "revision", "model_class", "num_labels")))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", DOUBT, UserWarning)  # the report says it
        report, memory = plan_checkpoint(base, **given), checkpoint_memory(base, **given, **setup)
    return f"{report}\n\n{memory}", {**plain(report), "training_memory": plain(memory)}


MEMORY = "model/memory", "training_memory"

COMMANDS = {
    "plan": Command(
        (
            "Llama-3-8B",
            "meta-llama/Llama-3.2-1B --r 16 --targets q_proj,v_proj",
            "gpt2 --targets all-linear --basis block --json",
            "Llama-3-8B --like-lora 32",
            'gpt2 --r c_attn=16 --r ".*=32"',
            "Llama-3-70B --devices 8 --strategy fsdp2 --tokens 4096 --checkpointing",
        ),
        _plan,
        others=(("model/inject", "inject"), MEMORY),
    ),
    "merge": Command(
        (
            "my-adapter merged --base Llama-3-8B",
            "user/adapter merged --base meta-llama/Llama-3.2-1B",
            "my-adapter merged --overwrite",
            "a b merged --base Llama-3-8B --scale 0.7 --scale 0.3 --dtype bfloat16",
        ),
        _merge,
        own=(
            Parameter(
                "adapters",
                Sequence[str],
                Signed.empty,
                "Directories of adapters, or `user/repo` on the Hub. Updates add.",
                is_option=False,
            ),
            Parameter("scale", Sequence[float] | None, None, "Factor of the update, one for each adapter, in order."),
        ),
    ),
    "inspect": Command(("my-adapter", "from-peft --base Llama-3-8B", "my-adapter --no-norms --json")),
    "verify": Command(
        (
            "my-adapter",
            "my-adapter --base Llama-3-8B --json",
            "user/adapter --base meta-llama/Llama-3.2-1B",
        ),
        file="files/inspect",
    ),
    "convert": Command((
        "my-adapter for-peft --to peft",
        "from-peft mine --to native --base Llama-3-8B",
        "my-adapter a-lora --to lora --rank 64 --tolerance 0.3",
        "my-adapter for-pipeline --to lora --format diffusers",
    )),
}


app = typer.Typer(
    name="randlora",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _command in COMMANDS.items():
    app.command(_name)(_command.callback(_name))


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


def show(value: object) -> None:
    """Print a result as text."""
    typer.echo(visible(str(value)))


def show_json(value: object) -> None:
    """Print a result as one JSON object."""
    typer.echo(visible(json.dumps(plain(value), indent=2, ensure_ascii=False)))


def complain(message: str) -> None:
    """Print an error on stderr. Further lines are its problems, if there are several; other line breaks are escaped."""
    told = visible(re.sub(r"\n(?!  - )", r"\\n", message))
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print("error:", told, style=None)


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


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], object]]:
    """Yield a callback that shows progress on a terminal, and nothing in a pipe or a log."""
    from randlora.report import no_progress  # noqa: PLC0415 - it imports torch, which `--help` should not

    if not sys.stderr.isatty():
        yield no_progress
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=None)

        def show_step(done: int, total: int, doing: str) -> None:
            on_one_line = visible(doing.replace("\n", r"\n"))
            bars.update(task, completed=done, total=total, description=on_one_line)

        yield show_step

"""The parameters of verbs, read from their source files, and their values on a command line.

Signatures and docstrings are read without importing the verb, because this would import torch and take seconds.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from inspect import Parameter as Signed
from types import GenericAlias, NoneType, SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import typer

import randlora.options
from randlora.errors import ConfigError, spelled
from randlora.hints import UNIONS, mistyped

Dtype = Literal["float32", "bfloat16", "float16", "float64"]

NAMES = {**vars(randlora.options), "torch": SimpleNamespace(dtype=Dtype)}
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

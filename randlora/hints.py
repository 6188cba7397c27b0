"""Values from outside, of files and of callers, against type hints: the hints are the table of what is expected."""

from __future__ import annotations

import difflib
import functools
import math
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from randlora.errors import ConfigError, raise_collected
from randlora.meant import IN_PLACE, NotTheModel

UNIONS = (Union, types.UnionType)
WORDS: dict[Any, str] = {
    Callable: "a function",
    Mapping: "a mapping",
    Sequence: "a sequence",
    bool: "True or False",
    dict: "names with values",
    float: "a finite number",
    int: "an integer",
    list: "a list",
    os.PathLike: "a path",
    str: "a string",
    tuple: "a list",
    types.NoneType: "None",
}


def require_types(function: Callable[..., object], arguments: Mapping[str, object]) -> None:
    """Raise a `ConfigError` if arguments of a function are not of the types in its signature."""
    hints = _hints(function)
    problems = [
        problem for name, value in arguments.items() if name in hints for problem in mistyped(value, hints[name], name)
    ]
    raise_collected(ConfigError, problems, doing=function.__name__)


@functools.cache
def _hints(function: Any) -> dict[str, Any]:
    return get_type_hints(function)


def mistyped(value: object, hint: Any, name: str) -> Iterator[str]:
    """Yield which parts of a value are not what a type hint says, by name, with what was expected.

    The hint may be a class, a union, a literal, ``Any``, a `TypedDict`, of which keys that it lacks are no problem, or
    a list, tuple, mapping, sequence or path. Numbers must be finite, and a bool is none; a path must be one that a
    system accepts; a tuple may be a list, as it is in JSON.
    """
    choices = get_args(hint) if get_origin(hint) in UNIONS else (hint,)
    found = [(choice, [*_differences(value, choice, name)]) for choice in choices if _has_form(value, choice)]
    if not found:
        *words, last = dict.fromkeys(word for choice in choices for word in _words(choice).split(" or "))
        options = [word for choice in choices if get_origin(choice) is Literal for word in get_args(choice)]
        near = difflib.get_close_matches(value, options, n=1) if isinstance(value, str) else []
        meant = f": did you mean {near[0]!r}?" if near else ""
        yield f"{name} must be {', '.join(words)}{' or ' if words else ''}{last}, got {shortly(value)}{meant}"
    elif all(problems for _, problems in found):
        yield from found[0][1]
    elif any(get_origin(choice) is os.PathLike for choice in choices) and _is_no_path(value):
        yield f"{name} must be a path, got {shortly(value)}"


def _has_form(value: object, hint: Any) -> bool:
    """Whether a value is of a class, whatever it contains."""
    form = dict if is_typeddict(hint) else get_origin(hint) or hint
    if form is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if form is Any:
        return True
    if form is None:
        return value is None
    if form is tuple:
        return isinstance(value, list | tuple)
    if form in (int, float):
        return isinstance(value, int if form is int else Real) and not isinstance(value, bool)
    return isinstance(value, form) and not (form is Sequence and isinstance(value, str | bytes))


def _differences(value: Any, hint: Any, name: str) -> Iterator[str]:
    """Yield what is wrong inside of a value of the right class."""
    form, args = get_origin(hint) or hint, get_args(hint)
    if is_typeddict(hint):
        hints = _hints(hint)
        yield from (f"{name or 'it'} has no {field}" for field in sorted(hint.__required_keys__ - value.keys()))
        for field in sorted(hints.keys() & value.keys()):
            yield from mistyped(value[field], hints[field], f"{name}.{field}".removeprefix("."))
    elif form is tuple and len(value) != len(args):
        yield f"{name} must have {len(args)} entries, got {len(value)}"
    elif form in (tuple, list, Sequence):
        inner = args if form is tuple else args * len(value)
        for index, (entry, entry_hint) in enumerate(zip(value, inner, strict=True)):
            yield from mistyped(entry, entry_hint, f"{name}[{index}]")
    elif form in (dict, Mapping):
        for key, entry in value.items():
            yield from mistyped(key, args[0], f"a name in {name}")
            yield from mistyped(entry, args[1], f"{name}[{shortly(key)}]")
    elif form is float and not is_finite(value):
        yield f"{name} must be a finite number, got {shortly(value)}"


def _is_no_path(value: object) -> bool:
    """Whether a string or a path is one that no system has."""
    if not isinstance(value, str | os.PathLike):
        return False
    try:
        text = os.fspath(value)
    except Exception:  # whatever an object's own code raises
        return True
    return not isinstance(text, str) or not text or "\0" in text


def is_finite(value: Any) -> bool:
    """Whether a number is finite as a float, which a large integer is not."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _words(hint: Any) -> str:
    form = dict if is_typeddict(hint) else get_origin(hint) or hint
    if form is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    return WORDS.get(types.NoneType if form is None else form, getattr(form, "__name__", str(form)))


def shortly(value: object) -> str:
    """Return a value of any kind and size in a few words."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, NotTheModel):
        return f"a {type(value).__name__}: {IN_PLACE}"
    try:
        text = repr(value)
    except Exception:  # whatever an object's own code raises
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]}… ({type(value).__name__})"

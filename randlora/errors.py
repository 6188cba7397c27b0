"""The exceptions that randlora raises for incorrect use, and its warnings.

Every message says what was expected, what was given, where (the fully qualified name, FQN) and what to do. All problems
of one call are collected and raised together before anything is changed. All problems with options are listed; of other
problems, the first few and the number of the rest.
"""

import json
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

SHOWN, OPTIONS_SHOWN = 5, 100  # problems of one call in full: with layers, tensors or files; with options


def how_to_install(extra: str) -> str:
    """Return the command that installs an extra of this library, from an index or in a checkout."""
    return f"python -m pip install 'randlora[{extra}]', or '.[{extra}]' in a checkout"


# in a shell, the parameters that are not options
_ARGUMENTS: ContextVar[Collection[str] | None] = ContextVar("arguments", default=None)


def named(name: str) -> str:
    """Return the name of a parameter as the caller knows it: ``rank``, or in a shell ``--rank``, or ``OUT``."""
    arguments = _ARGUMENTS.get()
    if arguments is None:
        return name
    return name.upper() if name in arguments else f"--{name.replace('_', '-')}"


def typed(value: object) -> str:
    """Return a value as the caller writes it: ``'lora'``, or in a shell ``lora``."""
    if _ARGUMENTS.get() is None or value in ("", ()):
        return repr(value)
    if isinstance(value, list | tuple):
        return ",".join(map(typed, value))
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def spelled(name: str, value: object = None) -> str:
    """Return an option, with its value if given, as the caller writes it: ``rank=4``, or in a shell ``--rank 4``."""
    if _ARGUMENTS.get() is None:
        said = json.dumps(value, ensure_ascii=False) if isinstance(value, str | list) else value
        return f"{name}={'' if value is None else said}"
    return named(name) if value is None or value is True else f"{named(name)} {typed(value)}"


@contextmanager
def on_command_line(arguments: Collection[str] = ()) -> Iterator[None]:
    """Within the block, let messages name options and values as on the command line, and these ``arguments``."""
    before = _ARGUMENTS.set(arguments)
    try:
        yield
    finally:
        _ARGUMENTS.reset(before)


class RandLoRAError(Exception):
    """Base class of the exceptions of this library. Of several problems, each is an argument after the first line."""

    def __str__(self) -> str:
        """Return the message, with each of several problems on its own line. Line breaks in names are escaped."""
        return "\n  - ".join(str(text).replace("\n", r"\n") for text in self.args)


class ConfigError(RandLoRAError, ValueError):
    """An option has an invalid value, by itself or together with the adapters that the model already has."""


class OptionError(ConfigError, TypeError):
    """An unknown option."""


class TargetError(RandLoRAError, ValueError):
    """The requested targets do not exist or cannot be adapted."""


class AdapterError(RandLoRAError, RuntimeError):
    """The model's adapters are not in the state that the call requires."""


class MergeError(RandLoRAError, RuntimeError):
    """An adapter cannot be merged into its base layer, or unmerged."""


class CheckpointError(RandLoRAError, ValueError):
    """A file is missing, corrupted, of an unknown format, or does not match the model."""


@contextmanager
def refusing(to: str) -> Iterator[None]:
    """Have a `CheckpointError` of the block begin with the call that it refuses."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"cannot {to}: {error.args[0]}", *error.args[1:]) from error


def raise_collected(error: type[RandLoRAError], problems: Sequence[str], *, doing: str) -> None:
    """Raise one error with the first few problems and a count, if there are any; ``doing`` is the refused call."""
    if not problems:
        return
    if len(problems) == 1:
        raise error(f"cannot {doing}: {problems[0]}")
    shown = OPTIONS_SHOWN if issubclass(error, ConfigError) else SHOWN
    more = [f"and {len(problems) - shown} more"] if len(problems) > shown else []
    raise error(f"cannot {doing}, {len(problems)} problems:", *problems[:shown], *more)


def warn(message: str) -> None:
    """Warn at the line outside of this library that made the call."""
    level, frame = 1, sys._getframe()  # from Python 3.12 on, ``skip_file_prefixes`` finds the line
    ours = "randlora.", "torch.utils._contextlib", "contextlib"
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(ours):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)

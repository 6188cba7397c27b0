"""The exceptions that randlora raises for incorrect use, and how it warns.

Every message says what was expected, what was given, where (the fully qualified name, FQN) and what to do. All problems
of one call are collected and raised together before anything is changed: those of options in full, of others the first
few and a count of the rest.
"""

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

SHOWN, OPTIONS_SHOWN = 5, 100
"""Number of problems of one call that are shown in full: of layers, tensors or files, and of options."""


def how_to_install(extra: str) -> str:
    """Return the command that installs an extra of this library, once it is published and in a checkout."""
    return f"python -m pip install 'randlora[{extra}]', or '.[{extra}]' in a checkout"


_ON_COMMAND_LINE = ContextVar("on_command_line", default=False)


def spelled(name: str, value: object = None) -> str:
    """Return an option, with its value if given, as the caller writes it: ``rank=4``, or in a shell ``--rank 4``."""
    if not _ON_COMMAND_LINE.get():
        said = json.dumps(value, ensure_ascii=False) if isinstance(value, str | list) else value
        return f"{name}={'' if value is None else said}"
    words = "" if value in (None, True) else ",".join(value) if isinstance(value, list) else str(value)
    return f"--{name.replace('_', '-')} {words}".rstrip()


@contextmanager
def on_command_line() -> Iterator[None]:
    """Have messages that are made in the block name options as the command line does."""
    before = _ON_COMMAND_LINE.set(True)
    try:
        yield
    finally:
        _ON_COMMAND_LINE.reset(before)


class RandLoRAError(Exception):
    """Base class of the exceptions of this library."""


class ConfigError(RandLoRAError, ValueError):
    """An option has an invalid value, by itself or with the adapters that the model already has."""


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


def raise_collected(error: type[RandLoRAError], problems: Sequence[str], *, doing: str) -> None:
    """Raise one error of a class for all problems, a sentence each, if there are any: the first few, and a count.

    ``doing`` is the refused call, for the first line: ``"inject"``, ``"load 'dir'"``.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise error(f"cannot {doing}: {problems[0]}")
    shown = OPTIONS_SHOWN if issubclass(error, ConfigError) else SHOWN
    lines = [f"cannot {doing}, {len(problems)} problems:", *(f"  - {problem}" for problem in problems[:shown])]
    if len(problems) > shown:
        lines.append(f"  - and {len(problems) - shown} more")
    raise error("\n".join(lines))


def warn(message: str) -> None:
    """Warn at the line outside of this library that made the call.

    From Python 3.12 on `warnings.warn` finds it by ``skip_file_prefixes``. Nothing else here looks at frames so.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("randlora.", "torch.utils._contextlib")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)

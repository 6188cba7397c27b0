"""The errors randlora raises for a user's mistake.

Every message says what was expected, what came, where (the fully qualified name, FQN) and what to do. All problems
that one call finds are collected and raised once, before anything is changed: the first few in full, the rest counted.
"""

from collections.abc import Sequence

SHOWN = 5
"""How many problems of one call are written out; the rest are counted."""


class RandLoRAError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(RandLoRAError, ValueError):
    """An option has a value that cannot work, alone or beside the adapters a model already carries."""


class OptionError(ConfigError, TypeError):
    """An option that the function called does not have."""


class TargetError(RandLoRAError, ValueError):
    """The targets asked for are not there, or cannot carry an adapter."""


class AdapterError(RandLoRAError, RuntimeError):
    """The model's adapters are not in the state the call needs."""


class MergeError(RandLoRAError, RuntimeError):
    """An adapter cannot be folded into its base layer, or unfolded."""


class CheckpointError(RandLoRAError, ValueError):
    """A file is missing, damaged, foreign, or does not fit the model."""


def raise_collected(error: type[RandLoRAError], problems: Sequence[str], *, doing: str) -> None:
    """Raise one error for all problems, the first five in full and the rest counted; do nothing where there is none.

    Args:
        error: The class to raise.
        problems: One sentence each.
        doing: What was refused, for the first line: ``"inject"``, ``"load 'dir'"``.

    Raises:
        RandLoRAError: Of the class given, where there is a problem.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise error(f"cannot {doing}: {problems[0]}")
    lines = [f"cannot {doing}, {len(problems)} problems:", *(f"  - {problem}" for problem in problems[:SHOWN])]
    if len(problems) > SHOWN:
        lines.append(f"  - and {len(problems) - SHOWN} more")
    raise error("\n".join(lines))

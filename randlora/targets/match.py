"""Patterns over fully qualified names: a regex, a list of names or suffixes, or a callable."""

import difflib
import re
from collections.abc import Iterable, Sequence

from torch import nn

from randlora.config import Pattern

NEAREST = 5


def matches(pattern: Pattern, fqn: str, module: nn.Module) -> bool:
    """Whether a pattern matches one module.

    Args:
        pattern: A regex matched with ``fullmatch``; FQNs or suffixes of whole components; or a callable.
        fqn: The module's fully qualified name.
        module: The module, for a callable.
    """
    if callable(pattern):
        return bool(pattern(fqn, module))
    return matches_name(pattern, fqn)


def matches_name(pattern: str | Sequence[str], fqn: str) -> bool:
    """Whether a regex, or one of several names or suffixes, matches an FQN."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, fqn) is not None
    return any(has_suffix(fqn, entry) for entry in pattern)


def has_suffix(fqn: str, suffix: str) -> bool:
    """Whether ``suffix`` is the FQN or its last components."""
    return fqn == suffix or fqn.endswith(f".{suffix}")


def prefixes(fqn: str) -> list[str]:
    """List an FQN and what contains it, outermost first: ``a.b.weight`` gives ``a``, ``a.b`` and ``a.b.weight``."""
    parts = fqn.split(".")
    return [".".join(parts[: length + 1]) for length in range(len(parts))]


def unmatched(pattern: Pattern, fqns: Iterable[str]) -> list[str]:
    """Return the entries of a list of names, or the regex, that match none of ``fqns``; a callable has no entries."""
    fqns = list(fqns)
    if callable(pattern):
        return []
    entries: Sequence[str | Sequence[str]] = [pattern] if isinstance(pattern, str) else [(entry,) for entry in pattern]
    missed = [entry for entry in entries if not any(matches_name(entry, fqn) for fqn in fqns)]
    return [entry if isinstance(entry, str) else entry[0] for entry in missed]


def nearest_names(entry: str, fqns: Iterable[str]) -> str:
    """List the known names most like ``entry``, for an error: last components for a bare word, else whole FQNs."""
    names = set(fqns)
    if "." not in entry:
        names = {fqn.rsplit(".", 1)[-1] for fqn in names}
    near = difflib.get_close_matches(entry, sorted(names), n=NEAREST, cutoff=0.4) or sorted(names)[:NEAREST]
    return ", ".join(near) or "none"

"""Patterns over fully qualified names: a regex, a list of names or suffixes, or a callable."""

import difflib
import functools
import re
from collections.abc import Iterable, Sequence
from typing import TypeGuard

from torch import nn

from randlora.config import NO_REGEX, Pattern
from randlora.errors import spelled

NEAREST, MOST = 5, 20


def matches(pattern: Pattern, fqn: str, module: nn.Module) -> bool:
    """Whether a pattern (a regex, names or suffixes, or a callable) matches one module."""
    if callable(pattern):
        return bool(pattern(fqn, module))
    return matches_name(pattern, fqn)


def matches_name(pattern: str | Sequence[str], fqn: str) -> bool:
    """Whether a regex, or one of several names or suffixes, matches an FQN."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, fqn) is not None
    return f".{fqn}".endswith(_endings(tuple(pattern)))


@functools.lru_cache(maxsize=16)  # called with the same names for every module of a model
def _endings(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f".{name}" for name in names)


def is_names(pattern: Pattern | None) -> TypeGuard[Sequence[str]]:
    """Whether a pattern is a list of names. Names of modules include all their submodules."""
    return pattern is not None and not callable(pattern) and not isinstance(pattern, str)


def is_regex_of(entry: str, fqns: Iterable[str]) -> bool:
    """Whether a name was probably meant as a regex, because as a regex it fully matches some of ``fqns``."""
    try:
        return any(re.fullmatch(entry, fqn) for fqn in fqns)
    except NO_REGEX:
        return False


def has_suffix(fqn: str, suffix: str) -> bool:
    """Whether ``suffix`` is the FQN or its last components."""
    return fqn == suffix or fqn.endswith(f".{suffix}")


def prefixes(fqn: str) -> list[str]:
    """Return an FQN and its parents, outermost first: ``a.b.weight`` gives ``a``, ``a.b`` and ``a.b.weight``."""
    parts = fqn.split(".")
    return [".".join(parts[: length + 1]) for length in range(len(parts))]


def unmatched(pattern: Pattern, fqns: Iterable[str]) -> list[str]:
    """Return the regex, or the entries of a list of names, that match none of ``fqns``; empty for a callable."""
    fqns = list(fqns)
    if callable(pattern):
        return []
    if isinstance(pattern, str):
        return [] if any(matches_name(pattern, fqn) for fqn in fqns) else [pattern]
    endings = {".".join(parts[start:]) for parts in (fqn.split(".") for fqn in fqns) for start in range(len(parts))}
    return [entry for entry in pattern if entry not in endings]


def last_part(fqn: str) -> str:
    """Return the last component of a name."""
    return fqn.rpartition(".")[2]


def nearest_names(entry: str, fqns: Iterable[str]) -> str:
    """Return other names that end with ``entry``, or are most similar to it by last components, or the first ones."""
    known = [fqn for fqn in fqns if fqn != entry]
    ending = [fqn for fqn in known if has_suffix(fqn, entry)]
    choices = [*dict.fromkeys(ending or (known if "." in entry else map(last_part, known)))]
    return ", ".join(difflib.get_close_matches(entry, choices, n=NEAREST, cutoff=0.4) or choices[:NEAREST])


def suggestion(argument: str, entry: str, fqns: Sequence[str], layers: Iterable[str] = ()) -> str:
    """Return a suggestion for a regex or name without a match: similar names, and all short names of ``layers``."""
    names = [name for name in re.split(r"[\s,|()]+", entry.replace("\\.", ".")) if name]
    if names and all(any(has_suffix(fqn, name) for fqn in fqns) for name in names):
        as_list = spelled(argument, names)
        return f"did you mean {as_list}? A string is a regex for full names, a list has names or suffixes"
    short = [*dict.fromkeys(map(last_part, layers))]
    if short and (len(names) != 1 or "." not in entry or re.search(r"[^\w.]", entry)):
        similar = difflib.get_close_matches(last_part(entry), [*dict.fromkeys(map(last_part, fqns))], n=NEAREST)
        return f"the model has {shortened([*dict.fromkeys([*similar, *short])], MOST)}"
    near = nearest_names(entry, fqns)
    return near and f"the nearest names are {near}"


def shortened(fqns: Sequence[str], most: int = 4) -> str:
    """Return the first few names and the number of others."""
    return ", ".join(fqns[:most]) + (f" and {len(fqns) - most} more" if len(fqns) > most else "")

"""Messages about modules that cannot be adapted and patterns that match no layer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from torch.nn.parameter import is_lazy

from randlora.config import Pattern
from randlora.errors import SHOWN
from randlora.layers.in_place import plain_class
from randlora.layers.registry import find_readers
from randlora.targets.match import is_names, is_regex_of, matches_name, prefixes, shortened, suggestion
from randlora.targets.walk import Visit

ALL_LINEAR = "all-linear"
LISTED = 5


def layer_names(visits: Iterable[Visit]) -> list[str]:
    """Return the FQNs of the linear layers."""
    return [visit.fqn for visit in visits if isinstance(visit.entry, type)]


def holders(visits: Iterable[Visit]) -> set[str]:
    """Return the FQNs of the modules that contain linear layers."""
    return {name for fqn in layer_names(visits) for name in prefixes(fqn)[:-1]}


def reason(visit: Visit) -> str | None:
    """Return why a module cannot be adapted; ``None`` for linear layers, containers and modules without a matrix."""
    entry = visit.entry
    if isinstance(entry, str):
        return entry
    parameters = [parameter for parameter in visit.module._parameters.values() if parameter is not None]
    is_owner = bool(find_readers(visit.module))  # of weights adapted on read
    if entry is None and not is_owner and any(is_lazy(parameter) or parameter.ndim >= 2 for parameter in parameters):
        return f"of type {plain_class(visit.module).__name__}, and only linear layers can be adapted"
    return None


def refusal(visit: Visit) -> str:
    """Return the message about a matched module that cannot be adapted."""
    if visit.entry is not None:
        return f"{visit.fqn} ({plain_class(visit.module).__name__}) cannot be adapted: {reason(visit)}"
    return f"{visit.fqn} is {reason(visit)}: narrow the pattern, or give exclude={json.dumps([visit.fqn])}"


def missed(visits: Sequence[Visit], argument: str, pattern: Pattern, entries: Sequence[str]) -> list[str]:
    """Return a message for every regex or name that matches no layer, with a suggestion.

    Suggestions take time and are made only for those that an error shows in full.
    """
    told = [_missed(visits, argument, pattern, entry) for entry in entries[:SHOWN]]
    return [*told, *(f"{argument}={entry!r} matches no linear layer" for entry in entries[SHOWN:])]


def _missed(visits: Sequence[Visit], argument: str, pattern: Pattern, entry: str) -> str:
    said = f"{argument}={entry!r} matches no linear layer"
    layers = layer_names(visits)
    if argument == "targets" and re.sub(r"[-_\s]", "", entry).lower() == "alllinear":
        return f'{said}; did you mean targets="{ALL_LINEAR}"?'
    if is_names(pattern) and is_regex_of(entry, layers):
        return f'{said}: the entries of a list are names, not regexes; did you mean {argument}=r"{entry}"?'
    name = pattern if isinstance(pattern, str) else (entry,)
    only = [f"{visit.fqn} ({plain_class(visit.module).__name__})" for visit in visits if matches_name(name, visit.fqn)]
    said += f", only {shortened(only, LISTED)}" if only else ""
    known = [visit.fqn for visit in visits] if argument == "exclude" else [*layers, *holders(visits)]
    return f"{said}; {suggestion(argument, entry, known, common=layers) or inventory(visits)}"


def inventory(visits: Sequence[Visit]) -> str:
    """Return a list of the model's linear layers or, if it has none, of its types of modules."""
    if layers := layer_names(visits):
        return f"the model has {shortened(layers, LISTED)}"
    kinds = sorted({plain_class(visit.module).__name__ for visit in visits})
    return f"the model has no linear layer, only {shortened(kinds, LISTED)}" if kinds else "the model has no submodules"

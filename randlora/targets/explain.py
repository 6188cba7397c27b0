"""Messages about modules and parameters that cannot be adapted, and patterns that match nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch.nn.parameter import is_lazy

from randlora.config import Pattern
from randlora.errors import SHOWN, spelled
from randlora.layers.in_place import plain_class
from randlora.layers.registry import find_readers
from randlora.targets.left_out import ALL, ALL_LINEAR, REGISTER
from randlora.targets.match import has_suffix, is_names, is_regex_of, matches_name, prefixes, shortened, suggestion
from randlora.targets.walk import Census, Held, Visit

NOTHING = "matches no layer or weight that can be adapted"
LISTED = 5


def layer_names(visits: Iterable[Visit]) -> list[str]:
    """Return the FQNs of the layers and weights that have an adapter layer."""
    return [visit.fqn for visit in visits if isinstance(visit.entry, type)]


def holders(visits: Iterable[Visit]) -> set[str]:
    """Return the FQNs of the modules that contain such layers or weights."""
    return {name for fqn in layer_names(visits) for name in prefixes(fqn)[:-1]}


def reason(visit: Visit) -> str | None:
    """Return why a module cannot be adapted; ``None`` for those that can, containers and modules without a matrix."""
    entry = visit.entry
    if isinstance(entry, str):
        return entry
    parameters = [parameter for parameter in visit.module._parameters.values() if parameter is not None]
    is_owner = bool(find_readers(visit.module))  # of weights adapted on read
    if entry is None and not is_owner and any(is_lazy(parameter) or parameter.ndim >= 2 for parameter in parameters):
        return f"of type {plain_class(visit.module).__name__}, for which there is no adapter layer"
    return None


def refusal(visit: Visit) -> str:
    """Return the message about a matched module that cannot be adapted."""
    if visit.entry is not None:
        return f"{visit.fqn} ({plain_class(visit.module).__name__}) cannot be adapted: {reason(visit)}"
    return f"{visit.fqn} is {reason(visit)}: {_remedies(visit.fqn)}"


def stray_refusal(held: Held) -> str:
    """Return the message about a matched parameter that has no adapter layer."""
    return f"{held.fqn} is {_described(held)}, for which there is no adapter layer: {_remedies(held.fqn)}"


def _remedies(fqn: str) -> str:
    return f"narrow the pattern, give {spelled('exclude', [fqn])}, or {REGISTER}"


def _described(held: Held) -> str:
    shape = "no shape yet" if is_lazy(held.parameter) else f"shape {tuple(held.parameter.shape)}"
    return f"a parameter of {plain_class(held.module).__name__} with {shape}"


def missed(census: Census, argument: str, pattern: Pattern, entries: Sequence[str]) -> list[str]:
    """Return a message for every regex or name that matches nothing, with a suggestion.

    Suggestions take time and are made only for those that an error shows in full.
    """
    told = [_missed(census, argument, pattern, entry) for entry in entries[:SHOWN]]
    return [*told, *(_said(argument, entry) for entry in entries[SHOWN:])]


def _said(argument: str, entry: str) -> str:
    return f"{argument}={entry!r} {NOTHING if argument == 'targets' else 'matches no layer or weight'}"


def _missed(census: Census, argument: str, pattern: Pattern, entry: str) -> str:
    visits, said = census.candidates, _said(argument, entry)
    layers = layer_names(visits)
    rules = {re.sub(r"\W", "", rule): rule for rule in (ALL_LINEAR, ALL)}
    if argument == "targets" and (rule := rules.get(re.sub(r"[-_\s]", "", entry).lower())) is not None:
        return f"{said}; did you mean {spelled('targets', rule)}?"
    if is_names(pattern) and is_regex_of(entry, layers):
        return f'{said}: the entries of a list are names, not regexes; did you mean {argument}=r"{entry}"?'
    name = pattern if isinstance(pattern, str) else (entry,)
    if named := [held for held in census.parameters if _is_named(census, held, name, entry)]:
        return f"{said}, only {shortened([f'{held.fqn} ({_role(census, held)})' for held in named], LISTED)}"
    only = [f"{visit.fqn} ({plain_class(visit.module).__name__})" for visit in visits if matches_name(name, visit.fqn)]
    said += f", only {shortened(only, LISTED)}" if only else ""
    known = [visit.fqn for visit in visits] if argument == "exclude" else [*layers, *holders(visits)]
    return f"{said}; {suggestion(argument, entry, known, common=layers) or inventory(visits)}"


def _is_named(census: Census, held: Held, name: str | Sequence[str], entry: str) -> bool:
    """Whether a regex or names match a parameter that is no target under its own name, or its last components."""
    site = census.site_of(held)
    return (site is None or site.fqn != held.fqn) and (matches_name(name, held.fqn) or has_suffix(held.fqn, entry))


def _role(census: Census, held: Held) -> str:
    """Return what a parameter is that is no target under its own name."""
    if (site := census.site_of(held)) is not None:
        return f"a parameter of {site.fqn}, which is the name to give"
    if is_lazy(held.parameter) or held.parameter.ndim >= 2:
        return f"{_described(held)}, for which there is no adapter layer: {REGISTER}"
    return f"{_described(held)}, not a matrix"


def inventory(visits: Sequence[Visit]) -> str:
    """Return a list of the model's layers that can be adapted or, if it has none, of its types of modules."""
    if layers := layer_names(visits):
        return f"the model has {shortened(layers, LISTED)}"
    kinds = sorted({plain_class(visit.module).__name__ for visit in visits})
    nothing = "the model has no layer or weight that can be adapted"
    return f"{nothing}, only {shortened(kinds, LISTED)}" if kinds else "the model has no submodules"

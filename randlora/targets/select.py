"""Selecting layers by pattern, and reasons why layers cannot be adapted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from randlora.config import Pattern, RandLoRAConfig
from randlora.errors import TargetError, raise_collected
from randlora.layers.in_place import class_obstacle
from randlora.layers.read_weight import ReadWeight
from randlora.layers.registry import find_layer
from randlora.targets.defaults import default_targets
from randlora.targets.explain import ALL_LINEAR, holders, inventory, missed, reason, refusal
from randlora.targets.match import is_names, matches, prefixes, unmatched
from randlora.targets.presets import HEAD_NAMES
from randlora.targets.site import Site
from randlora.targets.walk import Census, Held, Visit

LINEAR_KINDS = "linear", "attention"
"""Kinds of weights that ``"all-linear"`` adapts."""


@dataclass(frozen=True)
class Selection:
    """The sites that a pattern selects, the rule that chose them, and why others were skipped, by FQN."""

    sites: tuple[Site, ...]
    rule: str
    skipped: dict[str, str]


@runtime_checkable
class HasOutputEmbeddings(Protocol):
    """A transformers model."""

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output head."""


def find_targets(model: nn.Module, targets: Pattern | None = None, exclude: Pattern | None = None) -> list[Site]:
    """Return the layers that would be adapted, without changing the model.

    Args:
        model: Any module.
        targets: See `RandLoRAConfig.targets`.
        exclude: See `RandLoRAConfig.exclude`.

    Returns:
        One site for each weight, in the model's order.

    Raises:
        ConfigError: If ``targets`` or ``exclude`` is not a pattern.
        TargetError: If a pattern or a name matches nothing, or a match cannot be adapted.
    """
    checked = RandLoRAConfig(targets=targets, exclude=exclude)
    return list(select(Census.of(model), checked.targets, checked.exclude).sites)


def select(census: Census, pattern: Pattern | None, exclude: Pattern | None) -> Selection:
    """Return the layers matched by a pattern, with the rule applied; arguments and errors as in `find_targets`."""
    model, visits = census.model, census.candidates
    if not visits and find_layer(model) is not None:
        raise TargetError(
            f"the model itself is a layer ({type(model).__name__}) and has no name within a model: "
            "wrap it in a module, as in torch.nn.Sequential(layer), and adapt that"
        )
    pattern, rule, must_match = _resolve(census, pattern)
    opens = must_match and is_names(pattern)
    if pattern == ALL_LINEAR:
        found = [visit for visit in visits if isinstance(visit.entry, str) or _is_linear(visit)]
    else:
        found = [visit for visit in visits if _is_meant(visit, pattern, opens=opens)]
    excluded = [] if exclude is None else _excluded(visits, found, exclude)
    problems = []
    if exclude is not None:  # each entry must match a module, and a regex one that is not only a container
        closed = holders(visits) if isinstance(exclude, str) else set()
        known = [visit.fqn for visit in visits if visit.fqn not in closed]
        problems = missed(visits, "exclude", exclude, unmatched(exclude, known))
    excluded_keys = {visit.key for visit in excluded}
    kept = [visit for visit in found if visit.key not in excluded_keys]
    if pattern == ALL_LINEAR:
        chosen, skipped = _all_linear(model, kept)
    else:
        chosen, skipped, refused = _matching(visits, kept, pattern, opens=opens)
        problems += [refusal(visit) for visit in refused]
        reached = [*chosen, *excluded, *refused]
        if must_match:
            names = {name for visit in reached for name in _names(visit, opens=opens)}
            problems += missed(visits, "targets", pattern, unmatched(pattern, names))
        if not (reached or problems):
            problems.append(f"{rule} matches no linear layer; {inventory(visits)}")
    raise_collected(TargetError, problems, doing="find the targets")
    rule += "" if exclude is None else ", without the excluded"
    if not chosen:
        raise TargetError(f"{rule}: no layer is left to adapt; give targets= that match one; {inventory(visits)}")
    wanted = {visit.key for visit in chosen}
    return Selection(tuple(site for site in census.sites if site.key in wanted), rule, skipped)


def obstacles(census: Census, sites: Sequence[Site], dropout: float) -> list[str]:
    """Return why sites cannot be adapted: an unsuitable class or weight, or a weight tied to another module."""
    problems, sound = [], []
    for site in sites:
        if (reason := class_obstacle(site.owner, site.layer_class)) is not None:
            problems.append(f"{site.fqn} {reason}")
            continue
        weight = site.weight
        if is_parametrized(site.owner) or weight is None:
            problems.append(f"{site.fqn} computes its weight from other parameters: remove the parametrization first")
        elif is_lazy(weight):
            problems.append(f"{site.fqn} has no shape yet: run one forward pass first")
        elif (reason := site.layer_class.obstacle(site.owner)) is not None:
            problems.append(f"{site.fqn} {reason}")
        elif dropout and issubclass(site.layer_class, ReadWeight):
            problems.append(
                f"{site.fqn} is a weight that other code reads, whose input {dropout=} cannot reach: "
                "omit dropout, or exclude this weight"
            )
        else:
            sound.append(site)
    return [*problems, *tie_problems(census, sound)]


def tie_problems(census: Census, sites: Sequence[Site]) -> list[str]:
    """Return messages about weights that are tied to other modules."""
    holders: dict[object, list[Held]] = {}
    for held in census.parameters:
        if not is_lazy(held.parameter):
            holders.setdefault(_identity(held.parameter), []).append(held)
    problems = []
    for site in sites:
        weight = site.weight
        found = [] if weight is None else holders.get(_identity(weight), [])
        others = [held.fqn for held in found if held.module is not site.owner]
        if others:
            problems.append(f"the weight of {site.fqn} is tied to {', '.join(others)}: untie it, or exclude the layer")
    return problems


def _identity(parameter: Tensor) -> object:
    """Return a key that is equal for parameters that share memory."""
    is_plain = type(parameter.data) is Tensor and not parameter.is_meta and parameter.numel() > 0
    return (parameter.device, parameter.data_ptr()) if is_plain else id(parameter)


def _resolve(census: Census, pattern: Pattern | None) -> tuple[Pattern, str, bool]:
    """Return the effective pattern, its description, and whether each of its entries must match."""
    if pattern is None and (default := default_targets(census)) is not None:
        return *default, False
    if pattern is None or pattern == ALL_LINEAR:
        return ALL_LINEAR, "all linear layers but the output head", True
    if callable(pattern):
        return pattern, f"the callable {getattr(pattern, '__name__', type(pattern).__name__)}", True
    if isinstance(pattern, str):
        return pattern, f"the regex '{pattern}'", True
    return tuple(pattern), f"the names {', '.join(pattern)}", True


def _names(visit: Visit, *, opens: bool) -> list[str]:
    """Return the names that a pattern may match a module by: its FQN, and if ``opens``, those of its parents."""
    return prefixes(visit.fqn) if opens else [visit.fqn]


def _is_meant(visit: Visit, pattern: Pattern, *, opens: bool) -> bool:
    return any(matches(pattern, name, visit.module) for name in _names(visit, opens=opens))


def _is_linear(visit: Visit) -> bool:
    entry = visit.entry
    return entry is not None and not isinstance(entry, str) and entry.kind in LINEAR_KINDS


def _matching(
    visits: Sequence[Visit], found: Sequence[Visit], pattern: Pattern, *, opens: bool
) -> tuple[list[Visit], dict[str, str], list[Visit]]:
    """Split matches into linear layers, other layers inside a named module (skipped), and other named layers."""
    chosen, skipped, refused = [], {}, []
    opened = holders(visits) if opens else set()
    for visit in found:
        if isinstance(visit.entry, type):
            chosen.append(visit)
        elif visit.fqn not in opened and (why := reason(visit)) is not None:
            if opens and not matches(pattern, visit.fqn, visit.module):
                skipped[visit.fqn] = why
            else:
                refused.append(visit)
    return chosen, skipped, refused


def _all_linear(model: nn.Module, visits: Sequence[Visit]) -> tuple[list[Visit], dict[str, str]]:
    head = model.get_output_embeddings() if isinstance(model, HasOutputEmbeddings) else None
    linear = [(visit, entry) for visit in visits if (entry := visit.entry) is not None]
    heads = {visit.key for visit, _ in linear if visit.module is head or visit.fqn.split(".")[0] in HEAD_NAMES}
    skipped = {visit.fqn: entry for visit, entry in linear if isinstance(entry, str)}
    skipped |= {visit.fqn: "the output head" for visit, entry in linear if visit.key in heads}
    return [visit for visit, _ in linear if visit.fqn not in skipped], skipped


def _excluded(visits: Sequence[Visit], found: Sequence[Visit], exclude: Pattern) -> list[Visit]:
    """Return the modules that ``exclude`` matches, at all of their places; a name in a list includes all submodules.

    A callable is called only for the layers that the targets match.
    """
    asked = visits
    if callable(exclude):
        layers = {visit.key for visit in found if visit.entry is not None or reason(visit)}
        asked = [visit for visit in visits if visit.key in layers]
    matched = {visit.key for visit in asked if _is_meant(visit, exclude, opens=is_names(exclude))}
    return [visit for visit in visits if visit.key in matched]

"""From a pattern to the layers it means, and what cannot be adapted, with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
from randlora.targets.explain import ALL_LINEAR, holders, inventory, missed, reason, refusal
from randlora.targets.match import is_names, matches, prefixes, unmatched
from randlora.targets.presets import HEAD_NAMES, TARGET_PRESETS
from randlora.targets.site import Site
from randlora.targets.walk import Census, Held, Visit


@dataclass(frozen=True)
class Selection:
    """What a pattern came to.

    Attributes:
        sites: The weights, in the model's order.
        rule: The rule that chose them, in words.
        skipped: Layers that ``"all-linear"`` or the name of a module passes over, with the reason, by FQN.
    """

    sites: tuple[Site, ...]
    rule: str
    skipped: dict[str, str]


@runtime_checkable
class HasOutputEmbeddings(Protocol):
    """A transformers model, as far as the walker cares."""

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output head."""


def find_targets(model: nn.Module, targets: Pattern | None = None, exclude: Pattern | None = None) -> list[Site]:
    """Return the layers that targets mean, without touching anything.

    Args:
        model: Any module.
        targets: As `RandLoRAConfig.targets`.
        exclude: As `RandLoRAConfig.exclude`.

    Returns:
        One site for each weight, in the model's order.

    Raises:
        ConfigError: When ``targets`` or ``exclude`` is no pattern.
        TargetError: When a pattern or a name matches nothing, or what it matches cannot be adapted.
    """
    checked = RandLoRAConfig(targets=targets, exclude=exclude)
    return list(select(Census.of(model), checked.targets, checked.exclude).sites)


def select(census: Census, pattern: Pattern | None, exclude: Pattern | None) -> Selection:
    """Return the layers a pattern means, with the rule that applied; arguments and errors as in `find_targets`."""
    model, visits = census.model, census.candidates
    if not visits and find_layer(model) is not None:
        raise TargetError(
            f"the model itself is a {type(model).__name__}, which has no name to call its adapter by: "
            "put it into a module, as in torch.nn.Sequential(layer), and adapt that"
        )
    pattern, rule, must_match = _resolve(model, pattern)
    opens = must_match and is_names(pattern)
    if pattern == ALL_LINEAR:
        found = [visit for visit in visits if visit.entry is not None]
    else:
        found = [visit for visit in visits if _is_meant(visit, pattern, opens=opens)]
    excluded = [] if exclude is None else _excluded(visits, found, exclude)
    problems = [] if exclude is None else _exclude_problems(visits, exclude)
    kept = _without(found, excluded)
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
        raise TargetError(f"{rule} leaves no layer to adapt: give targets= that match one; {inventory(visits)}")
    wanted = {visit.key for visit in chosen}
    return Selection(tuple(site for site in census.sites if site.key in wanted), rule, skipped)


def obstacles(census: Census, sites: Sequence[Site], dropout: float) -> list[str]:
    """Return why sites cannot be adapted: no weight of their own that serves, or one that something else shares.

    Args:
        census: The model.
        sites: Of it.
        dropout: Dropout on the adapter's input.
    """
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
                f"{site.fqn} is adapted as it is read, where there is no input for {dropout=} to fall on: "
                "leave dropout out, or this weight"
            )
        else:
            sound.append(site)
    return [*problems, *tie_problems(census, sound)]


def tie_problems(census: Census, sites: Sequence[Site]) -> list[str]:
    """Return which of some weights something else in the model shares."""
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
            problems.append(
                f"the weight of {site.fqn} is tied to {', '.join(others)}: untie it, or leave the layer out"
            )
    return problems


def _identity(parameter: Tensor) -> object:
    """What two parameters over the same memory have in common."""
    is_plain = type(parameter.data) is Tensor and not parameter.is_meta and parameter.numel() > 0
    return (parameter.device, parameter.data_ptr()) if is_plain else id(parameter)


def _resolve(model: nn.Module, pattern: Pattern | None) -> tuple[Pattern, str, bool]:
    """Return the pattern that applies, its name in words, and whether each of its entries must match."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if pattern is None and model_type in TARGET_PRESETS:
        preset = TARGET_PRESETS[model_type]
        names = preset if isinstance(preset, str) else ", ".join(preset)
        return preset, f"the preset of model_type {model_type!r} ({names})", False
    if pattern is None or pattern == ALL_LINEAR:
        return ALL_LINEAR, "all linear layers but the output head", True
    if callable(pattern):
        return pattern, f"the callable {getattr(pattern, '__name__', type(pattern).__name__)}", True
    if isinstance(pattern, str):
        return pattern, f"the regex '{pattern}'", True
    return tuple(pattern), f"the names {', '.join(pattern)}", True


def _names(visit: Visit, *, opens: bool) -> list[str]:
    """Return the names by which a pattern may mean a module: its own and, where it ``opens`` modules, their names."""
    return prefixes(visit.fqn) if opens else [visit.fqn]


def _is_meant(visit: Visit, pattern: Pattern, *, opens: bool) -> bool:
    return any(matches(pattern, name, visit.module) for name in _names(visit, opens=opens))


def _matching(
    visits: Sequence[Visit], found: Sequence[Visit], pattern: Pattern, *, opens: bool
) -> tuple[list[Visit], dict[str, str], list[Visit]]:
    """Sort what a pattern means: linear layers, what a named module holds beside them, and what is refused by name."""
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
    heads = {visit.key for visit, _ in linear if _is_head(visit, head)}
    skipped = {visit.fqn: entry for visit, entry in linear if isinstance(entry, str)}
    skipped |= {visit.fqn: "the output head" for visit, entry in linear if visit.key in heads}
    return [visit for visit, _ in linear if visit.fqn not in skipped], skipped


def _is_head(visit: Visit, head: nn.Module | None) -> bool:
    named_so = visit.fqn.split(".")[0] in HEAD_NAMES
    return named_so or (head is not None and visit.module is head)


def _excluded(visits: Sequence[Visit], found: Sequence[Visit], exclude: Pattern) -> list[Visit]:
    """Return what ``exclude`` matches, under all of its names; a name in a list means all inside too.

    A callable is asked about the layers that the targets mean and no other modules.
    """
    asked = visits
    if callable(exclude):
        layers = {visit.key for visit in found if visit.entry is not None or reason(visit)}
        asked = [visit for visit in visits if visit.key in layers]
    matched = {visit.key for visit in asked if _is_meant(visit, exclude, opens=is_names(exclude))}
    return [visit for visit in visits if visit.key in matched]


def _exclude_problems(visits: Sequence[Visit], exclude: Pattern) -> list[str]:
    """Name the entries that match no module, and a regex that matches nothing but what holds layers."""
    closed = holders(visits) if isinstance(exclude, str) else set()
    known = [visit.fqn for visit in visits if visit.fqn not in closed]
    return missed(visits, "exclude", exclude, unmatched(exclude, known))


def _without(visits: Iterable[Visit], excluded: Iterable[Visit]) -> list[Visit]:
    left_out = {visit.key for visit in excluded}
    return [visit for visit in visits if visit.key not in left_out]

"""The matrices that an adapter leaves out, and messages about patterns that match nothing that can be adapted."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from torch.nn.parameter import is_lazy

from randlora.bases.spec import count_trainable
from randlora.config import Pattern, RandLoRAConfig
from randlora.errors import SHOWN, spelled
from randlora.layers.in_place import plain_class
from randlora.layers.registry import KINDS, find_kinds
from randlora.targets.census import Candidate, Census, Held, Site
from randlora.targets.match import has_suffix, is_names, is_regex_of, matches_name, prefixes, shortened, suggestion
from randlora.targets.obstacles import obstacle, tied_names
from randlora.targets.options import ranks_of_others

ALL, ALL_LINEAR = "all", "all-linear"
LINEAR_KINDS = frozenset({"linear", "attention"})
NOUNS = {
    "linear": "linear layer",
    "attention": "attention weight",
    "convolution": "convolution",
    "embedding": "embedding",
    "experts": "expert tensor",
}
EXCLUDED = "excluded"
TIED = "tied to parameters of other modules: untie it first"
REGISTER = "register one with randlora.layers.register_layer"
LITTLE = 1e-4
"""The share of a model's parameters below which a default warns."""
DOUBT = "the default adapts only"
TYPES_SHOWN = 3

NOTHING = "matches no layer or weight that can be adapted"

LISTED = 5


class Remaining(NamedTuple):
    """A matrix that is left out.

    Attributes:
        held: The parameter, at its first place.
        site: Its site, or ``None`` if there is no adapter layer for it.
        numbers: How many entries it has, dequantized.
        reason: Why only a change of the model or of ``exclude`` could get it adapted, if so.
    """

    held: Held
    site: Site | None
    numbers: int
    reason: str | None

    @property
    def fqn(self) -> str:
        """The name to give in ``targets``, or the parameter's if it cannot be a target."""
        return self.held.fqn if self.site is None else self.site.fqn

    @property
    def group(self) -> tuple[int, str, str]:
        """A key that is equal for matrices that are reported together, in the order of reports."""
        order = len(KINDS) if self.site is None else KINDS.index(self.site.layer_class.kind)
        return order, "" if self.site else plain_class(self.held.module).__name__, self.reason or ""


@dataclass(frozen=True)
class LeftOut:
    """Matrices of one kind that an adapter leaves out, for one reason.

    Attributes:
        kind: Their kind, as `AdapterLayer.kind`; ``None`` if there is no adapter layer for them.
        owner: The type of the modules that have them, if there is no adapter layer for them.
        fqns: Their names.
        parameters: Number of their entries.
        share: ``parameters`` as a share of the model's parameters.
        trainable: Number of trainable parameters that adapting them would add; 0 if they cannot be adapted.
        targets: The value of ``targets`` that includes them, if any.
        reason: Why only a change of the model or of ``exclude`` could get them adapted, if so.
    """

    kind: str | None
    owner: str | None
    fqns: tuple[str, ...]
    parameters: int
    share: float
    trainable: int
    targets: str | None
    reason: str | None

    def __str__(self) -> str:
        """Return one line of a report."""
        count = len(self.fqns)
        noun = NOUNS[self.kind] if self.kind else "parameter"
        what = f"{count:,} {noun}{'s' * (count > 1)}" + (f" of {self.owner}" if self.owner else "")
        what += f", {self.share:.2%} of the weights"
        if self.kind is None and self.reason is None:
            return f"no adapter layer for {what}: {REGISTER}"
        if self.reason is not None:
            return f"left out: {what} ({self.reason})"
        line = f"left out: {what}: {spelled('targets', self.targets)} adapts {'them' if count > 1 else 'it'}"
        return f"{line} and trains {self.trainable:,} more parameters" if self.kind == "experts" else line


def remaining(
    census: Census,
    chosen: Collection[tuple[int, str]],
    skipped: Collection[str],
    excluded: Collection[tuple[int, str]],
) -> tuple[Remaining, ...]:
    """Return the matrices of a model that are neither adapted (by key), nor skipped for a reason (by FQN)."""
    passed = {id(visit.module) for visit in census.candidates if visit.fqn in skipped and isinstance(visit.entry, str)}
    passed_sites = {visit.key for visit in census.candidates if visit.fqn in skipped and isinstance(visit.entry, type)}
    left: list[tuple[Held, Site | None]] = []
    for places in census.matrices:
        sites = [site for held in places if (site := census.site_of(held)) is not None]
        is_passed = any(id(held.module) in passed or held.fqn in skipped for held in places)
        if not is_passed and not any(site.key in chosen or site.key in passed_sites for site in sites):
            left.append((places[0], sites[0] if sites else None))
    tied = tied_names(census, [site for _, site in left if site is not None]).keys()
    return tuple(
        Remaining(held, site, census.count_numbers(held), _reason(census, held, site, excluded, tied))
        for held, site in left
    )


def _reason(
    census: Census,
    held: Held,
    site: Site | None,
    excluded: Collection[tuple[int, str]],
    tied: Collection[tuple[int, str]],
) -> str | None:
    if site is None:
        refused = census.kinds[id(held.module)].called
        return EXCLUDED if (id(held.module), "weight") in excluded else refused if isinstance(refused, str) else None
    if site.key in excluded:
        return EXCLUDED
    useless = census.uncalled.get(site.key) or census.untrainable.get(site.key)
    return obstacle(site) or useless or (TIED if site.key in tied else None)


def left_out(matrices: Iterable[Remaining], config: RandLoRAConfig, total: int) -> tuple[LeftOut, ...]:
    """Return a summary of matrices that are left out: kinds with an adapter layer first, then types without."""
    groups = []
    key = attrgetter("group")
    for (order, owner, reason), found in groupby(sorted(matrices, key=key), key=key):
        members = list(found)
        sites = {member.site.key: member.site for member in members if member.site is not None}
        kind = KINDS[order] if order < len(KINDS) else None
        numbers = sum(member.numbers for member in members)
        can = kind is not None and not reason
        groups.append(
            LeftOut(
                kind=kind,
                owner=owner or None,
                fqns=tuple(dict.fromkeys(member.fqn for member in members)),
                parameters=numbers,
                share=numbers / total if total else 0.0,
                trainable=_count_trainable([*sites.values()], config) if can else 0,
                targets=(ALL_LINEAR if kind in LINEAR_KINDS else ALL) if can else None,
                reason=reason or None,
            )
        )
    return tuple(groups)


def _count_trainable(sites: Sequence[Site], config: RandLoRAConfig) -> int:
    """Return the number of trainable parameters that adapting some sites would add."""
    ranks = ranks_of_others(config, [site.fqn for site in sites])
    return sum(count_trainable(site.shape_with(config), ranks[site.fqn]) for site in sites)


def lines(groups: Sequence[LeftOut]) -> list[str]:
    """Return a few lines of a report. Only the largest types without an adapter layer are named."""
    served = [group for group in groups if group.kind is not None or group.reason is not None]
    others = sorted(groups, key=lambda group: -group.parameters)
    others = [group for group in others if group.kind is None and group.reason is None]
    told = [str(group) for group in [*served, *others[:TYPES_SHOWN]]]
    if rest := others[TYPES_SHOWN:]:
        count, share = sum(len(group.fqns) for group in rest), sum(group.share for group in rest)
        types = shortened([group.owner for group in rest if group.owner])
        told.append(
            f"no adapter layer for {count:,} parameter{'s' * (count > 1)} of {types}, {share:.2%} of the weights"
        )
    return told


def doubt(census: Census, sites: Sequence[Site], groups: Sequence[LeftOut]) -> str:
    """Return a warning if the default adapts almost nothing, or only a layer that looks like a head; else nothing."""
    others = [group for group in groups if group.reason != EXCLUDED]
    if not others or not census.size:
        return ""
    weights = {id(site.weight) for site in sites}
    own = [places for places in census.matrices if id(places[0].tensor) in weights]
    share = sum(census.count_numbers(places[0]) for places in own) / census.size
    is_head = len(own) == 1 and own[0] is census.matrices[-1]
    if not is_head and share >= LITTLE:
        return ""
    names = shortened([site.fqn for site in sites])
    like = ", the last matrix of the model, which looks like its head" if is_head else ""
    wider = dict.fromkeys(spelled("targets", group.targets) for group in others if group.targets)
    advice = " or ".join(wider) if wider else f"{spelled('targets')} or register adapter layers to adapt more"
    return f"{DOUBT} {names}, {share:.2%} of the weights{like}: give {advice}"


def layer_names(visits: Iterable[Candidate]) -> list[str]:
    """Return the FQNs of the layers and weights that have an adapter layer."""
    return [visit.fqn for visit in visits if isinstance(visit.entry, type)]


def holders(visits: Iterable[Candidate]) -> set[str]:
    """Return the FQNs of the modules that contain such layers or weights."""
    return {name for fqn in layer_names(visits) for name in prefixes(fqn)[:-1]}


def reason(visit: Candidate) -> str | None:
    """Return why a module cannot be adapted. ``None`` if it can be, is a container, or has no matrix."""
    entry = visit.entry
    if isinstance(entry, str):
        return entry
    has_matrix = any(
        is_lazy(parameter) or parameter.ndim >= 2
        for parameter in visit.module._parameters.values()
        if parameter is not None
    )
    if entry is None and has_matrix and not find_kinds(visit.module).read:  # no owner of weights adapted on read
        return f"of type {plain_class(visit.module).__name__}, for which there is no adapter layer"
    return None


def refusal(visit: Candidate) -> str:
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
    shape = "no shape yet" if is_lazy(held.tensor) else f"shape {tuple(held.tensor.shape)}"
    return f"a parameter of {plain_class(held.module).__name__} with {shape}"


def missed(census: Census, argument: str, pattern: Pattern, entries: Sequence[str]) -> list[str]:
    """Return a message for every regex or name that matches nothing, with suggestions for those shown in full."""
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
    """Whether a regex or names match a parameter that is not a target under its own name, or its last components."""
    site = census.site_of(held)
    return (site is None or site.fqn != held.fqn) and (matches_name(name, held.fqn) or has_suffix(held.fqn, entry))


def _role(census: Census, held: Held) -> str:
    """Return a description of a parameter that is not a target under its own name."""
    if (site := census.site_of(held)) is not None:
        return f"a parameter of {site.fqn}, which is the name to give"
    if is_lazy(held.tensor) or held.tensor.ndim >= 2:
        return f"{_described(held)}, for which there is no adapter layer: {REGISTER}"
    return f"{_described(held)}, not a matrix"


def inventory(visits: Sequence[Candidate]) -> str:
    """Return a list of the model's layers that can be adapted or, if it has none, of its types of modules."""
    if layers := layer_names(visits):
        return f"the model has {shortened(layers, LISTED)}"
    kinds = sorted({plain_class(visit.module).__name__ for visit in visits})
    nothing = "the model has no layer or weight that can be adapted"
    return f"{nothing}, only {shortened(kinds, LISTED)}" if kinds else "the model has no submodules"

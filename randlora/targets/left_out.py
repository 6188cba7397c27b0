"""The matrices that an adapter leaves out, and messages about patterns that match nothing that can be adapted."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch.nn.parameter import is_lazy

from randlora.config import Pattern
from randlora.errors import SHOWN, spelled
from randlora.layers.in_place import plain_class
from randlora.layers.registry import KINDS
from randlora.targets.census import Candidate, Census, Held, Key, Site
from randlora.targets.match import has_suffix, is_names, is_regex_of, matches_name, prefixes, shortened, suggestion
from randlora.targets.obstacles import obstacle, tied_names

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
NO_LAYER = "for which there is no adapter layer"
REGISTER = "register one with randlora.layers.register_layer"
LITTLE = 1e-4
"""The share of a model's parameters below which a default warns."""
DOUBT = "the default adapts only"
NOTHING = "matches no layer or weight that can be adapted"
LISTED = 5


@dataclass(frozen=True)
class LeftOut:
    """Matrices of one kind that an adapter leaves out, for one reason.

    Attributes:
        kind: Their kind, as `AdapterLayer.kind`; ``None`` if there is no adapter layer for them.
        owner: The types of the modules that have them, if there is no adapter layer for them.
        fqns: Their names.
        parameters: Number of their entries.
        share: ``parameters`` as a share of the model's parameters.
        targets: The value of ``targets`` that includes them, if any.
        reason: Why only a change of the model or of ``exclude`` could get them adapted, if so.
    """

    kind: str | None
    owner: str | None
    fqns: tuple[str, ...]
    parameters: int
    share: float
    targets: str | None
    reason: str | None

    def __str__(self) -> str:
        """Return one line of a report."""
        count = len(self.fqns)
        noun = NOUNS[self.kind] if self.kind else "parameter"
        what = f"{count:,} {noun}{'s' * (count > 1)}" + (f" of {self.owner}" if self.owner else "")
        what += f", {self.share:.2%} of the weights"
        if self.reason is not None:
            return f"left out: {what} ({self.reason})"
        if self.targets is None:
            return f"no adapter layer for {what}: {REGISTER}"
        return f"left out: {what}: {spelled('targets', self.targets)} adapts {'them' if count > 1 else 'it'}"


def left_out(
    census: Census,
    chosen: Collection[Key],
    skipped: Collection[str],
    excluded: Collection[Key],
    trained: Collection[str],
) -> tuple[LeftOut, ...]:
    """Return the matrices that are not adapted (by key), skipped or trained (by FQN), by kind and reason."""
    passed = [visit for visit in census.candidates if visit.fqn in skipped]
    refused = {id(visit.module) for visit in passed if isinstance(visit.entry, str)}
    told = {*chosen, *(visit.key for visit in passed if isinstance(visit.entry, type))}
    left: list[tuple[Held, Site | None]] = []
    for places in census.matrices:
        sites = [site for held in places if (site := census.site_of(held)) is not None]
        is_passed = any(id(held.module) in refused or held.fqn in skipped for held in places)
        if not is_passed and places[0].fqn not in trained and not any(site.key in told for site in sites):
            left.append((places[0], sites[0] if sites else None))
    tied = tied_names(census, [site for _, site in left if site is not None])
    groups: dict[tuple[int, str], list[tuple[Held, Site | None]]] = {}
    for held, site in left:
        order = len(KINDS) if site is None else KINDS.index(site.layer_class.kind)
        why = _reason(census, held, site, excluded, tied) or ""
        groups.setdefault((order, why), []).append((held, site))
    return tuple(_group(census, *key, groups[key]) for key in sorted(groups))


def _reason(
    census: Census, held: Held, site: Site | None, excluded: Collection[Key], tied: Collection[Key]
) -> str | None:
    if site is None:
        refused = census.kinds[id(held.module)].called
        return EXCLUDED if (id(held.module), "weight") in excluded else refused if isinstance(refused, str) else None
    if site.key in excluded:
        return EXCLUDED
    return obstacle(site) or census.useless.get(site.key) or (TIED if site.key in tied else None)


def _group(census: Census, order: int, why: str, members: Sequence[tuple[Held, Site | None]]) -> LeftOut:
    kind = KINDS[order] if order < len(KINDS) else None
    count = sum(census.count_numbers(held) for held, _ in members)
    return LeftOut(
        kind=kind,
        owner=shortened(sorted({plain_class(held.module).__name__ for held, _ in members})) if kind is None else None,
        fqns=tuple(dict.fromkeys(held.fqn if site is None else site.fqn for held, site in members)),
        parameters=count,
        share=count / census.size if census.size else 0.0,
        targets=None if kind is None or why else ALL_LINEAR if kind in LINEAR_KINDS else ALL,
        reason=why or None,
    )


def doubt(census: Census, sites: Sequence[Site], groups: Sequence[LeftOut]) -> str:
    """Return a warning if the default adapts almost nothing, or only a layer that looks like a head; else nothing."""
    others = [group for group in groups if group.reason != EXCLUDED]
    if not others or not census.size:
        return ""
    weights = {id(site.weight) for site in sites}
    adapted = [places[0] for places in census.matrices if id(places[0].tensor) in weights]
    share = sum(map(census.count_numbers, adapted)) / census.size
    is_head = len(adapted) == 1 and adapted[0] is census.matrices[-1][0]
    if not is_head and share >= LITTLE:
        return ""
    like = ", the last matrix of the model, which looks like its head" if is_head else ""
    wider = dict.fromkeys(spelled("targets", group.targets) for group in others if group.targets)
    advice = " or ".join(wider) or f"{spelled('targets')} or register adapter layers to adapt more"
    return f"{DOUBT} {shortened([site.fqn for site in sites])}, {share:.2%} of the weights{like}: give {advice}"


def layer_names(visits: Iterable[Candidate]) -> list[str]:
    """Return the FQNs of the layers and weights that have an adapter layer."""
    return [visit.fqn for visit in visits if isinstance(visit.entry, type)]


def holders(visits: Iterable[Candidate]) -> set[str]:
    """Return the FQNs of the modules that contain such layers or weights."""
    return {name for fqn in layer_names(visits) for name in prefixes(fqn)[:-1]}


def reason(census: Census, visit: Candidate) -> str | None:
    """Return why a module cannot be adapted. ``None`` if it can be, is a container, or has no matrix."""
    if isinstance(visit.entry, str):
        return visit.entry
    parameters = [parameter for parameter in visit.module._parameters.values() if parameter is not None]
    has_matrix = any(is_lazy(parameter) or parameter.ndim >= 2 for parameter in parameters)
    if visit.entry is None and has_matrix and not census.kinds[id(visit.module)].read:
        return f"of type {plain_class(visit.module).__name__}, {NO_LAYER}"
    return None


def refusal(census: Census, matched: Candidate | Held) -> str:
    """Return the message about a matched module that cannot be adapted, or a parameter without an adapter layer."""
    if isinstance(matched, Candidate) and matched.entry is not None:
        return f"{matched.fqn} ({plain_class(matched.module).__name__}) cannot be adapted: {matched.entry}"
    what = _described(matched) if isinstance(matched, Held) else reason(census, matched)
    return f"{matched.fqn} is {what}: narrow the pattern, give {spelled('exclude', [matched.fqn])}, or {REGISTER}"


def _described(held: Held) -> str:
    shape = "no shape yet" if is_lazy(held.tensor) else f"shape {tuple(held.tensor.shape)}"
    return f"a parameter of {plain_class(held.module).__name__} with {shape}, {NO_LAYER}"


def missed(census: Census, argument: str, pattern: Pattern, entries: Sequence[str]) -> list[str]:
    """Return a message for every regex or name that matches nothing, with advice in those that are shown."""
    matches_none = NOTHING if argument == "targets" else "matches no layer or weight"
    said = [f"{argument}={entry!r} {matches_none}" for entry in entries]
    advice = [_advice(census, argument, pattern, entry) for entry in entries[:SHOWN]]
    return [*map("".join, zip(said, advice, strict=False)), *said[SHOWN:]]


def _advice(census: Census, argument: str, pattern: Pattern, entry: str) -> str:
    """Return what a regex or name may have been meant to be, or what it matches that cannot be adapted."""
    visits, layers = census.candidates, layer_names(census.candidates)
    rule = {"alllinear": ALL_LINEAR, "all": ALL}.get(re.sub(r"[-_\s]", "", entry).lower())
    if argument == "targets" and rule is not None:
        return f"; did you mean {spelled('targets', rule)}?"
    if is_names(pattern) and is_regex_of(entry, layers):
        return f': the entries of a list are names, not regexes; did you mean {argument}=r"{entry}"?'
    name = pattern if isinstance(pattern, str) else (entry,)
    only = []
    for held in census.parameters:
        site = census.site_of(held)
        if (site is None or site.fqn != held.fqn) and (matches_name(name, held.fqn) or has_suffix(held.fqn, entry)):
            role = f"a parameter of {site.fqn}, which is the name to give" if site else _described(held)
            only.append(f"{held.fqn} ({role})")
    if only:
        return f", only {shortened(only, LISTED)}"
    only = [f"{visit.fqn} ({plain_class(visit.module).__name__})" for visit in visits if matches_name(name, visit.fqn)]
    known = [visit.fqn for visit in visits] if argument == "exclude" else [*layers, *holders(visits)]
    advice = suggestion(argument, entry, known) or inventory(visits)
    return f"{f', only {shortened(only, LISTED)}' if only else ''}; {advice}"


def inventory(visits: Sequence[Candidate]) -> str:
    """Return a list of the model's layers that can be adapted or, if it has none, of its types of modules."""
    if layers := layer_names(visits):
        return f"the model has {shortened(layers, LISTED)}"
    types = sorted({plain_class(visit.module).__name__ for visit in visits}) or ["itself"]
    return f"the model has no layer or weight that can be adapted, only {shortened(types, LISTED)}"

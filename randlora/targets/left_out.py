"""Why weights cannot be adapted or are left out, and messages about patterns that match nothing that can be adapted."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from randlora.config import Pattern
from randlora.errors import SHOWN, spelled
from randlora.layers.in_place import class_obstacle, plain_class
from randlora.layers.registry import KINDS, Refusal
from randlora.layers.weight import COMPUTED, split_obstacle
from randlora.places import identities, loaded_modules, place_of
from randlora.targets.census import Candidate, Census, Held, Key, Site
from randlora.targets.match import is_names, is_regex_of, matches_name, prefixes, shortened, suggestion

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
NO_LAYER = "for which there is no adapter layer"
REGISTER = "register one with randlora.layers.register_layer (docs/extending.md)"
LITTLE = 1e-4  # the share of a model's parameters below which a default warns
DOUBT = "the default adapts only"
NOTHING = "matches no layer or weight that can be adapted"
LISTED = 5
TIED_NAMES = "all_tied_weights_keys"  # in which transformers' models map each tied parameter to what it is tied to
LIBRARIES = {"peft": "PEFT", "loralib": "loralib", "lycoris": "LyCORIS"}  # of adapters, by their package


# What cannot be adapted, whatever pattern selects it


def obstacles(census: Census, sites: Sequence[Site], dropout: float) -> list[str]:
    """Return why sites cannot be adapted: an unsuitable class or weight, or a weight tied to another module."""
    problems, sound = [], []
    offloaded = offloaded_with(census)
    for site in sites:
        if (why := obstacle(site)) is not None:
            problems.append(f"{site.fqn} {why}")
        elif id(site.owner) in offloaded:
            problems.append(
                f"{site.fqn} is offloaded by accelerate together with everything in {offloaded[id(site.owner)]}, which "
                "would then miss the values of the adapter: offload the model after adapting it"
            )
        elif (why := census.uncalled.get(site.key) or census.empty.get(site.key)) is not None:
            problems.append(f"{site.fqn} ({plain_class(site.owner).__name__}) {why}: exclude it")
        elif dropout and (site.key in census.read or not site.layer_class.takes_dropout(site.owner)):
            advice = "omit dropout, or exclude this weight"
            problems.append(
                f"{site.fqn} is a weight that other code reads, and {dropout=} cannot reach its input: {advice}"
            )
        else:
            sound.append(site)
    return [*problems, *tie_problems(census, sound)]


def obstacle(site: Site) -> str | None:
    """Return why a site cannot be adapted by itself, as a phrase that follows its name, or ``None``."""
    kind, weight = site.layer_class, site.weight
    if (why := class_obstacle(site.owner, kind)) is not None:
        return why
    if weight is None and not kind.is_quantized:
        return COMPUTED
    if is_parametrized(site.owner):  # removing it would restore another class
        return "computes other parameters by a parametrization, which changed its class: remove that first"
    if weight is not None and is_lazy(weight):
        return "has no shape yet: run one forward pass first"
    split = None if weight is None else split_obstacle(site.owner, weight, is_quantized=kind.is_quantized)
    return split or kind.obstacle(site.owner)


def offloaded_with(census: Census) -> dict[int, str]:
    """Return the modules that are loaded together with a whole module around them, by id, with its class's name."""
    return {key: around for key, around in loaded_modules(census.modules).items() if around is not None}


def offloaded_copies(census: Census, fqns: Iterable[str]) -> list[str]:
    """Return messages about parameters that are named in ``train_also`` and offloaded by accelerate."""
    offloaded = loaded_modules(census.modules)
    away = {held.fqn for held in census.tensors if id(held.module) in offloaded}
    return [
        f"{fqn} is offloaded by accelerate, which would load the model's own values instead of the trained ones: keep "
        "it on a device with the device map, or leave it out of train_also and train_rows"
        for fqn in fqns
        if fqn in away
    ]


def computed_weights(sites: Iterable[Site]) -> list[str]:
    """Return messages about adapted weights that have become computed from other parameters."""
    return [f"{site.fqn} {COMPUTED}" for site in sites if site.weight is None]


def tie_problems(census: Census, sites: Sequence[Site]) -> list[str]:
    """Return messages about weights that are tied to other modules."""
    tied = tied_names(census, [site for site in sites if not site.layer_class.is_rows])
    found = [(site.fqn, ", ".join(tied[site.key])) for site in sites if site.key in tied]
    return [f"the weight of {fqn} is tied to {others}: untie it, or exclude the layer" for fqn, others in found]


def tied_names(census: Census, sites: Iterable[Site]) -> dict[Key, list[str]]:
    """Return the names of the parameters of other modules that the weights of sites are tied to, by `Site.key`."""
    tied = {}
    by_group = _by_group(census) if any(held.tensor.is_meta for held in census.parameters) else {}  # offloaded
    for site in sites:
        weight = site.weight
        if weight is None or site.layer_class.attribute not in site.owner._parameters:  # codes under a different name
            continue
        own = Held(site.fqn, site.owner, site.layer_class.attribute, weight)
        found = [held for identity in identities(*own[1:]) for held in census.by_identity.get(identity, [])]
        if weight.is_meta:
            found += [held for held in by_group.get((id(own.module), own.attribute), []) if are_tied(own, held)]
        if others := [held.fqn for held in found if held.module is not site.owner]:
            tied[site.key] = [*dict.fromkeys(others)]
    return tied


def _by_group(census: Census) -> dict[tuple[int, str], list[Held]]:
    """Return the parameters that transformers ties to each one, by the identity of its module and its attribute."""
    by_fqn = {held.fqn: held for held in census.parameters}
    found: dict[tuple[int, str], list[Held]] = {}
    for names in named_groups(census):
        group = [by_fqn[name] for name in names if name in by_fqn]
        for held in group:
            found.setdefault((id(held.module), held.attribute), []).extend(group)
    return found


def named_groups(census: Census) -> list[list[str]]:
    """Return groups of names of parameters that transformers ties, if they are not untied since; sources come first."""
    groups: dict[str, list[str]] = {}
    for prefix, module in census.prefixed:
        names = module.__dict__.get(TIED_NAMES)
        for name, source in names.items() if isinstance(names, dict) else ():
            groups.setdefault(f"{prefix}{source}", [f"{prefix}{source}"]).append(f"{prefix}{name}")
    return [*groups.values()]


def are_tied(one: Held, other: Held) -> bool:
    """Whether two parameters are one, or were when accelerate offloaded them, each to its own file."""
    if not {*identities(*one[1:])}.isdisjoint(identities(*other[1:])):
        return True
    if not (one.tensor.is_meta and other.tensor.is_meta):
        return False
    places = place_of(one.module, one.attribute), place_of(other.module, other.attribute)
    return all(place.is_loaded_on_call for place in places) and torch.equal(places[0].read(), places[1].read())


def foreign_adapters(census: Census) -> list[str]:
    """Return a message for each library that has adapters in a model."""
    found: dict[str, list[str]] = {}
    for fqn, module in ("", census.model), *census.first_visits:
        kind = type(module)
        packages = [base.__module__.partition(".")[0] for base in kind.__mro__]
        if (package := next(filter(LIBRARIES.__contains__, packages), None)) is not None:
            found.setdefault(package, []).append(f"{fqn or 'the model itself'} ({kind.__module__}.{kind.__name__})")
    return [
        f"the model has adapters of {LIBRARIES[package]}: {', '.join(places[-2:])}"
        f"{f' and {len(places) - 2} more modules' if len(places) > 2 else ''}; merge or remove them first, such as "
        "with merge_and_unload() or unload() of a PeftModel; randlora.load reads what PEFT saved of a RandLoRA"
        for package, places in found.items()
    ]


# What an adapter leaves out


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
    refused = {id(visit.module) for visit in passed if isinstance(visit.entry, Refusal)}
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
        groups.setdefault((order, _why_left(census, held, site, excluded, tied)), []).append((held, site))
    return tuple(_group(census, *key, groups[key]) for key in sorted(groups))


def _why_left(census: Census, held: Held, site: Site | None, excluded: Collection[Key], tied: Collection[Key]) -> str:
    """Return why no ``targets`` could get a matrix adapted; empty if some could, or it has no adapter layer."""
    key = (id(held.module), "weight") if site is None else site.key
    if key in excluded:
        return EXCLUDED
    if site is None:
        called = census.kinds[id(held.module)].called
        return called.reason if isinstance(called, Refusal) else ""
    is_tied = "tied to parameters of other modules: untie it first" if key in tied else ""
    return obstacle(site) or census.useless.get(key) or is_tied


def _group(census: Census, order: int, why: str, members: Sequence[tuple[Held, Site | None]]) -> LeftOut:
    kind = KINDS[order] if order < len(KINDS) else None
    count = sum(census.count_numbers(held) for held, _ in members)
    share = count / census.size if census.size else 0.0
    owner = shortened(sorted({plain_class(held.module).__name__ for held, _ in members})) if kind is None else None
    fqns = tuple(dict.fromkeys(held.fqn if site is None else site.fqn for held, site in members))
    targets = None if kind is None or why else ALL_LINEAR if kind in LINEAR_KINDS else ALL
    return LeftOut(kind, owner, fqns, count, share, targets, why or None)


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


# Patterns that match what cannot be adapted, or nothing


def layer_names(census: Census) -> list[str]:
    """Return the FQNs of the layers and weights that have an adapter layer."""
    return [visit.fqn for visit in census.candidates if isinstance(visit.entry, type)]


def container_names(census: Census) -> set[str]:
    """Return the FQNs of the modules that contain such layers or weights."""
    return {name for fqn in layer_names(census) for name in prefixes(fqn)[:-1]}


def reason(census: Census, visit: Candidate) -> str | None:
    """Return why a module cannot be adapted. ``None`` if it can be, is a container, or has no matrix."""
    if visit.entry is not None:
        return visit.entry.reason if isinstance(visit.entry, Refusal) else None
    parameters = [parameter for parameter in visit.module._parameters.values() if parameter is not None]
    has_matrix = any(is_lazy(parameter) or parameter.ndim >= 2 for parameter in parameters)
    if has_matrix and not census.kinds[id(visit.module)].read:
        return f"of type {plain_class(visit.module).__name__}, {NO_LAYER}"
    return None


def refusal(census: Census, matched: Candidate | Held) -> str:
    """Return the message about a matched module that cannot be adapted, or a parameter without an adapter layer."""
    if isinstance(matched, Candidate) and isinstance(matched.entry, Refusal):
        return f"{matched.fqn} ({plain_class(matched.module).__name__}) cannot be adapted: {matched.entry.reason}"
    what = _described(matched) if isinstance(matched, Held) else reason(census, matched)
    return f"{matched.fqn} is {what}: narrow the pattern, give {spelled('exclude', [matched.fqn])}, or {REGISTER}"


def _described(held: Held) -> str:
    shape = "no shape yet" if is_lazy(held.tensor) else f"shape {tuple(held.tensor.shape)}"
    return f"a parameter of {plain_class(held.module).__name__} with {shape}, {NO_LAYER}"


def missed(census: Census, argument: str, pattern: Pattern, entries: Sequence[str], usual: Iterable[str]) -> list[str]:
    """Return a message for every regex or name that matches nothing, with advice, first of all the ``usual`` names."""
    matches_none = NOTHING if argument == "targets" else "matches no layer or weight"
    said = [f"{spelled(argument, entry)} {matches_none}" for entry in entries]
    usual = [*usual] if said else []
    advice = [_advice(census, argument, pattern, entry, usual) for entry in entries[:SHOWN]]
    return [*map("".join, zip(said, advice, strict=False)), *said[SHOWN:]]


def _advice(census: Census, argument: str, pattern: Pattern, entry: str, usual: Iterable[str]) -> str:
    """Return what a regex or name may have been meant to be, or what it matches that cannot be adapted."""
    layers = layer_names(census)
    rule = {"alllinear": ALL_LINEAR, "all": ALL}.get(re.sub(r"[-_\s]", "", entry).lower())
    if argument == "targets" and rule is not None:
        return f"; did you mean {spelled('targets', rule)}?"
    if is_names(pattern) and is_regex_of(entry, layers):
        return f': the entries of a list are names, not regexes; did you mean {argument}=r"{entry}"?'
    name = pattern if isinstance(pattern, str) else (entry,)
    only = []
    for held in census.parameters:
        site = census.site_of(held)
        is_name = site is not None and site.fqn == held.fqn
        if not is_name and (matches_name(name, held.fqn) or matches_name((entry,), held.fqn)):
            role = f"a parameter of {site.fqn}, which is the name to give" if site else _described(held)
            only.append(f"{held.fqn} ({role})")
    if only:
        return f", only {shortened(only, LISTED)}"
    visits = census.candidates
    only = [f"{visit.fqn} ({plain_class(visit.module).__name__})" for visit in visits if matches_name(name, visit.fqn)]
    known = [visit.fqn for visit in visits] if argument == "exclude" else [*layers, *container_names(census)]
    advice = suggestion(argument, entry, known, [*usual, *layers]) or inventory(census)
    return f"{f', only {shortened(only, LISTED)}' if only else ''}; {advice}"


def inventory(census: Census) -> str:
    """Return a list of the model's layers that can be adapted or, if it has none, of its types of modules."""
    if layers := layer_names(census):
        return f"the model has {shortened(layers, LISTED)}"
    types = sorted({plain_class(visit.module).__name__ for visit in census.candidates}) or ["itself"]
    return f"the model has no layer or weight that can be adapted, only {shortened(types, LISTED)}"

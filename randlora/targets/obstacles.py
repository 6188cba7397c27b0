"""Reasons why weights cannot be adapted, whatever pattern selects them, such as that modules share them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from randlora.layers.in_place import class_obstacle, plain_class
from randlora.layers.weight import COMPUTED, split_obstacle
from randlora.places import identities, loaded_modules, place_of
from randlora.targets.census import Census, Held, Key, Site

NAMES = "all_tied_weights_keys"
"""The attribute in which models of transformers map each tied parameter to the one that it is tied to."""

LIBRARIES = {"peft": "PEFT", "loralib": "loralib", "lycoris": "LyCORIS"}
"""Names of libraries of adapters, by their package."""


def obstacles(census: Census, sites: Sequence[Site], dropout: float) -> list[str]:
    """Return why sites cannot be adapted: an unsuitable class or weight, or a weight tied to another module."""
    problems, sound = [], []
    offloaded = offloaded_with(census)
    for site in sites:
        if (reason := obstacle(site)) is not None:
            problems.append(f"{site.fqn} {reason}")
        elif id(site.owner) in offloaded:
            problems.append(
                f"{site.fqn} is offloaded by accelerate together with everything in {offloaded[id(site.owner)]}, which "
                "would then miss the values of the adapter: offload the model after adapting it"
            )
        elif site.key in census.uncalled:
            name = plain_class(site.owner).__name__
            problems.append(f"{site.fqn} ({name}) {census.uncalled[site.key]}: exclude it")
        elif dropout and not (site.layer_class.takes_dropout(site.owner) and site.key not in census.read):
            problems.append(
                f"{site.fqn} is a weight that other code reads, and {dropout=} cannot reach its input: "
                "omit dropout, or exclude this weight"
            )
        else:
            sound.append(site)
    return [*problems, *tie_problems(census, sound)]


def offloaded_with(census: Census) -> dict[int, str]:
    """Return the modules that are loaded together with a whole module around them, by id, with its class's name."""
    return {key: around for key, around in loaded_modules(census.modules).items() if around is not None}


def offloaded_copies(census: Census, fqns: Iterable[str]) -> list[str]:
    """Return messages about parameters that are named in ``train_also`` and offloaded by accelerate."""
    modules = {held.fqn: held.module for held in census.tensors}
    offloaded = loaded_modules(census.modules)
    return [
        f"{fqn} is offloaded by accelerate, which would load the model's own values instead of the trained ones: keep "
        "it on a device with the device map, or leave it out of train_also"
        for fqn in fqns
        if fqn in modules and id(modules[fqn]) in offloaded
    ]


def obstacle(site: Site) -> str | None:
    """Return why a site cannot be adapted by itself, as a phrase that follows its name, or ``None``."""
    if (reason := class_obstacle(site.owner, site.layer_class)) is not None:
        return reason
    weight = site.weight
    if weight is None and not site.layer_class.is_quantized:
        return COMPUTED
    if is_parametrized(site.owner):  # removing it would restore another class
        return (
            "computes other parameters by a parametrization, which changed its class: remove the parametrization first"
        )
    if weight is None:
        return site.layer_class.obstacle(site.owner)
    if is_lazy(weight):
        return "has no shape yet: run one forward pass first"
    split = split_obstacle(site.owner, weight, is_quantized=site.layer_class.is_quantized)
    return split or site.layer_class.obstacle(site.owner)


def computed_weights(sites: Iterable[Site]) -> list[str]:
    """Return messages about adapted weights that have become computed from other parameters."""
    return [f"{site.fqn} {COMPUTED}" for site in sites if site.weight is None]


def tie_problems(census: Census, sites: Sequence[Site]) -> list[str]:
    """Return messages about weights that are tied to other modules."""
    tied = tied_names(census, sites)
    return [
        f"the weight of {site.fqn} is tied to {', '.join(tied[site.key])}: untie it, or exclude the layer"
        for site in sites
        if site.key in tied
    ]


def tied_names(census: Census, sites: Iterable[Site]) -> dict[Key, list[str]]:
    """Return the names of the parameters of other modules that the weights of sites are tied to, by `Site.key`."""
    tied = {}
    for site in sites:
        weight = site.weight
        if weight is None or site.layer_class.attribute not in site.owner._parameters:  # codes under a different name
            continue
        own = Held(site.fqn, site.owner, site.layer_class.attribute, weight)
        found = [held for identity in identities(*own[1:]) for held in census.by_identity.get(identity, [])]
        found += _tied_by_name(census, own) if weight.is_meta else []
        if others := [held.fqn for held in found if held.module is not site.owner]:
            tied[site.key] = [*dict.fromkeys(others)]
    return tied


def tied_away(census: Census) -> set[str]:
    """Return the names of parameters that transformers ties to others and that are still tied; files may lack them."""
    by_fqn = {held.fqn: held for held in census.parameters}
    found = set()
    for source, *names in _named_groups(census):
        for fqn in names:
            if fqn in by_fqn and source in by_fqn and _are_tied(by_fqn[fqn], by_fqn[source]):
                found.add(fqn)
    return found


def _tied_by_name(census: Census, own: Held) -> list[Held]:
    """Return the parameters that transformers ties to an offloaded weight."""
    fqns = {held.fqn for held in census.parameters if held.module is own.module and held.attribute == own.attribute}
    names = {fqn for group in _named_groups(census) if not fqns.isdisjoint(group) for fqn in group} - fqns
    return [held for held in census.parameters if held.fqn in names and _are_tied(own, held)]


def _named_groups(census: Census) -> list[list[str]]:
    """Return groups of names of parameters that transformers ties, if they are not untied since; sources come first."""
    groups: dict[str, list[str]] = {}
    for prefix, module in census.prefixed:
        names = module.__dict__.get(NAMES)
        for name, source in names.items() if isinstance(names, dict) else ():
            groups.setdefault(f"{prefix}{source}", [f"{prefix}{source}"]).append(f"{prefix}{name}")
    return [*groups.values()]


def _are_tied(one: Held, other: Held) -> bool:
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
    for fqn, module in ("", census.model), *((visit.fqn, visit.module) for visit in census.first_visits):
        kind = type(module)
        packages = [base.__module__.partition(".")[0] for base in kind.__mro__]
        if (package := next(filter(LIBRARIES.__contains__, packages), None)) is not None:
            found.setdefault(package, []).append(f"{fqn or 'the model itself'} ({kind.__module__}.{kind.__name__})")
    return [
        f"the model has adapters of {LIBRARIES[package]}: {', '.join(places[-2:])}"
        f"{f' and {len(places) - 2} more modules' if len(places) > 2 else ''}; they would be frozen, and their "
        "matrices are not layers of the model: merge or remove them first, such as with merge_and_unload() or unload() "
        "of a PeftModel, or build the model again; a RandLoRA adapter of PEFT can be saved there and read with "
        "randlora.load"
        for package, places in found.items()
    ]

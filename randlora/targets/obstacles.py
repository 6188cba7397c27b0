"""Reasons why weights cannot be adapted, whatever pattern selects them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from randlora.layers.in_place import class_obstacle, plain_class
from randlora.layers.split import split_obstacle
from randlora.places import loaded_modules
from randlora.targets.site import Site
from randlora.targets.ties import tie_problems
from randlora.targets.walk import Census


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
                f"{site.fqn} is a weight that other code reads, whose input {dropout=} cannot reach: "
                "omit dropout, or exclude this weight"
            )
        else:
            sound.append(site)
    return [*problems, *tie_problems(census, sound)]


def offloaded_with(census: Census) -> dict[int, str]:
    """Return the modules that one of accelerate's hooks loads with all of a module around them, by id, and its type."""
    found: dict[int, str] = {}
    for module in (census.model, *(visit.module for visit in census.first_visits)):
        hook = module.__dict__.get("_hf_hook")  # accelerate is not imported here, and may not be installed
        for each in getattr(hook, "hooks", [hook]):
            if getattr(each, "offload", False) and getattr(each, "place_submodules", False):
                found |= dict.fromkeys(map(id, module.modules()), plain_class(module).__name__)
    return found


def offloaded_copies(census: Census, fqns: Iterable[str]) -> list[str]:
    """Return messages about parameters that ``train_also`` names and accelerate offloads."""
    modules = {held.fqn: held.module for held in census.tensors}
    offloaded = loaded_modules([census.model, *(visit.module for visit in census.first_visits)])
    return [
        f"{fqn} is offloaded by accelerate, which would load the model's own values instead of trained ones: keep it "
        "on a device by the device map, or leave it out of train_also"
        for fqn in fqns
        if fqn in modules and id(modules[fqn]) in offloaded
    ]


def obstacle(site: Site) -> str | None:
    """Return why a site cannot be adapted by itself, as a phrase that follows its name, or ``None``."""
    if (reason := class_obstacle(site.owner, site.layer_class)) is not None:
        return reason
    weight = site.weight
    if weight is None:
        return "computes its weight from other parameters: remove the parametrization first"
    if is_parametrized(site.owner):  # removing it would restore another class
        return (
            "computes other parameters by a parametrization, which changed its class: remove the parametrization first"
        )
    if site.owner.__dict__.get("qconfig") is not None:
        return (
            "is prepared for being quantized by torch.ao, which would leave an adapted layer as it is: adapt and merge "
            "before that, or exclude the layer, or delete its qconfig if it is to stay"
        )
    if is_lazy(weight):
        return "has no shape yet: run one forward pass first"
    split = split_obstacle(site.owner, weight, is_quantized=site.layer_class.is_quantized)
    return split or site.layer_class.obstacle(site.owner)

"""Whether an adapter's file fits a model: its layers are there and can carry it, and every shape agrees."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor

from randlora.checkpoint.read import AdapterFile
from randlora.checkpoint.tensors_file import Entry
from randlora.errors import CheckpointError, raise_collected
from randlora.layers.registry import find_layer
from randlora.targets.select import obstacles
from randlora.targets.site import Shapes, Site, shapes_of
from randlora.targets.walk import Census, sites_of


def fit_sites(census: Census, file: AdapterFile, *, needs_values: bool = True) -> tuple[Site, ...]:
    """Find the weights that a file names, and check that all in it fits and can be put beside them.

    Args:
        census: The model, adapted or not.
        file: The adapter.
        needs_values: Refuse layers on the meta device, where what is loaded would be lost.

    Returns:
        Its sites under the names that the file gives them.

    Raises:
        CheckpointError: When something does not fit; all such things are named at once.
    """
    sites = named_sites(census, file.values)
    problems = [
        *obstacles(census, sites, file.config.dropout),
        *(_without_values(sites) if needs_values else []),
        *misfits(file, shapes_of(sites)),
        *_unknown_parameters(census, file.trained),
        *trained_misfits({held.fqn: held.parameter for held in census.parameters}, file.trained),
    ]
    raise_collected(CheckpointError, problems, doing="fit the adapter to this model")
    return sites


def named_sites(census: Census, fqns: Iterable[str]) -> tuple[Site, ...]:
    """Find the weights of some names, under these names.

    Raises:
        CheckpointError: When one is missing, or cannot carry an adapter of its own; where a prefix alone makes the
            difference, it is named.
    """
    sites = {site.fqn: site for visit in census.visits for site in sites_of(visit)}
    modules = {visit.fqn: visit.module for visit in census.visits}
    problems = _prefix_problems([*fqns], sites)
    found: dict[tuple[int, str], Site] = {}
    for fqn in fqns:
        if (site := sites.get(fqn)) is not None:
            twin = found.setdefault((id(site.owner), site.layer_class.attribute), site)
            if twin is not site:
                problems.append(f"{fqn} and {twin.fqn} are one layer here: it cannot carry both of their adapters")
        elif fqn not in modules:
            problems.append(f"the model has no layer {fqn}")
        elif isinstance(reason := find_layer(modules[fqn]), str):
            problems.append(f"{fqn} ({type(modules[fqn]).__name__}) cannot be adapted: {reason}")
        else:
            problems.append(f"{fqn} ({type(modules[fqn]).__name__}) has no weight that an adapter can go on")
    raise_collected(CheckpointError, problems, doing="fit the adapter to this model")
    return tuple(site for site in sites.values() if found.get((id(site.owner), site.layer_class.attribute)) is site)


def _prefix_problems(fqns: Sequence[str], known: Collection[str]) -> list[str]:
    """Return what to do where a prefix alone keeps an adapter from a model."""
    dropped, added = other_prefix(fqns, known)
    if added:
        return [f"the model has the adapter's layers in {added.removesuffix('.')!r}: load the adapter into that module"]
    if dropped:
        return [
            f"the model has the adapter's layers without {dropped!r}: load the model that the adapter was trained on"
        ]
    return []


def other_prefix(names: Sequence[str], known: Collection[str]) -> tuple[str, str]:
    """Return the prefix to drop or to add, where just one turns all names into known ones; they are empty elsewhere."""
    if all(name in known for name in names):
        return "", ""
    parts = names[0].split(".")
    found = [("", name.removesuffix(names[0])) for name in known if name.endswith(f".{names[0]}")]
    found += [(".".join(parts[:count]) + ".", "") for count in range(1, len(parts))]
    fitting = [
        (dropped, added)
        for dropped, added in found
        if all(name.startswith(dropped) and added + name.removeprefix(dropped) in known for name in names)
    ]
    return fitting[0] if len(fitting) == 1 else ("", "")


def misfits(file: AdapterFile, shapes: Shapes) -> list[str]:
    """Return which layers have other shapes than the adapter was trained on, or reach beyond the bases in the file."""
    problems = []
    for fqn, shape in shapes.items():
        min_dim = file.values[fqn][1].shape[1]
        saved = file.header.shapes[fqn] if file.header else shape
        if saved != shape or min_dim != min(shape):
            theirs = f"out x in = {saved[0]} x {saved[1]}" if file.header else f"a smaller side of {min_dim}"
            problems.append(f"{fqn} is {shape[0]} x {shape[1]} here, the adapter was trained on {theirs}")
        elif file.bases and (len(file.bases[1]) < max(shape) or file.bases[0].shape[-1] < min_dim):
            problems.append(f"{fqn} is {shape[0]} x {shape[1]}, larger than the bases in the file")
    return problems


def trained_misfits(own: Mapping[str, Tensor | Entry], trained: Mapping[str, Tensor]) -> list[str]:
    """Return which parameters trained beside an adapter differ in the model; those that it lacks are passed over."""
    problems = []
    for fqn, tensor in trained.items():
        if fqn not in own:
            continue
        if not own[fqn].dtype.is_floating_point:
            problems.append(f"{fqn} holds {own[fqn].dtype} here, and was trained as {tensor.dtype}")
        elif tuple(own[fqn].shape) != tuple(tensor.shape):
            problems.append(f"{fqn} has shape {tuple(own[fqn].shape)} here, {tuple(tensor.shape)} in the file")
    return problems


def _without_values(sites: Sequence[Site]) -> list[str]:
    return [
        f"{site.fqn} holds no values yet (meta), so the adapter's would be lost: materialize it first"
        for site in sites
        if site.weight is not None and site.weight.is_meta and not site.layer_class.is_offloaded(site.owner)
    ]


def _unknown_parameters(census: Census, trained: Iterable[str]) -> list[str]:
    own = {held.fqn for held in census.parameters}
    unknown = [fqn for fqn in trained if fqn not in own]
    return [f"the model has no parameter {fqn}, which the file holds beside the adapter" for fqn in unknown]

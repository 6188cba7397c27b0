"""Whether an adapter's file fits a model: its layers exist and can be adapted, and every shape agrees."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from randlora.checkpoint.peft_layout import whole_modules
from randlora.checkpoint.read import AdapterFile
from randlora.disk.formats import Entry
from randlora.errors import CheckpointError, ConfigError, raise_collected, spelled
from randlora.layers.in_place import plain_class
from randlora.layers.registry import Refusal, find_layer
from randlora.model.train_also import find_tables, table_problems
from randlora.places import is_hooked
from randlora.targets.census import Census, Shapes, Site, shapes_of, sizes
from randlora.targets.left_out import obstacles, offloaded_copies
from randlora.targets.match import prefixes


def fit_sites(census: Census, file: AdapterFile) -> tuple[Site, ...]:
    """Return the weights that a file names, after checking that everything in it fits the model, adapted or not."""
    sites = named_sites(census, file)
    tensors = {held.fqn: held.tensor for held in census.tensors}
    problems = [
        *obstacles(census, sites, file.config.dropout),
        *(
            f"{site.fqn} holds no values yet (meta), so the adapter's would be lost: materialize it first"
            for site in sites
            if site.weight is not None and site.weight.is_meta and not is_hooked(site.owner)
        ),
        *misfits(file, shapes_of(sites, file.config)),
        *trained_misfits(tensors, file),
        *offloaded_copies(census, file.trained),
    ]
    if not problems:
        problems = table_problems(census, find_tables(census, file.rows)[0])
    raise_collected(CheckpointError, problems, doing=_fitting(census, file))
    return sites


def named_sites(census: Census, file: AdapterFile) -> tuple[Site, ...]:
    """Return the weights that a file names, under its FQNs. If only a prefix differs, the error names it."""
    sites = census.sites_by_fqn
    modules = {visit.fqn: visit.module for visit in census.visits}
    problems: list[str] = []
    found: dict[tuple[int, str], Site] = {}
    for fqn in file.values:
        if (site := sites.get(fqn)) is not None:
            if (twin := found.setdefault(site.key, site)) is not site:
                problems.append(f"{fqn} and {twin.fqn} are the same layer in this model, which cannot hold both")
        elif fqn not in modules:
            problems.append(f"the model has no layer {fqn}")
        else:
            kind, why = find_layer(modules[fqn]), "has no weight that can be adapted"
            why = f"cannot be adapted: {kind.reason}" if isinstance(kind, Refusal) else why
            problems.append(f"{fqn} ({type(modules[fqn]).__name__}) {why}")
    problems = prefix_problems(file, sites) or problems
    raise_collected(CheckpointError, problems, doing=_fitting(census, file))
    return tuple(site for site in sites.values() if found.get(site.key) is site)


def _fitting(census: Census, file: AdapterFile) -> str:
    """Return what is refused, with the class that the adapter was trained on if this is a different one."""
    trained_on, this = None if file.header is None else file.header.model_class, plain_class(census.model).__name__
    if trained_on is None or trained_on.name == this:
        return "fit the adapter to this model"
    return f"fit the adapter, trained on {trained_on.name}, to this {this}"


def with_prefix(file: AdapterFile, prefix: str | None, known: Collection[str]) -> AdapterFile:
    """Return an adapter with a prefix, if any, added to its names, or removed from them if that gives known layers."""
    if prefix is None:
        return file
    if not prefix.strip("."):
        raise ConfigError(f"prefix must be the name of a module, such as 'bert', got {prefix!r}")
    dotted = f"{prefix.removesuffix('.')}."
    match _directions(dotted, [*file.values], known):
        case ["added"]:
            return file.renamed(lambda fqn: dotted + fqn, f"with {dotted!r} added")
        case ["removed"]:
            problems = [_no_parameter(fqn, file) for fqn in file.trained if not fqn.startswith(dotted)]
            raise_collected(CheckpointError, problems, doing=f"remove the prefix {prefix!r}")
            return file.renamed(lambda fqn: fqn.removeprefix(dotted), f"with {dotted!r} removed")
        case []:
            otherwise = "the names of the adapter's layers do not fit with it: leave it out if they fit as they are"
            reason, *_ = prefix_problems(file, known) or [otherwise]
        case _:
            reason = "the model has such layers both with and without it"
    raise CheckpointError(f"cannot use {spelled('prefix', prefix)}: {reason}")


def prefix_problems(file: AdapterFile, known: Collection[str]) -> list[str]:
    """Return what to do if exactly one prefix, added to all names or removed from them, gives known layers."""
    names = [*file.values]
    if all(name in known for name in names):
        return []
    possible = {name.removesuffix(names[0]) for name in known if name.endswith(f".{names[0]}")}
    possible |= {f"{name}." for name in prefixes(names[0])[:-1]}
    fitting = [prefix.removesuffix(".") for prefix in possible if len(_directions(prefix, names, known)) == 1]
    if len(fitting) != 1:
        return []
    differ = f"the names of the adapter's layers and the model's differ by the prefix {fitting[0]!r}"
    or_else = ", or make the model as it was trained, with its head" if file.trained else ""
    return [f"{differ}: give {spelled('prefix', fitting[0])}{or_else}"]


def _no_parameter(name: str, file: AdapterFile) -> str:
    """Return that a model lacks a parameter, and on which class it was trained if the file says so."""
    known = None if file.header is None else file.header.model_class
    make = f": make the model as it was trained, a {known.name}" if known is not None else ""
    what = "buffer" if name in file.buffers else "parameter"
    return f"the model has no {what} {name}, which was trained with the adapter{make}"


def _directions(prefix: str, names: Sequence[str], known: Collection[str]) -> list[str]:
    """Return whether a prefix gives known names if it is ``"added"`` to all names, ``"removed"`` from them, or both."""
    is_fit = {
        "added": all(prefix + name in known for name in names),
        "removed": all(name.startswith(prefix) and name.removeprefix(prefix) in known for name in names),
    }
    return [direction for direction, fits in is_fit.items() if fits]


def misfits(file: AdapterFile, shapes: Shapes) -> list[str]:
    """Return which layers have different shapes than in training, or are larger than the stored bases."""
    problems = []
    for fqn, shape in shapes.items():
        gamma, matrix, stored = file.values[fqn][1], shape[-2:], file.bases.get(file.options[fqn].r)
        min_dim, saved = gamma.shape[-1], file.header.shapes[fqn] if file.header else shape
        if saved != shape or min_dim != min(matrix) or gamma.shape[:-2] != shape[:-2]:
            theirs = f"out x in = {sizes(saved)}" if file.header else f"a smaller side of {min_dim}"
            problems.append(f"{fqn} is {sizes(shape)} here, the adapter was trained on {theirs}")
        elif stored and (len(stored[1]) < max(matrix) or stored[0].shape[-1] < min_dim):
            problems.append(f"{fqn} is {sizes(shape)}, larger than the bases in the file")
    return problems


def trained_misfits(tensors: Mapping[str, Tensor | Entry], file: AdapterFile) -> list[str]:
    """Return which parameters and buffers trained with an adapter are missing or different in the model."""
    problems = []
    for fqn, trained in file.trained.items():
        if (here := tensors.get(fqn)) is None:
            problems.append(_no_parameter(fqn, file))
            continue
        are_floating = here.dtype.is_floating_point and trained.dtype.is_floating_point
        if not are_floating and (here.dtype != trained.dtype or isinstance(here, nn.Parameter)):
            problems.append(f"{fqn} holds {here.dtype} here, and was trained as {trained.dtype}")
        elif (rows := file.rows.get(fqn)) is not None:
            if tuple(trained.shape) != (len(rows), here.shape[-1]) or here.shape[0] <= rows[-1]:
                theirs = f"{sizes(trained.shape)}, up to row {rows[-1]}, in the file: resize it first"
                problems.append(f"{fqn} has shape {tuple(here.shape)} here, {theirs}")
        elif tuple(here.shape) != tuple(trained.shape):
            problems.append(f"{fqn} has shape {tuple(here.shape)} here, {tuple(trained.shape)} in the file")
    return problems


def without_repeats(census: Census, file: AdapterFile) -> AdapterFile:
    """Return an adapter with each tied parameter once, under the first of its names in the file."""
    problems, repeated = [], set()  # PEFT gives each module of ``modules_to_save`` an untied copy
    for names in _names_of_tied(census):
        named = [fqn for fqn in names if fqn in file.trained]
        left = [fqn for fqn in names if fqn not in file.trained]
        values = [file.trained[fqn] for fqn in named]
        if any(value.dtype != values[0].dtype or not torch.equal(value, values[0]) for value in values):
            problems.append(f"{' and '.join(named)} are one parameter here and two in the file: untie them first")
        elif named and left and file.header is None:
            problems.append(f"{named[0]} is tied to {' and '.join(left)}, but PEFT trained it alone: untie them first")
        repeated.update(named[1:])
    raise_collected(CheckpointError, problems, doing="fit the adapter to this model")
    return replace(file, trained={fqn: value for fqn, value in file.trained.items() if fqn not in repeated})


def untied_by_peft(census: Census, trained: Iterable[str]) -> list[str]:
    """Return which parameters trained with an adapter PEFT would change in only one of their places."""
    trained = set(trained)
    whole = tuple(f"{module}." for module in whole_modules(census, trained))
    return [
        f"PEFT would untie {' and '.join(names)} and change only {' and '.join(trained.intersection(names))}"
        for names in _names_of_tied(census)
        if any(fqn.startswith(whole) for fqn in trained.intersection(names))
    ]


def _names_of_tied(census: Census) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for held in census.tensors:
        names.setdefault(id(held.tensor), []).append(held.fqn)
    return [fqns for fqns in names.values() if len(fqns) > 1]

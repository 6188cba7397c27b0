"""How an adapter fits a base model on disk: which tensors hold its layers, and in which layout.

If transformers has the model's class, the adapter must fit that class, as in `randlora.load`, and names are mapped to
tensors as ``from_pretrained`` maps them. Otherwise the tensors must have the names of the adapter's layers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from randlora.bases.spec import Shape
from randlora.checkpoint.fit import (
    misfits,
    named_sites,
    parameter_names,
    prefix_problems,
    trained_misfits,
    with_prefix,
    without_repeats,
)
from randlora.checkpoint.header import ModelClass
from randlora.checkpoint.read import AdapterFile
from randlora.disk.formats import Entry
from randlora.errors import CheckpointError, ConfigError, raise_collected
from randlora.files.model_directory import ModelDirectory, StoredCodes, find_codes, find_model, read_model_directory
from randlora.files.transformers_model import TransformersModel, build_model
from randlora.layers.base import AdapterLayer
from randlora.layers.linear import Conv1DAdapter, LinearAdapter
from randlora.layers.registry import FORMS
from randlora.targets.census import Shapes
from randlora.targets.obstacles import obstacles


class Base(NamedTuple):
    """A base model on disk: its checkpoint, its class or why there is none, and its quantized tensors by name."""

    directory: ModelDirectory
    model: TransformersModel | str
    codes: Mapping[str, StoredCodes]

    @property
    def kinds(self) -> str:
        """The kinds of its codes."""
        return ", ".join(sorted({codes.kind for codes in self.codes.values()}))

    @property
    def trained_on(self) -> ModelClass | None:
        """The class of the model, if an adapter and not ``config.json`` names it."""
        return None if isinstance(self.model, str) else self.model.model_class

    def all_shapes(self) -> list[Shape]:
        """Return the shapes of all weights that can be adapted; of all matrices if there is no class."""
        if not isinstance(self.model, str):
            return self.model.census.shapes()
        shapes = [entry.shape for entry in self.directory.entries.values() if len(entry.shape) > 1]
        return [*(shape[-2:] for shape in shapes), *((shape[0], math.prod(shape[1:])) for shape in shapes)]


class Slot(NamedTuple):
    """The tensors that contain an adapted weight, several if it is shared, and the ``shape`` of its update.

    ``layer_class`` converts an update of this shape to their layout.
    """

    names: tuple[str, ...]
    shape: Shape
    layer_class: type[AdapterLayer]


@dataclass(frozen=True, eq=False)
class BaseFit:
    """How an adapter fits a base model: ``file`` is the adapter under the names that the model has for its layers.

    ``trained`` are the tensors of each parameter trained with it; none if the files lack it, such as a new head.
    ``made_of`` are weights and parameters of the adapter that are computed from these tensors when the model is loaded.
    """

    file: AdapterFile
    slots: Mapping[str, Slot]
    trained: Mapping[str, tuple[str, ...]]
    made_of: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def slots_of(self, file: AdapterFile) -> dict[str, Slot]:
        """Return where the weights are by the names that the adapter has in its file."""
        names = dict(zip(self.file.values, file.values, strict=True))
        return {names[fqn]: slot for fqn, slot in self.slots.items()}

    @property
    def absent(self) -> tuple[str, ...]:
        """Parameters trained with the adapter that the files lack."""
        return tuple(fqn for fqn, names in self.trained.items() if not names)


def shapes_in(slots: Mapping[str, Slot]) -> Shapes:
    """Return the shapes of the updates by FQN."""
    return {fqn: slot.shape for fqn, slot in slots.items()}


def open_base(
    source: str | os.PathLike[str], revision: str | None = None, model_class: ModelClass | None = None
) -> Base:
    """Read the headers of a model's checkpoint, here or on the Hub, and build its class or ``model_class``."""
    return read_base(*find_model(source, revision), model_class)


def read_base(path: Path, repo_id: str | None = None, model_class: ModelClass | None = None) -> Base:
    """Return what `open_base` does, of what `find_model` found."""
    checkpoint = read_model_directory(path, repo_id)
    codes, model = find_codes(checkpoint), build_model(checkpoint, model_class)
    if model_class is not None and isinstance(model, str):
        raise ConfigError(f"cannot build the model of {str(path)!r}: {model}")
    if codes and isinstance(model, str):  # whose class alone says the shapes of what was quantized
        raise CheckpointError(f"{path} is quantized, and cannot be read without its model: {model}")
    return Base(checkpoint, model, codes)


def as_trained(base: Base, file: AdapterFile) -> Base:
    """Return a base model as the class that an adapter was trained on, if that has a head that the base lacks."""
    known = None if file.header is None else file.header.model_class
    if known is None or known.library != "transformers":
        return base
    if isinstance(base.model, str):
        prefix, own = "", {name: entry.shape for name, entry in base.directory.entries.items()}
    else:  # a class that differs by its prefix does not lack a parameter
        prefix = f"{base.model.census.model.base_model_prefix}."
        held = base.model.census.parameters
        own = {each.fqn.removeprefix(prefix): tuple(each.tensor.shape) for each in held}
    has_all = all(own.get(fqn.removeprefix(prefix)) == tuple(tensor.shape) for fqn, tensor in file.trained.items())
    if has_all and not _has_other_labels(base, known):
        return base
    model = build_model(base.directory, known)
    return base if isinstance(model, str) else base._replace(model=model)


def _has_other_labels(base: Base, known: ModelClass) -> bool:
    """Whether a base is of a class, whose outputs it has under other names."""
    if isinstance(base.model, str) or known.labels is None:
        return False
    own = ModelClass.of(base.model.census.model, has_trained=True)
    return own is not None and own.name == known.name and own != known


def fit_base(base: Base, file: AdapterFile, prefix: str | None = None) -> BaseFit:
    """Return how an adapter fits a base model. Only headers of the model are read. One error names all misfits."""
    base = as_trained(base, file)
    entries = base.directory.entries
    own: dict[str, Tensor | Entry] = {}
    if isinstance(base.model, str):
        fit, problems = _fit_names(base.model, file, prefix, entries)
    else:
        fit, problems = _fit_model(base, base.model, file, prefix)
        own |= {held.fqn: held.tensor for held in base.model.census.tensors}  # the files may lack a new head
    codes = {fqn for fqn, names in fit.trained.items() if base.codes.keys() & set(names)}
    stored = {fqn: names for fqn, names in fit.trained.items() if names and fqn not in {*fit.made_of, *codes}}
    if base.trained_on is None:  # else a head may have other labels in the files
        own |= {fqn: entries[names[0]] for fqn, names in stored.items()}
    problems += [*misfits(fit.file, shapes_in(fit.slots)), *trained_misfits(own, fit.file)]
    problems += [f"{fqn} is quantized here, and was trained as {fit.file.trained[fqn].dtype}" for fqn in codes]
    raise_collected(CheckpointError, problems, doing=f"fit the adapter to {str(base.directory.path)!r}")
    return fit


def _fit_model(
    base: Base, model: TransformersModel, file: AdapterFile, prefix: str | None
) -> tuple[BaseFit, list[str]]:
    """Find the tensors of the weights that an adapter names in a model."""
    entries = base.directory.entries
    file = with_prefix(file, prefix, model.census.sites_by_fqn, parameter_names(model.census))
    sites = named_sites(model.census, file)
    file = without_repeats(model.census, file)
    problems = obstacles(model.census, sites, file.config.dropout)
    slots, made_of = dict[str, Slot](), dict[str, Sequence[str]]()
    fqns = {id(held.tensor): held.fqn for held in reversed(model.census.parameters)}  # the first of a tied one
    for site in sites:
        assert site.weight is not None, "a computed weight is an obstacle"
        shape = tuple(site.weight.shape)
        if names := model.names_of(site.weight):
            if names[0] not in base.codes and (stored := entries[names[0]].shape) != shape:
                problems.append(f"{site.fqn} has shape {stored} in the files, {shape} by its config.json")
            slots[site.fqn] = Slot(names, site.shape_with(file.config), site.layer_class)
        elif sources := model.made_of.get(fqns[id(site.weight)]):
            slots[site.fqn] = Slot((), site.shape_with(file.config), site.layer_class)
            made_of[site.fqn] = sources
        else:
            problems.append(f"the model has no layer {site.fqn} in its files")
    by_fqn = model.names_by_fqn
    trained = {fqn: by_fqn.get(fqn) or tuple(model.made_of.get(fqn, ())) for fqn in file.trained}
    made_of |= {fqn: names for fqn, names in trained.items() if names and not by_fqn.get(fqn)}
    return BaseFit(file, slots, trained, made_of), problems


def _fit_names(
    reason: str, file: AdapterFile, prefix: str | None, entries: Mapping[str, Entry]
) -> tuple[BaseFit, list[str]]:
    """Find an adapter's weights by the names of tensors; their layout is the one that the adapter states."""
    known = {*entries, *(name.removesuffix(".weight") for name in entries)}
    file = with_prefix(file, prefix, known, entries)
    slots: dict[str, Slot] = {}
    places: dict[str, str] = {}
    problems = prefix_problems(file, known, entries)
    for fqn in [] if problems else file.values:
        name = next((name for name in (f"{fqn}.weight", fqn) if name in entries), None)
        if name is None:
            problems.append(f"the model has no layer {fqn} under this name ({reason})")
        elif isinstance(found := _stated(file, fqn, entries[name]), str):
            problems.append(f"{fqn} {found} ({reason})")
        elif (other := places.setdefault(name, fqn)) != fqn:
            problems.append(f"{other} and {fqn} are both {name}, which cannot hold both adapters")
        else:
            slots[fqn] = found
    return BaseFit(file, slots, {fqn: (fqn,) if fqn in entries else () for fqn in file.trained}), problems


def _stated(file: AdapterFile, fqn: str, entry: Entry) -> Slot | str:
    """Return where a weight is stored in the layout that the adapter states, or why it cannot be said."""
    header, shape = file.header, entry.shape
    trained: Shape = () if header is None else header.shapes[fqn]
    is_transposed: bool | None = True if file.fields.get("fan_in_fan_out") else None  # without it, some may be
    if header is not None and header.transposed is not None:
        is_transposed = fqn in header.transposed
        if len(shape) == 3 and header.kinds.get(fqn) == "experts":
            stack: Shape = (shape[0], shape[2], shape[1]) if is_transposed else shape
            kind = FORMS["transposed stack" if is_transposed else "stack"]
            return Slot((entry.name,), stack[-len(trained) :], kind)
    elif header is not None and len(shape) == 2 and shape[0] != shape[1]:
        is_transposed = trained == shape[::-1]
    if len(shape) > 2 and len(trained) == 2:
        return Slot((entry.name,), (shape[0], math.prod(shape[1:])), FORMS["kernel"])
    if len(shape) != 2:
        return f"has shape {shape}, expected a matrix"
    if is_transposed is None:
        return "may be stored transposed or not, and the adapter does not tell"
    matrix: Shape = shape[::-1] if is_transposed else shape
    if len(trained) == 3 and (trained[0] * trained[1], trained[2]) == matrix:
        matrix = trained  # matrices that lie one above the other
    if is_transposed:
        return Slot((entry.name,), matrix, Conv1DAdapter)
    # a parameter, such as an `in_proj_weight`, may be split
    return Slot((entry.name,), matrix, FORMS["in_proj_weight"] if entry.name == fqn else LinearAdapter)

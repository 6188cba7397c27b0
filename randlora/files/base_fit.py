"""How an adapter fits a base model on disk: which tensors hold its layers, and in which layout.

Where transformers has the model's class, names are mapped as ``from_pretrained`` maps them. Elsewhere the tensors must
have the names that the adapter gives its layers, but for a prefix that all of them have or lack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from randlora.checkpoint.fit import misfits, named_sites, other_prefix, trained_misfits
from randlora.checkpoint.read import AdapterFile
from randlora.checkpoint.tensors_file import Entry
from randlora.errors import CheckpointError, raise_collected
from randlora.files.model_directory import ModelDirectory
from randlora.files.quantized import DenseView, as_dense
from randlora.files.transformers_model import Conversion, TransformersModel, build_model
from randlora.layers.conv1d import Conv1DAdapter
from randlora.layers.linear import LinearAdapter
from randlora.targets.select import obstacles
from randlora.targets.site import Shapes, Site


class Base(NamedTuple):
    """A base model on disk.

    Attributes:
        dense: Its checkpoint, as the dense one that it stands for.
        model: Its class on the meta device; or why there is none.
    """

    dense: DenseView
    model: TransformersModel | str


class Slot(NamedTuple):
    """Where a base keeps a weight that an adapter goes on.

    Attributes:
        names: Names of the tensors that hold it; several where files hold a shared weight several times.
        shape: ``(out_features, in_features)``.
        in_storage_layout: Turns an update, ``(out_features, in_features)``, into the layout of the tensors.
        fused: The weight's FQN in the model and how it is split off, where it is a part of the tensor.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    in_storage_layout: Callable[[Tensor], Tensor]
    fused: tuple[str, Conversion] | None = None


@dataclass(frozen=True)
class BaseFit:
    """How an adapter fits a base model.

    Attributes:
        slots: Its weights, by the names that the adapter gives them.
        trained: Names of the tensors that a parameter trained beside the adapter replaces, by the adapter's name of it;
            none where the base lacks it.
        renamed: A layer by the adapter's name and by the model's, where they differ.
    """

    slots: Mapping[str, Slot]
    trained: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    renamed: tuple[str, str] | None = None

    @property
    def shapes(self) -> Shapes:
        """``(out_features, in_features)`` by the adapter's names."""
        return {fqn: slot.shape for fqn, slot in self.slots.items()}

    @property
    def absent(self) -> tuple[str, ...]:
        """What was trained beside the adapter that the base lacks."""
        return tuple(fqn for fqn, names in self.trained.items() if not names)


def open_base(directory: ModelDirectory) -> Base:
    """Look at a checkpoint as a dense one, with its class where transformers has it.

    Raises:
        CheckpointError: When it is quantized in a way that cannot be read.
    """
    model = build_model(directory)
    return Base(as_dense(directory, model), model)


def fit_base(base: Base, file: AdapterFile) -> BaseFit:
    """Hold an adapter against a base model, of which headers alone are read.

    Raises:
        CheckpointError: When a layer is missing or something has another shape; all such things are named at once. A
            parameter trained beside the adapter may be missing: a new head is in no base.
    """
    entries = base.dense.directory.entries
    fit, problems = (
        _fit_names(base.model, file, entries) if isinstance(base.model, str) else _fit_model(base.model, file, entries)
    )
    own = {fqn: entries[names[0]] for fqn, names in fit.trained.items() if names}
    problems += [*misfits(file, fit.shapes), *trained_misfits(own, file.trained)]
    raise_collected(CheckpointError, problems, doing=f"fit the adapter to {str(base.dense.directory.path)!r}")
    return fit


def _fit_model(model: TransformersModel, file: AdapterFile, entries: Mapping[str, Entry]) -> tuple[BaseFit, list[str]]:
    """Find an adapter's weights in a model, under its names or under others that ``from_pretrained`` maps to them."""
    known = {visit.fqn for visit in model.census.candidates}
    other = {fqn: name for fqn in file.values if fqn not in known and (name := model.layer_fqn(fqn)) in known}
    own = {other.get(fqn, fqn): fqn for fqn in file.values}
    found = named_sites(model.census, own if len(own) == len(file.values) else file.values)
    problems = obstacles(model.census, found, file.config.dropout)
    slots = {}
    fqns = {id(held.parameter): held.fqn for held in reversed(model.census.parameters)}  # of a tied one the first
    for site in found:
        layout = site.layer_class.in_storage_layout
        fqn = fqns[id(site.weight)]
        conversion = model.conversions.get(fqn)
        if names := model.names_of(site.weight):
            slots[own[site.fqn]] = Slot(names, _shape(site, entries[names[0]]), layout)
        elif conversion is None:
            problems.append(f"the model has no layer {site.fqn} in its files")
        elif len(conversion.sources) == 1:
            slots[own[site.fqn]] = Slot((*conversion.sources,), site.shape, layout, (fqn, conversion))
        else:
            parts = ", ".join(conversion.sources)
            problems.append(f"{site.fqn} is made of {parts} when it is loaded: load the model and merge in memory")
    parameters = model.names_by_fqn
    trained = {fqn: fqn if fqn in parameters else model.parameter_fqn(fqn) for fqn in file.trained}
    stored = {name: parameters.get(fqn, ()) for name, fqn in trained.items()}
    return BaseFit(slots, stored, next(iter(other.items()), None)), problems


def _shape(site: Site, entry: Entry) -> tuple[int, int]:
    """Return ``(out_features, in_features)`` of a weight as it is stored, whatever its class says."""
    if len(entry.shape) != 2 or site.weight is None or entry.shape == tuple(site.weight.shape):
        return site.shape
    is_transposed = site.shape != tuple(site.weight.shape)
    return (entry.shape[1], entry.shape[0]) if is_transposed else (entry.shape[0], entry.shape[1])


def _fit_names(reason: str, file: AdapterFile, entries: Mapping[str, Entry]) -> tuple[BaseFit, list[str]]:
    """Find an adapter's weights by the names of tensors, and their layout by what the adapter says of it."""
    dropped, added = other_prefix([f"{fqn}.weight" for fqn in file.values], entries)
    names = {fqn: added + fqn.removeprefix(dropped) for fqn in (*file.values, *file.trained)}
    slots, problems = {}, []
    for fqn in file.values:
        name = next((name for name in (f"{names[fqn]}.weight", names[fqn]) if name in entries), None)
        if name is None:
            problems.append(f"the model has no layer {fqn} under this name ({reason})")
        elif len(entries[name].shape) != 2:
            problems.append(f"{fqn} has shape {entries[name].shape}, expected a matrix ({reason})")
        else:
            slots[fqn] = _slot(file, fqn, entries[name])
    layouts = {slot.in_storage_layout for slot in slots.values()}
    if Conv1DAdapter.in_storage_layout in layouts and not file.fields.get("fan_in_fan_out"):
        square = [fqn for fqn, slot in slots.items() if slot.shape[0] == slot.shape[1]]
        problems += [f"{fqn} is square, and may be stored transposed or not ({reason})" for fqn in square]
    trained = {fqn: (names[fqn],) if names[fqn] in entries else () for fqn in file.trained}
    renamed = next(((fqn, names[fqn]) for fqn in file.values if names[fqn] != fqn), None)
    return BaseFit(slots, trained, renamed), problems


def _slot(file: AdapterFile, fqn: str, entry: Entry) -> Slot:
    """Return where a matrix is stored and how: transposed or not by its shape, or by ``fan_in_fan_out`` if square."""
    rows, columns = entry.shape
    is_transposed = bool(file.fields.get("fan_in_fan_out"))
    if file.header is not None and rows != columns:
        is_transposed = file.header.shapes[fqn] == (columns, rows)
    if is_transposed:
        return Slot((entry.name,), (columns, rows), Conv1DAdapter.in_storage_layout)
    return Slot((entry.name,), (rows, columns), LinearAdapter.in_storage_layout)

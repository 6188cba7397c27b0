"""An adapter on disk with its bases, and how it fits a base model on disk: which tensors hold its layers.

If transformers has the model's class, the adapter must fit that class, as in `randlora.load`, and names are mapped to
tensors as ``from_pretrained`` maps them. Otherwise the tensors must have the names of the adapter's layers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from randlora.bases.basis import Basis, BasisBank
from randlora.bases.spec import Shape, sliced_dims
from randlora.checkpoint.bases import Known, file_bases
from randlora.checkpoint.fit import misfits, named_sites, prefix_problems, trained_misfits, with_prefix, without_repeats
from randlora.checkpoint.read import AdapterFile, locate, read_adapter
from randlora.config import Stream, by_rank
from randlora.disk.formats import Entry
from randlora.disk.replace import is_free
from randlora.errors import CheckpointError, ConfigError, raise_collected, spelled
from randlora.files.model_directory import ModelDirectory, StoredCodes, find_codes, find_model, read_model_directory
from randlora.files.transformers_model import TransformersModel, build_model
from randlora.layers.base import AdapterLayer
from randlora.layers.linear import Conv1DAdapter, LinearAdapter
from randlora.layers.registry import FORMS
from randlora.layers.weight import Update, sum_updates
from randlora.targets.census import Shapes, sizes
from randlora.targets.left_out import obstacles
from randlora.targets.match import shortened


@dataclass(frozen=True, eq=False)
class OpenAdapter:
    """An adapter's files, checked, with its bases by r; none if only the shapes, which PEFT does not store, would tell.

    ``transposed`` is as in the file's header, and ``known`` are the layers of its base model, if that is given.
    """

    directory: Path
    file: AdapterFile
    shapes: Shapes | None
    bases: dict[int, Basis]
    transposed: tuple[str, ...] | None = None
    known: Known | None = None

    @property
    def kinds(self) -> Mapping[str, str]:
        """The kinds of targets that are not linear layers, by FQN. PEFT adapts no others."""
        return {} if self.file.header is None else self.file.header.kinds

    def update(self, fqn: str, factor: float = 1.0) -> Update:
        """Return the update of one layer, times a number, in factored form."""
        shapes, options = self.require_shapes(), self.file.options[fqn]
        lam, gamma = self.file.diagonals(fqn)
        return Update(self.bases[options.r], lam, gamma, options.scaling * factor, shapes[fqn])

    @torch.no_grad()
    def delta_weights(self, fqn: str) -> Iterator[Tensor]:
        """Yield the update of one layer, ``(out_features, in_features)``, or the updates of a stack, one by one.

        They are in float32, or in float64 if Λ has that dtype. An update that is not finite raises an error.
        """
        whole = self.update(fqn)
        matrix, pair = whole.shape[-2:], (whole.lam, whole.gamma)
        for lam, gamma in [pair] if matrix == whole.shape else zip(*pair, strict=True):
            update = whole._replace(lam=lam, gamma=gamma, shape=matrix)
            delta = sum_updates([update], matrix, device=torch.device("cpu"), dtype=lam.dtype)
            if not all(bound.isfinite() for bound in delta.aminmax()):
                raise CheckpointError(f"the update of {fqn} is too large for {delta.dtype}: its Λ and Γ are damaged")
            yield delta

    def digests(self) -> Iterator[tuple[Basis, str]]:
        """Yield the bases, each with the SHA-256 of the values that its layers use."""
        used = None if self.shapes is None else by_rank(self.shapes, self.file.options)
        for r, basis in self.bases.items():
            yield basis, basis.digest(*(basis.extent if used is None else sliced_dims(used[r])))

    def require_shapes(self) -> Shapes:
        """Return the shapes, or raise a `CheckpointError` if they are not known."""
        if self.shapes is None:
            raise CheckpointError(
                f"{str(self.directory)!r} was written by PEFT, which stores only the smaller dim of each layer: "
                f"give {spelled('base')}, the directory of its base model"
            )
        return self.shapes


def out_problems(out: Path, inputs: Iterable[str | os.PathLike[str]], *, overwrite: bool) -> list[str]:
    """Return why a directory cannot be written to."""
    place = Path(os.path.realpath(out))  # unlike Path.resolve, of links in a circle too
    problems = []
    for each in inputs:
        found = Path(os.path.realpath(each))
        if (found.parent if found.is_file() else found) in (place, *place.parents):
            problems.append(f"{out} is {each} or inside it, an input that must not change: choose a different one")
    if os.path.lexists(out) and not out.is_dir():
        problems.append(f"{out} is a file or a broken link: expected the name of a directory to write to")
    elif not overwrite and out.is_dir() and not is_free(out):
        given = spelled("overwrite", value=True)
        problems.append(f"{out} exists and is not empty: choose a different name, or give {given}")
    return problems


def open_adapter(
    source: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    prefix: str | None = None,
    stream: Stream | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
) -> OpenAdapter:
    """Read and check an adapter, and draw or take its bases. The base is needed only for files that PEFT wrote."""
    require_base_for(base, prefix=prefix, base_revision=base_revision)
    directory = locate(source, revision)
    file = read_adapter(directory, stream)
    if base is None:
        shapes, known = known_shapes(file), None
        transposed = None if file.header is None else file.header.transposed
    else:
        model = open_base(base, base_revision)
        weights, known = fit_base(model, file, prefix).weights_of(file), model.all_shapes
        shapes = shapes_in(weights)
        transposed = tuple(fqn for fqn, weight in weights.items() if weight.layer_class.is_transposed)
    file, bases = adapter_bases(file, shapes, known)
    return OpenAdapter(directory, file, shapes, bases, transposed, known)


def require_base_for(base: str | os.PathLike[str] | None, **options: str | None) -> None:
    """Raise a `ConfigError` if options that are for a base model are given without one."""
    for name, value in options.items():
        if value is not None and base is None:
            raise ConfigError(f"{spelled(name)} is for a base model: give {spelled('base')} too")


def open_fitted(
    directory: Path, file: AdapterFile, base: Base, prefix: str | None, bank: BasisBank
) -> tuple[OpenAdapter, BaseFit]:
    """Fit an adapter that was read to a base model, and add its bases to the bank, unless it has them already."""
    fit = fit_base(base, file, prefix)
    shapes = shapes_in(fit.weights)
    by_r = by_rank(shapes, fit.file.options)
    file, bases = file_bases(fit.file, by_r, bank, base.all_shapes)
    for r, own in by_r.items():
        bases[r].extend(*sliced_dims(own))
        bank.add(bases[r])
    return OpenAdapter(directory, file, shapes, bases), fit


def known_shapes(file: AdapterFile) -> Shapes | None:
    """Return the layers' shapes, which the tensors must have, or ``None`` for a file of PEFT, which stores none."""
    if file.header is None:
        return None
    shapes = dict(file.header.shapes)
    problems = [
        f"its header says that {fqn} is {sizes(shape)}, its randlora_gamma that it has {sizes(gamma.shape)} entries"
        for fqn, shape in shapes.items()
        if (gamma := file.values[fqn][1]).shape[-1] != min(shape[-2:]) or gamma.shape[:-2] != shape[:-2]
    ]
    raise_collected(CheckpointError, problems or misfits(file, shapes), doing="read the adapter")
    return shapes


def adapter_bases(
    file: AdapterFile, shapes: Shapes | None, known: Known | None = None
) -> tuple[AdapterFile, dict[int, Basis]]:
    """Draw and check, or take the bases in the file, and return it with their stream; none if neither is possible."""
    if shapes is not None:
        return file_bases(file, by_rank(shapes, file.options), BasisBank(), known)
    # as if one layer used all
    whole = {r: [(len(basis_B), basis_A.shape[-1])] for r, (basis_A, basis_B) in file.bases.items()}
    return file_bases(file, whole, BasisBank())


class Base(NamedTuple):
    """A base model on disk: its checkpoint, its class or why there is none, and its quantized tensors by name."""

    directory: ModelDirectory
    model: TransformersModel | str
    codes: Mapping[str, StoredCodes]

    @property
    def kinds(self) -> str:
        """The kinds of its codes."""
        return ", ".join(sorted({codes.kind for codes in self.codes.values()}))

    def all_shapes(self) -> list[Shape]:
        """Return the shapes of all weights that can be adapted; of all matrices if there is no class."""
        if not isinstance(self.model, str):
            return self.model.census.shapes()
        shapes = [entry.shape for entry in self.directory.entries.values() if len(entry.shape) > 1]
        return [*(shape[-2:] for shape in shapes), *((shape[0], math.prod(shape[1:])) for shape in shapes)]


class WeightInFiles(NamedTuple):
    """The tensors that contain an adapted weight, several if it is shared, and the ``shape`` of its update.

    ``layer_class`` converts an update of this shape to their layout.
    """

    names: tuple[str, ...]
    shape: Shape
    layer_class: type[AdapterLayer]


@dataclass(frozen=True, eq=False)
class BaseFit:
    """How an adapter fits a base model: ``file`` is the adapter under the names that the model has for its layers.

    ``trained`` are the tensors of each parameter trained with it. ``converted`` are its weights and parameters that
    transformers computes from tensors of the files, and that are not stored as they are.
    """

    file: AdapterFile
    weights: Mapping[str, WeightInFiles]
    trained: Mapping[str, tuple[str, ...]]
    converted: Sequence[str] = ()

    def weights_of(self, file: AdapterFile) -> dict[str, WeightInFiles]:
        """Return where the weights are by the names that the adapter has in its file."""
        names = dict(zip(self.file.values, file.values, strict=True))
        return {names[fqn]: weight for fqn, weight in self.weights.items()}


def shapes_in(weights: Mapping[str, WeightInFiles]) -> Shapes:
    """Return the shapes of the updates by FQN."""
    return {fqn: weight.shape for fqn, weight in weights.items()}


def open_base(source: str | os.PathLike[str], revision: str | None = None, *, needs_weights: bool = True) -> Base:
    """Read the headers of a model's checkpoint, here or on the Hub, and build its class."""
    return read_base(*find_model(source, revision), needs_weights=needs_weights)


def read_base(path: Path, repo_id: str | None = None, *, needs_weights: bool = True) -> Base:
    """Return what `open_base` does, of what `find_model` found."""
    checkpoint = read_model_directory(path, repo_id, needs_weights=needs_weights)
    codes, model = find_codes(checkpoint), build_model(checkpoint)
    if codes and isinstance(model, str):  # whose class alone says the shapes of what was quantized
        raise CheckpointError(f"{path} is quantized, and cannot be read without its model: {model}")
    return Base(checkpoint, model, codes)


def fit_base(base: Base, file: AdapterFile, prefix: str | None = None) -> BaseFit:
    """Return how an adapter fits a base model. Only headers of the model are read. One error names all misfits."""
    entries = base.directory.entries
    own: dict[str, Tensor | Entry] = {}
    if isinstance(base.model, str):
        fit, problems = _fit_names(base.model, file, prefix, entries)
    else:
        fit, problems = _fit_model(base, base.model, file, prefix)
        own |= {held.fqn: held.tensor for held in base.model.census.tensors}
    codes = {fqn for fqn, names in fit.trained.items() if base.codes.keys() & set(names)}
    stored = {fqn: names for fqn, names in fit.trained.items() if names and fqn not in codes}
    own |= {fqn: entries[names[0]] for fqn, names in stored.items()}
    problems += [*misfits(fit.file, shapes_in(fit.weights)), *trained_misfits(own, fit.file)]
    problems += [f"{fqn} is quantized here, and was trained as {fit.file.trained[fqn].dtype}" for fqn in codes]
    raise_collected(CheckpointError, problems, doing=f"fit the adapter to {str(base.directory.path)!r}")
    return fit


def _fit_model(
    base: Base, model: TransformersModel, file: AdapterFile, prefix: str | None
) -> tuple[BaseFit, list[str]]:
    entries = base.directory.entries
    file = with_prefix(file, prefix, model.census.sites_by_fqn)
    sites = named_sites(model.census, file)
    file = without_repeats(model.census, file)
    problems = obstacles(model.census, sites, file.config.dropout)
    weights, converted = dict[str, WeightInFiles](), [fqn for fqn in file.trained if fqn in model.converted]
    fqns = {id(held.tensor): held.fqn for held in reversed(model.census.parameters)}  # the first of a tied one
    for site in sites:
        if site.weight is None:
            continue  # computed, which is an obstacle
        shape, names = tuple(site.weight.shape), model.names_of(site.weight)
        if not names and fqns[id(site.weight)] not in model.converted:
            problems.append(f"the model has no layer {site.fqn} in its files")
            continue
        if not names:
            converted.append(site.fqn)
        elif names[0] not in base.codes and (stored := entries[names[0]].shape) != shape:
            problems.append(f"{site.fqn} has shape {stored} in the files, {shape} by its config.json")
        weights[site.fqn] = WeightInFiles(names, site.shape_with(file.config), site.layer_class)
    by_fqn = model.names_by_fqn
    trained = {fqn: by_fqn.get(fqn, ()) for fqn in file.trained}
    if absent := [fqn for fqn, names in trained.items() if fqn in by_fqn and not names and fqn not in converted]:
        problems.append(f"the model's files have no {shortened(absent)}, which the adapter trained")
    return BaseFit(file, weights, trained, converted), problems


def _fit_names(
    reason: str, file: AdapterFile, prefix: str | None, entries: Mapping[str, Entry]
) -> tuple[BaseFit, list[str]]:
    known = {*entries, *(name.removesuffix(".weight") for name in entries)}
    file = with_prefix(file, prefix, known)
    weights: dict[str, WeightInFiles] = {}
    places: dict[str, str] = {}
    problems = prefix_problems(file, known)
    for fqn in [] if problems else file.values:
        name = next((name for name in (f"{fqn}.weight", fqn) if name in entries), None)
        if name is None:
            problems.append(f"the model has no layer {fqn} under this name ({reason})")
        elif isinstance(found := _stated(file, fqn, entries[name]), str):
            problems.append(f"{fqn} {found} ({reason})")
        elif (other := places.setdefault(name, fqn)) != fqn:
            problems.append(f"{other} and {fqn} are both {name}, which cannot hold both adapters")
        else:
            weights[fqn] = found
    return BaseFit(file, weights, {fqn: (fqn,) if fqn in entries else () for fqn in file.trained}), problems


def _stated(file: AdapterFile, fqn: str, entry: Entry) -> WeightInFiles | str:
    """Return where a weight is stored in the layout that the adapter states, or why it cannot be said."""
    header, shape = file.header, entry.shape
    trained: Shape = () if header is None else header.shapes[fqn]
    is_transposed: bool | None = True if file.fields.get("fan_in_fan_out") else None  # without it, some may be
    if header is not None and header.transposed is not None:
        is_transposed = fqn in header.transposed
        if len(shape) == 3 and header.kinds.get(fqn) == "experts":
            stack: Shape = (shape[0], shape[2], shape[1]) if is_transposed else shape
            kind = FORMS["transposed stack" if is_transposed else "stack"]
            return WeightInFiles((entry.name,), stack[-len(trained) :], kind)
    elif header is not None and len(shape) == 2 and shape[0] != shape[1]:
        is_transposed = trained == shape[::-1]
    if len(shape) > 2 and len(trained) == 2:
        return WeightInFiles((entry.name,), (shape[0], math.prod(shape[1:])), FORMS["kernel"])
    if len(shape) != 2:
        return f"has shape {shape}, expected a matrix"
    if is_transposed is None:
        return "may be stored transposed or not, and the adapter does not tell"
    matrix: Shape = shape[::-1] if is_transposed else shape
    if len(trained) == 3 and (trained[0] * trained[1], trained[2]) == matrix:
        matrix = trained  # matrices that lie one above the other
    if is_transposed:
        return WeightInFiles((entry.name,), matrix, Conv1DAdapter)
    # a parameter, such as an `in_proj_weight`, may be split
    return WeightInFiles((entry.name,), matrix, FORMS["in_proj_weight"] if entry.name == fqn else LinearAdapter)

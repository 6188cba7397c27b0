"""An adapter on disk with its bases, ready to compute updates layer by layer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from randlora.bases.basis import Basis, BasisBank
from randlora.bases.spec import sliced_dims
from randlora.checkpoint.bases import Known, file_bases
from randlora.checkpoint.fit import misfits
from randlora.checkpoint.peft_config import BASE_FIELD
from randlora.checkpoint.read import AdapterFile, locate, read_adapter
from randlora.checkpoint.tensors import master
from randlora.config import Stream, by_rank
from randlora.disk.replace import is_free
from randlora.errors import CheckpointError, ConfigError, raise_collected, spelled
from randlora.files.base_fit import Base, BaseFit, fit_base, open_base, shapes_in
from randlora.layers.update import Update, sum_updates
from randlora.targets.census import Shapes, sizes


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
        lam, gamma = (master(part, "cpu") for part in self.file.values[fqn])
        return Update(self.bases[options.r], lam, gamma, options.scaling * factor, shapes[fqn])

    @torch.no_grad()
    def delta_weights(self, fqn: str) -> Iterator[Tensor]:
        """Yield the update of one layer, ``(out_features, in_features)``, or the updates of a stack, one by one.

        They are in float32, or in float64 if Λ has that dtype. An update that is not finite raises an error.
        """
        whole = self.update(fqn)
        for update in [whole] if len(whole.shape) == 2 else map(whole.at, range(whole.shape[0])):
            delta = sum_updates([update], update.shape, device=torch.device("cpu"), dtype=update.lam.dtype)
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
            named = self.file.fields.get(BASE_FIELD)
            raise CheckpointError(
                f"{str(self.directory)!r} was written by PEFT, which stores only the smaller dim of each layer: "
                f"give {spelled('base')}, the directory of its base model{f', {named!r}' if named else ''}"
            )
        return self.shapes


def out_problems(out: Path, inputs: Iterable[str | os.PathLike[str]], *, overwrite: bool) -> list[str]:
    """Return why a directory cannot be written to."""
    place = Path(os.path.realpath(out))  # unlike Path.resolve, of links in a circle too
    problems = []
    for each in inputs:
        found = Path(os.path.realpath(each))
        if (found.parent if found.is_file() else found) in (place, *place.parents):
            problems.append(
                f"{out} is {each} or inside it, an input that must not change: choose a different directory"
            )
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
        shapes = known_shapes(file)
        transposed = None if file.header is None else file.header.transposed
        known = None
    else:
        model = open_base(base, base_revision)
        slots, known = fit_base(model, file, prefix).slots_of(file), model.all_shapes
        shapes = shapes_in(slots)
        transposed = tuple(fqn for fqn, slot in slots.items() if slot.layer_class.is_transposed)
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
    shapes = shapes_in(fit.slots)
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

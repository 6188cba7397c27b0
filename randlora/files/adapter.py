"""An adapter on disk with the shapes of its layers, so that every update can be computed one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from randlora.bases.bank import BasisBank
from randlora.bases.basis import Basis
from randlora.checkpoint.bases import file_basis
from randlora.checkpoint.fit import misfits
from randlora.checkpoint.layout import master_copy
from randlora.checkpoint.read import AdapterFile, read_adapter
from randlora.errors import CheckpointError, raise_collected
from randlora.files.base_fit import fit_base, open_base
from randlora.files.model_directory import read_model_directory
from randlora.functional import Diagonals, delta_weight
from randlora.targets.site import Shapes


@dataclass(frozen=True, eq=False)
class OpenAdapter:
    """An adapter's files, checked, with its bases.

    Attributes:
        directory: Where the files are.
        file: What they hold.
        shapes: ``(out_features, in_features)`` by target; ``None`` where nothing says them: PEFT does not write them.
        basis: Its bases; ``None`` where neither the file holds them nor the shapes say what to draw.
    """

    directory: Path
    file: AdapterFile
    shapes: Shapes | None
    basis: Basis | None

    @torch.no_grad()
    def delta_weight(self, fqn: str) -> Tensor:
        """Compute the update of one layer.

        Returns:
            ``(out_features, in_features)``, float32, or float64 where Λ is.

        Raises:
            CheckpointError: When the shapes are not known, or the update is not finite.
        """
        shapes, basis = self.require_shapes()
        out_features, in_features = shapes[fqn]
        lam, gamma = (master_copy(part, "cpu") for part in self.file.values[fqn])
        sides = max(out_features, in_features), min(out_features, in_features)
        pair = basis.pair(*sides, device=torch.device("cpu"), dtype=lam.dtype)
        update = delta_weight(pair, Diagonals(lam, gamma, self.file.config.scaling), in_features=in_features)
        if not all(bound.isfinite() for bound in update.aminmax()):
            raise CheckpointError(f"the update of {fqn} is too large for {update.dtype}: its Λ and Γ are damaged")
        return update

    def require_shapes(self) -> tuple[Shapes, Basis]:
        """Return the shapes and the bases.

        Raises:
            CheckpointError: When nothing says them.
        """
        if self.shapes is None or self.basis is None:
            named = self.file.fields.get("base_model_name_or_path")
            raise CheckpointError(
                f"{str(self.directory)!r} was written by PEFT, which says the smaller side of each layer only: "
                f"give the directory of its base model too{f', {named!r}' if named else ''}"
            )
        return self.shapes, self.basis


def open_adapter(directory: Path, base: Path | None = None) -> OpenAdapter:
    """Read and check an adapter, and draw or take its bases.

    Args:
        directory: What `randlora.save` or PEFT's ``save_pretrained`` wrote.
        base: The base model's directory, of which only headers are read. Only for a file that PEFT wrote is it needed.

    Raises:
        CheckpointError: When a file is damaged or foreign, the bases do not come out as they were, or the adapter does
            not fit the base.
    """
    file = read_adapter(directory)
    shapes = known_shapes(file) if base is None else fit_base(open_base(read_model_directory(base)), file).shapes
    return OpenAdapter(directory, file, shapes, adapter_basis(file, shapes))


def known_shapes(file: AdapterFile) -> Shapes | None:
    """Return the layers' shapes where the file says them, which PEFT's do not.

    Raises:
        CheckpointError: When its tensors have other shapes.
    """
    if file.header is None:
        return None
    shapes = dict(file.header.shapes)
    problems = [
        f"its header says that {fqn} is {shape[0]} x {shape[1]}, its randlora_gamma that a side is {min_dim}"
        for fqn, shape in shapes.items()
        if (min_dim := file.values[fqn][1].shape[1]) != min(shape)
    ]
    raise_collected(CheckpointError, problems or misfits(file, shapes), doing="read the adapter")
    return shapes


def adapter_basis(file: AdapterFile, shapes: Shapes | None) -> Basis | None:
    """Draw the bases and check them, or take those in the file; ``None`` where there is too little to draw from.

    Raises:
        CheckpointError: When they are not those that the adapter was trained with.
    """
    if shapes is None:
        if file.bases is None:
            return None
        shapes = {"": (len(file.bases[1]), file.bases[0].shape[-1])}  # as if one layer used all of them
    return file_basis(file, shapes, BasisBank())

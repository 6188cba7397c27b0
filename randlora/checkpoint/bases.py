"""The bases of an adapter on disk: drawn again and checked, or those that the file holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from randlora.bases.bank import BasisBank
from randlora.bases.basis import Basis
from randlora.bases.compact import CompactMatrix
from randlora.bases.spec import BasisSpec, Shape, count_bases, drawn_dims, sliced_dims, spec_for
from randlora.checkpoint.read import AdapterFile
from randlora.errors import CheckpointError, ConfigError
from randlora.layer_options import by_rank
from randlora.targets.site import Shapes


def file_bases(file: AdapterFile, shapes: Shapes, bank: BasisBank) -> dict[int, Basis]:
    """Return the bases that a file's adapter was trained with, by r, those of the bank if it has the same bits.

    The bank does not change. It is an error if other bases are drawn than those that the file was saved with.
    """
    return {r: bases_of_rank(file, r, own, bank) for r, own in by_rank(shapes, file.options).items()}


def bases_of_rank(file: AdapterFile, r: int, shapes: Sequence[Shape], bank: BasisBank) -> Basis:
    """Return the bases of one r, as `file_bases` does, for the shapes of the layers that use them."""
    used = sliced_dims(shapes)
    spec, stored = _spec(file, r, shapes), file.bases.get(r)
    record = None if file.header is None else file.header.bases[r]
    if record is not None and not record.is_reproducible:
        return _as_stored(file, spec, used, bank)
    basis = Basis(spec)  # not the bank's own, which must not grow before all is checked
    try:
        basis.extend(*used)
        basis.matrices()
    except ConfigError as error:
        raise CheckpointError(f"the bases that the file names cannot be drawn: {error}") from error
    if stored is not None and not _equal(basis, stored, used):
        return _as_stored(file, spec, used, bank)
    if file.header is not None and record is not None and (digest := basis.digest(*used)) != record.digest:
        here, drawn_by = torch.__version__.split("+")[0], file.header.torch_version
        then = f"torch {drawn_by}" if drawn_by else "an unknown torch"
        raise CheckpointError(
            f"the {spec} drawn here, by torch {here}, have the SHA-256 {digest[:12]}…, and had "
            f"{record.digest[:12]}… when the adapter was saved with {then}: save it there with bases='stored'"
        )
    return bank.find(spec) or basis


def _spec(file: AdapterFile, r: int, shapes: Sequence[Shape]) -> BasisSpec:
    """Return the spec in our header, or the one by which PEFT draws bases of the stored shapes or for the layers."""
    if file.header is not None:
        return file.header.bases[r].spec
    if (stored := file.bases.get(r)) is not None:
        return spec_for(file.config, r, len(stored[1]), stored[0].shape[-1])
    return spec_for(file.config, r, *drawn_dims(shapes))


def _as_stored(file: AdapterFile, spec: BasisSpec, used: tuple[int, int], bank: BasisBank) -> Basis:
    """Return bases with the values in the file, which no seed reproduces, or equal ones that the bank has."""
    if spec.r not in file.bases:
        raise CheckpointError("the file holds no bases, and no seed reproduces its own: save with bases='stored'")
    basis_A, basis_B = file.bases[spec.r]
    stored = (
        CompactMatrix.from_dense(basis_A.flatten(end_dim=1)),
        CompactMatrix.from_dense(basis_B.flatten(start_dim=1)),
    )
    basis = Basis(spec, extent=(len(basis_B), basis_A.shape[-1]), stored=stored)
    digest = basis.digest(*used)
    if file.header is not None and digest != file.header.bases[spec.r].digest:
        raise CheckpointError(
            "the bases stored in the file are not those it names: it was edited; get an undamaged copy"
        )
    for held in bank:
        if held.stored is not None and held.spec == spec and held.digest(*used) == digest:
            return held
    return basis


def _equal(basis: Basis, stored: tuple[Tensor, Tensor], used: tuple[int, int]) -> bool:
    """Return whether the values in the file that layers use are the drawn ones, comparing some rows at a time."""
    max_dim, min_dim = used
    used_A, used_B = stored[0][:, 0, :min_dim], stored[1][:max_dim, : count_bases(min_dim, basis.spec.r)]
    for drawn, values in zip(basis.matrices(), (used_A, used_B), strict=True):
        start = 0
        for rows in drawn.dense_chunks(len(values)):
            if not torch.equal(rows, values[start : start + len(rows)].flatten(start_dim=1).float()):
                return False
            start += len(rows)
    return True

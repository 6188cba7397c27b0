"""The bases an adapter's file means: drawn again and checked, or kept as the file holds them."""

from __future__ import annotations

import torch
from torch import Tensor

from randlora.bases.bank import BasisBank
from randlora.bases.basis import Basis
from randlora.bases.compact import CompactMatrix
from randlora.bases.spec import BasisSpec, count_bases, drawn_dims, sliced_dims, spec_for
from randlora.checkpoint.read import AdapterFile
from randlora.errors import CheckpointError, ConfigError
from randlora.targets.site import Shapes


def file_basis(file: AdapterFile, shapes: Shapes, bank: BasisBank) -> Basis:
    """Find or make the bases that a file's adapter was trained with; the bank is not changed.

    Args:
        file: The adapter.
        shapes: ``(out_features, in_features)`` of its layers.
        bank: Bases the model holds already, which are shared where they are the same bits.

    Raises:
        CheckpointError: When what the spec draws is not what the file was saved with.
    """
    used = sliced_dims(shapes.values())
    spec = _spec(file, shapes)
    if file.header is not None and not file.header.is_reproducible:
        return _as_stored(file, spec, used, bank)
    basis = Basis(spec)  # not the bank's own, which must not grow before all is checked
    try:
        basis.extend(*used)
        basis.matrices()
    except ConfigError as error:
        raise CheckpointError(f"the bases that the file names cannot be drawn: {error}") from error
    if file.header is not None and (digest := basis.digest(*used)) != file.header.basis_digest:
        raise CheckpointError(
            f"the {spec} drawn here are not those the adapter was trained with: SHA-256 {digest[:12]}… instead of "
            f"{file.header.basis_digest[:12]}…; stream='torch' needs a torch that draws as it did then"
        )
    if file.bases is None or _equal(basis, file.bases, used):
        return bank.find(spec) or basis
    if file.header is not None:
        raise CheckpointError(
            "the bases stored in the file are not those it names: it was edited; get an undamaged copy"
        )
    return _as_stored(file, spec, used, bank)


def _spec(file: AdapterFile, shapes: Shapes) -> BasisSpec:
    """Name the bases: as our header does, by the shapes PEFT stored, or by the rule PEFT draws with."""
    if file.header is not None:
        return file.header.spec
    if file.bases is not None:
        return spec_for(file.config, len(file.bases[1]), file.bases[0].shape[-1])
    return spec_for(file.config, *drawn_dims(shapes.values()))


def _as_stored(file: AdapterFile, spec: BasisSpec, used: tuple[int, int], bank: BasisBank) -> Basis:
    """Keep the file's own numbers, where no seed brings them back, or the same numbers already held."""
    if file.bases is None:
        raise CheckpointError("the file holds no bases, and no seed brings its own back: save with bases='stored'")
    basis_A, basis_B = file.bases
    stored = (
        CompactMatrix.from_dense(basis_A.flatten(end_dim=1)),
        CompactMatrix.from_dense(basis_B.flatten(start_dim=1)),
    )
    basis = Basis(spec, extent=(len(basis_B), basis_A.shape[-1]), stored=stored)
    digest = basis.digest(*used)
    if file.header is not None and digest != file.header.basis_digest:
        raise CheckpointError(
            "the bases stored in the file are not those it names: it was edited; get an undamaged copy"
        )
    for held in bank:
        if held.stored is not None and held.spec == spec and held.digest(*used) == digest:
            return held
    return basis


def _equal(basis: Basis, stored: tuple[Tensor, Tensor], used: tuple[int, int]) -> bool:
    """Whether the file's numbers are the drawn ones, wherever a layer reads them."""
    max_dim, min_dim = used
    used_A, used_B = stored[0][:, 0, :min_dim], stored[1][:max_dim, : count_bases(min_dim, basis.spec.r)]
    return all(map(_equal_rows, basis.matrices(), (used_A, used_B)))


def _equal_rows(drawn: CompactMatrix, stored: Tensor) -> bool:
    """Compare some rows at a time, so that what was drawn is never written out whole beside what is stored."""
    start = 0
    for rows in drawn.dense_chunks(len(stored)):
        if not torch.equal(rows, stored[start : start + len(rows)].flatten(start_dim=1).float()):
            return False
        start += len(rows)
    return True

"""The bases of an adapter on disk: drawn again and checked, or read from the file.

A file names dims in a few bytes, and drawing such bases may take all memory. They may be as large as layers of other
adapters, which the file need not name: so the layers of the model limit what is drawn, not those of the file.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from randlora.bases.basis import Basis, BasisBank
from randlora.bases.spec import (
    PEFT_STREAMS,
    BasisSpec,
    CompactMatrix,
    Shape,
    count_bases,
    default_stream,
    drawn_dims,
    peft_streams,
    sliced_dims,
    spec_for,
)
from randlora.checkpoint.header import Header
from randlora.checkpoint.peft_layout import basis_keys
from randlora.checkpoint.read import AdapterFile
from randlora.disk.formats import Planned
from randlora.errors import CheckpointError, ConfigError, spelled

Dims = tuple[int, int]  # max_dim and min_dim
Known = Callable[[], Iterable[Shape]]  # returns the shapes of all layers of a model; called only if they matter

FREE_ENTRIES = 2**22  # that are drawn for any file, in a part of a second: as many as a weight of 2048 x 2000 needs
ENTRIES_PER_VALUE = 2**10  # that may be drawn for each entry of Λ and Γ, if no model tells how large the layers are
ENTRIES_PER_ROW = 2**6  # entries that are drawn in the time in which a row begins, whose stream may be its own


def stream_notes(file: AdapterFile) -> tuple[str, ...]:
    """Return a note if neither the file nor the caller says which of two streams the bases are from."""
    kind = file.config.basis
    if file.header is not None or file.bases or file.stream is not None or len(peft_streams(kind)) == 1:
        return ()
    note = (
        f"PEFT stored neither the bases nor the torch that drew them: assumed {spelled('stream', 'torch')}, of torch "
        "2.12 and newer. An adapter trained under torch 2.11 or older had others and computes something else with "
        f"these: give {spelled('stream', 'torch-2.11')} for it"
    )
    return (note,)


def file_bases(
    file: AdapterFile, shapes: Mapping[int, Sequence[Shape]], bank: BasisBank, known: Known | None = None
) -> tuple[AdapterFile, dict[int, Basis]]:
    """Return the bases that a file's adapter was trained with, by r, and the file with their stream in its config.

    A digest in the file, or the bases themselves, decide which of PEFT's streams the bases are from. Bases with the
    same bits are taken from the bank, which does not change. ``shapes`` are the shapes of the layers' updates, by r.
    """
    drawn = {r: (_spec_of_rank(file, r, used_by), sliced_dims(used_by)) for r, used_by in shapes.items()}
    require_drawable(drawn.values(), file, known)
    bases = {r: _bases_of_rank(file, spec, used, bank) for r, (spec, used) in drawn.items()}
    streams = sorted({basis.spec.stream for basis in bases.values()})
    if len(streams) > 1:
        raise CheckpointError(f"its bases are from several streams, {' and '.join(streams)}: get an undamaged copy")
    is_stored = any(basis.stored is not None for basis in bases.values())
    if file.stream is not None and (is_stored or streams not in ([], [file.stream])):
        origin = "no seed" if is_stored else repr(streams[0])
        raise CheckpointError(f"{spelled('stream', file.stream)} is given, but the bases are from {origin}: omit it")
    if streams not in ([], [file.config.stream or default_stream(file.config.basis)]):
        file = replace(file, config=replace(file.config, stream=streams[0]))
    return file, bases


def _spec_of_rank(file: AdapterFile, r: int, shapes: Sequence[Shape]) -> BasisSpec:
    """Return what the bases of one r are, for the shapes of the layers that use them."""
    if file.header is not None:
        return file.header.bases[r].spec
    spec, stored = spec_for(file.config, r, shapes), file.bases.get(r)
    # by which PEFT draws bases of these shapes
    return spec if stored is None else replace(spec, max_dim=len(stored[1]), min_dim=stored[0].shape[-1])


def _bases_of_rank(file: AdapterFile, spec: BasisSpec, used: Dims, bank: BasisBank) -> Basis:
    """Return the bases of one r, as `file_bases` does, of which layers use so much."""
    stored, record = file.bases.get(spec.r), None if file.header is None else file.header.bases[spec.r]
    if record is not None and not record.is_reproducible:
        return _as_stored(file, spec, used, bank)
    digests = []
    # before "torch-2.11" had a name, a file of ours said "torch" of what the torch of its time drew
    others = peft_streams(spec.kind) if spec.stream in PEFT_STREAMS else ()
    for candidate in (spec, *(replace(spec, stream=stream) for stream in others if stream != spec.stream)):
        present = bank.find(candidate)
        if (basis := present) is None or not all(map(operator.ge, basis.extent, used)):
            basis = _drawn(candidate, used)
        if stored is not None and not _equal(basis, stored, used):
            continue
        if record is None:  # nothing else to compare with
            return present or basis
        digests.append(basis.digest(*used))
        if digests[-1] == record.digest:
            return present or basis
    if stored is not None:
        return _as_stored(file, spec, used, bank)
    assert file.header is not None, "bases without a header are found or stored"
    assert record is not None, "a file with a header has a record for each r"
    here, then = torch.__version__.split("+")[0], file.header.torch_version or "of an unknown version"
    have = f"the {spec} drawn here, by torch {here}, have the SHA-256 {digests[0][:12]}…"
    had = f"had {record.digest[:12]}… when the adapter was saved with torch {then}"
    raise CheckpointError(f"{have}, and {had}: save it there with bases='stored'")


def _drawn(spec: BasisSpec, used: Dims) -> Basis:
    """Draw bases for layers of these dims, not the bank's own, which must not grow before all is checked."""
    basis = Basis(spec)
    try:
        basis.extend(*used)
        basis.matrices()
    except ConfigError as error:
        raise CheckpointError(f"the bases that the file names cannot be drawn: {error}") from error
    return basis


def _as_stored(file: AdapterFile, spec: BasisSpec, used: Dims, bank: BasisBank) -> Basis:
    """Return bases with the values in the file, which no seed reproduces, or equal ones that the bank has."""
    if spec.r not in file.bases:
        raise CheckpointError("the file holds no bases, and no seed reproduces them: save with bases='stored'")
    basis_A, basis_B = file.bases[spec.r]
    flat_A, flat_B = basis_A.flatten(end_dim=1), basis_B.flatten(start_dim=1)
    stored = CompactMatrix.from_dense(flat_A), CompactMatrix.from_dense(flat_B)
    basis = Basis(spec, extent=(len(basis_B), basis_A.shape[-1]), stored=stored)
    digest = basis.digest(*used)
    if file.header is not None and digest != file.header.bases[spec.r].digest:
        raise CheckpointError("the bases stored in the file are not those it names: get an undamaged copy")
    equal = (other for other in bank if other.stored and other.spec == spec and other.digest(*used) == digest)
    return next(equal, basis)


def _equal(basis: Basis, stored: tuple[Tensor, Tensor], used: Dims) -> bool:
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


def count_entries(r: int, max_dim: int, min_dim: int) -> int:
    """Return the number of entries of A, ``(r, min_dim)``, and of B, ``(max_dim, num_bases·r)``."""
    return r * min_dim + max_dim * count_bases(min_dim, r) * r


def require_drawable(drawn: Iterable[tuple[BasisSpec, Dims]], file: AdapterFile, known: Known | None) -> None:
    """Raise a `CheckpointError` if bases are larger than layers of the model, or what the file has, may need.

    ``drawn`` has each r's and the dims that layers use. Without a model, those of all r together count.
    """
    together = 0
    for spec, used in drawn:
        max_dim, min_dim = max(spec.max_dim, used[0]), max(spec.min_dim, used[1])
        count = count_entries(spec.r, max_dim, min_dim)
        cost = count + ENTRIES_PER_ROW * (max_dim + spec.r)
        if count <= sum(basis.numel() for basis in file.bases.get(spec.r, ())):
            continue
        together += cost
        asked = f"the file asks for bases of {max_dim} x {min_dim} with r={spec.r}, {count:,} entries"
        if known is None:
            trained = sum(part.numel() for pair in file.values.values() for part in pair)
            if together > max(FREE_ENTRIES, ENTRIES_PER_VALUE * trained):
                advice = "give the base model's directory"
                raise CheckpointError(f"{asked}, but has only {trained:,} trained values: {advice}")
        elif cost > FREE_ENTRIES:
            dims = drawn_dims([*known(), (1, 1)])
            if count > count_entries(spec.r, *dims):
                needed = f"{asked}, but the largest layers of this model need {dims[0]} x {dims[1]}"
                raise CheckpointError(f"{needed}: if there were larger ones, save there with bases='stored'")


def stored_bases(bases: Mapping[int, Basis], header: Header) -> list[Planned]:
    """Return dense bases, with the dims that PEFT expects, or smaller ones if the bases were drawn for less."""
    tensors = []
    for r, rectangle in header.rectangles.items():
        max_dim, min_dim = stored_dims(bases[r], rectangle)
        drawn = bases[r] if bases[r].stored else Basis(bases[r].spec)  # the model's own must not grow
        drawn.extend(max_dim, min_dim)
        shapes = (r, 1, min_dim), (max_dim, count_bases(min_dim, r), r)
        for index, (key, shape) in enumerate(zip(basis_keys(r, header.bases.keys()), shapes, strict=True)):
            tensors.append(Planned(key, torch.float32, shape, partial(_rows, drawn, index, shape)))
    return tensors


def _rows(basis: Basis, index: int, shape: tuple[int, int, int]) -> Iterator[Tensor]:
    """Yield the rows of A (index 0) or B (index 1), dense, some at a time."""
    for rows in basis.matrices()[index].dense_chunks(shape[0]):
        yield rows[:, : shape[1] * shape[2]].clone()  # those kept in float32 are the basis itself


def stored_dims(basis: Basis, rectangle: Dims) -> Dims:
    """Return the ``(max_dim, min_dim)`` that `stored_bases` stores of bases for which PEFT would draw ``rectangle``."""
    spec, (max_dim, min_dim) = basis.spec, rectangle
    return rectangle if spec.is_prefix_stable else (min(spec.max_dim, max_dim), min(spec.min_dim, min_dim))

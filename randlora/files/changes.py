"""What adapters make of a checkpoint's tensors: which are merged into, and which are replaced.

The arithmetic is that of `randlora.merge`, update by update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from randlora.bases.bank import BasisBank
from randlora.bases.spec import sliced_dims
from randlora.checkpoint.bases import file_basis
from randlora.checkpoint.layout import master_copy
from randlora.checkpoint.read import AdapterFile, read_adapter
from randlora.checkpoint.tensors_file import Entry
from randlora.errors import CheckpointError, MergeError, raise_collected
from randlora.files.base_fit import Base, BaseFit, Slot, fit_base
from randlora.files.quantized import DenseView
from randlora.files.tensor_file import read_pieces
from randlora.files.transformers_model import Conversion
from randlora.layers.update import Update, folded, sum_updates
from randlora.model.merge import require_finite


@dataclass(frozen=True, eq=False)
class Merging:
    """A weight that adapters are merged into.

    Attributes:
        fqn: Its layer's name.
        slot: Where the checkpoint keeps it.
        updates: The adapters' updates, in the order in which they are summed.
    """

    fqn: str
    slot: Slot
    updates: list[Update] = field(default_factory=list)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """Return the merged weight, in the dtype and layout of ``weight``.

        Raises:
            MergeError: When it would not be finite.
        """
        dtype = torch.promote_types(weight.dtype, torch.float32)
        delta = sum_updates(self.updates, self.slot.shape, device=weight.device, dtype=dtype)
        return require_finite(self.fqn, folded(weight, self.slot.in_storage_layout(delta)))


@dataclass(frozen=True, eq=False)
class FusedMerging:
    """A tensor of which adapters are merged into parts, which are weights of their own in the model.

    Attributes:
        conversion: How the parts are split off and joined.
        parts: Those that are merged into, by FQN.
    """

    conversion: Conversion
    parts: dict[str, Merging] = field(default_factory=dict)

    @property
    def updates(self) -> list[Update]:
        """The updates of all parts."""
        return [update for part in self.parts.values() for update in part.updates]

    def merged(self, weight: Tensor) -> Tensor:
        """Return the tensor with its parts merged, as `Merging.merged` does."""
        found = self.conversion.split(weight)
        return self.conversion.join(found | {fqn: part.merged(found[fqn]) for fqn, part in self.parts.items()})


@dataclass(frozen=True, eq=False)
class Changes:
    """What adapters change in a checkpoint, by the names of its tensors.

    Attributes:
        merged: Weights that are merged into.
        replaced: Tensors with a version trained beside an adapter, which is that adapter's.
        base: The checkpoint.
        notes: What the user should know.
    """

    merged: dict[str, Merging | FusedMerging]
    replaced: dict[str, Tensor]
    base: DenseView
    notes: tuple[str, ...] = ()

    def pieces(self, entry: Entry, dtype: torch.dtype) -> Iterator[Tensor]:
        """Go through the parts of what becomes of a tensor, reading it as they are asked for.

        Args:
            entry: A tensor of the checkpoint.
            dtype: What it shall be in. It is computed in the wider of this and its own, from codes in float32 at least,
                then rounded once.

        Raises:
            MergeError: When a value would not be finite, but for those that were not before.
        """
        is_coded = entry.name in self.base.codes
        wide = torch.promote_types(torch.float32 if is_coded else entry.dtype, dtype)
        own = self.replaced.get(entry.name)
        if (merging := self.merged.get(entry.name)) is not None:
            weight = self.base.read(entry) if own is None else own  # one adapter's own version, which another adapts
            yield _cast(entry.name, merging.merged(weight.to(wide)), dtype)
        elif own is not None:
            yield _cast(entry.name, own.to(wide), dtype)
        elif is_coded:
            yield _cast(entry.name, self.base.read(entry), dtype)
        else:
            yield from (_cast(entry.name, piece, dtype) for piece in read_pieces(entry))


def find_changes(base: Base, adapters: Mapping[Path, float]) -> Changes:
    """Read adapters, fit them to a checkpoint, draw their bases, and say which tensors they change.

    Args:
        base: The checkpoint.
        adapters: Directories of adapters and the factors of their updates.

    Raises:
        CheckpointError: When an adapter or its bases cannot be had, or it does not fit the checkpoint, or two of them
            trained the same parameter beside them.
    """
    bank = BasisBank()
    merged: dict[str, Merging | FusedMerging] = {}
    replaced: dict[str, Tensor] = {}
    notes = []
    for path, factor in adapters.items():
        with _about(path):
            file = read_adapter(path)
            fit = fit_base(base, file)
            _require_room(file, fit, replaced)
            basis = file_basis(file, fit.shapes, bank)
        basis.extend(*sliced_dims(fit.shapes.values()))
        bank.add(basis)
        for fqn, slot in fit.slots.items():
            lam, gamma = (master_copy(part, "cpu") for part in file.values[fqn])
            update = Update(basis, lam, gamma, file.config.scaling * factor)
            for name in slot.names:
                _merging(merged, name, fqn, slot).updates.append(update)
        replaced |= {name: file.trained[fqn] for fqn, names in fit.trained.items() for name in names}
        if fit.renamed:
            notes.append(f"{path} was trained under other names: its {fit.renamed[0]} is {fit.renamed[1]} here")
    in_order = base.dense.directory.entries
    return Changes(
        {name: merged[name] for name in in_order if name in merged},
        {name: replaced[name] for name in in_order if name in replaced},
        base.dense,
        tuple(notes),
    )


def _merging(merged: dict[str, Merging | FusedMerging], name: str, fqn: str, slot: Slot) -> Merging:
    """Return what is merged into a tensor or a part of it so far, made where there is nothing yet."""
    if slot.fused is None:
        found = merged.setdefault(name, Merging(fqn, slot))
        assert isinstance(found, Merging), "a tensor is fused for every adapter or for none"
        return found
    part, conversion = slot.fused
    fused = merged.setdefault(name, FusedMerging(conversion))
    assert isinstance(fused, FusedMerging), "a tensor is fused for every adapter or for none"
    return fused.parts.setdefault(part, Merging(fqn, slot))


def _require_room(file: AdapterFile, fit: BaseFit, replaced: Mapping[str, Tensor]) -> None:
    """Refuse parameters trained beside an adapter that the checkpoint lacks, or that another adapter brought."""
    problems = [f"the model has no parameter {fqn}, which the file holds beside the adapter" for fqn in fit.absent]
    if taken := [fqn for fqn in file.trained if set(fit.trained[fqn]) & replaced.keys()]:
        problems.append(f"an adapter before it trained {', '.join(taken)} too, and the model has room for one")
    raise_collected(CheckpointError, problems, doing="fit the adapter to this model")


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    if not torch.equal(torch.isfinite(converted), torch.isfinite(tensor)):
        raise MergeError(f"{name} has values too large for {dtype}: choose a wider dtype")
    return converted


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Name the adapter in errors about it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"cannot merge {str(path)!r}: {error}") from error

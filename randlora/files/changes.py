"""The changes that adapters make to a checkpoint: the tensors merged into, and those replaced.

The arithmetic is that of `randlora.merge`, update by update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from randlora.bases.bank import BasisBank
from randlora.disk.tensor_file import Entry, read_pieces
from randlora.errors import CheckpointError, MergeError
from randlora.files.adapter import open_fitted
from randlora.files.base_fit import Base, Slot
from randlora.files.quantized import DenseView
from randlora.files.transformers_model import Conversion
from randlora.layers.update import Update, folded, sum_updates
from randlora.model.merge import require_finite


@dataclass(frozen=True, eq=False)
class Merging:
    """A weight that adapters are merged into, with their updates in the order of addition."""

    fqn: str
    slot: Slot
    updates: list[Update] = field(default_factory=list)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """Return the merged weight, in the dtype and layout of ``weight``. It is an error if it is not finite."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        kind = self.slot.layer_class
        # one adapter may have a stack of updates where another has one: `united` gives them the shape of the sum
        delta = sum_updates(self.updates, (), device=weight.device, dtype=dtype, united=kind.united)
        return require_finite(self.fqn, folded(weight, kind.in_storage_layout(delta)))


@dataclass(frozen=True, eq=False)
class FusedMerging:
    """A tensor with adapters merged into parts of it, by FQN, which are separate weights in the model."""

    conversion: Conversion
    parts: dict[str, Merging] = field(default_factory=dict)

    def merged(self, weight: Tensor) -> Tensor:
        """Return the tensor with its parts merged, as `Merging.merged` does."""
        found = self.conversion.split(weight)
        return self.conversion.join(found | {fqn: part.merged(found[fqn]) for fqn, part in self.parts.items()})


@dataclass(frozen=True, eq=False)
class Changes:
    """The changes to a checkpoint, by the names of its tensors: the weights merged into, and new values of others."""

    merged: dict[str, Merging | FusedMerging]
    replaced: dict[str, Tensor]
    base: DenseView

    def pieces(self, entry: Entry, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the new values of a tensor of the checkpoint in pieces, reading it as they are needed.

        They are computed in the wider of ``dtype`` and the tensor's, or float32 at least if the tensor is quantized,
        and rounded once to ``dtype``. It is an error if a value is not finite that was before.
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


def find_changes(base: Base, adapters: Mapping[Path, float], prefix: str | None = None) -> Changes:
    """Read adapters, fit them to a checkpoint, draw their bases, and return which tensors they change.

    ``adapters`` are their directories and the factors of their updates. It is an error if two trained the same
    parameter.
    """
    bank = BasisBank()
    merged: dict[str, Merging | FusedMerging] = {}
    replaced: dict[str, Tensor] = {}
    for path, factor in adapters.items():
        try:
            adapter, fit = open_fitted(path, base, prefix, bank)
            if fit.absent:
                absent = ", ".join(fit.absent)
                advice = "load the model and merge in memory"
                raise CheckpointError(f"{absent} was trained and is not in the model's files, or in parts: {advice}")
            if taken := ", ".join(fqn for fqn, names in fit.trained.items() if replaced.keys() & set(names)):
                raise CheckpointError(f"an adapter before it trained {taken} too, and the model has room for one")
        except CheckpointError as error:
            raise CheckpointError(f"cannot merge {str(path)!r}: {error}") from error
        for fqn, slot in fit.slots.items():
            update = adapter.update(fqn, factor)
            for name in slot.names:
                _merging(merged, name, fqn, slot).updates.append(update)
        replaced |= {name: fit.file.trained[fqn] for fqn, names in fit.trained.items() for name in names}
    in_order = base.dense.directory.entries
    return Changes(
        {name: merged[name] for name in in_order if name in merged},
        {name: replaced[name] for name in in_order if name in replaced},
        base.dense,
    )


def _merging(merged: dict[str, Merging | FusedMerging], name: str, fqn: str, slot: Slot) -> Merging:
    """Return the merging of a tensor or of a part of it, created if there is none yet."""
    if slot.fused is None:
        found = merged.setdefault(name, Merging(fqn, slot))
        assert isinstance(found, Merging), "a tensor is fused for every adapter or for none"
        return found
    part, conversion = slot.fused
    fused = merged.setdefault(name, FusedMerging(conversion))
    assert isinstance(fused, FusedMerging), "a tensor is fused for every adapter or for none"
    return fused.parts.setdefault(part, Merging(fqn, slot))


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    if not torch.equal(torch.isfinite(converted), torch.isfinite(tensor)):
        raise MergeError(f"{name} has values too large for {dtype}: choose a wider dtype")
    return converted

"""The changes that adapters make to a checkpoint: the tensors merged into, and those replaced.

The arithmetic is the same as in `randlora.merge`, update by update.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from randlora.bases.basis import BasisBank
from randlora.checkpoint.bases import stream_notes
from randlora.checkpoint.header import ModelClass
from randlora.checkpoint.read import AdapterFile
from randlora.disk.formats import Entry, Planned, Shard, read_pieces, read_tensor
from randlora.errors import CheckpointError, MergeError
from randlora.files.adapter import open_fitted
from randlora.files.base_fit import Base, Slot, as_trained
from randlora.files.transformers_model import Conversion, Read
from randlora.layers.update import Update
from randlora.model.mergeable import require_finite
from randlora.targets.match import shortened


@dataclass(frozen=True, eq=False)
class Merging:
    """A weight that adapters are merged into, with their updates in the order of addition."""

    fqn: str
    slot: Slot
    updates: list[Update] = field(default_factory=list)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """Return the merged weight in the dtype and layout of ``weight``. One that is not finite raises an error."""
        return require_finite(self.fqn, self.slot.layer_class.with_updates(weight, self.updates))


@dataclass(frozen=True, eq=False)
class ConvertedMerging:
    """Tensors that become weights which adapters are merged into when the model is loaded.

    ``parts`` are the merged weights and ``replaced`` new values of others, by FQN.
    """

    conversion: Conversion
    parts: dict[str, Merging] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)

    def merged(self, read: Read) -> dict[str, Tensor]:
        """Return the new values of all of the tensors, by name."""
        weights = self.conversion.convert(read)
        for fqn, weight in weights.items():
            if (own := self.replaced.get(fqn)) is not None:  # an adapter's, which another may adapt, and may be wider
                weights[fqn] = own.to(torch.promote_types(own.dtype, weight.dtype))
            if (merging := self.parts.get(fqn)) is not None:
                weights[fqn] = merging.merged(weights[fqn])
        return self.conversion.revert(weights)


@dataclass(frozen=True, eq=False)
class Changes:
    """The changes to a checkpoint, by the names of its tensors, whose headers are ``entries``.

    ``computed`` are merged into, ``values`` are new, and the checkpoint has no tensors for ``added``, such as a new
    head. Tensors in ``renamed`` and ``unused`` have a different name or no place in the class ``trained_on``.
    """

    entries: Mapping[str, Entry]
    computed: dict[str, Merging | ConvertedMerging] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)
    trained_on: ModelClass | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    unused: Sequence[str] = ()
    notes: list[str] = field(default_factory=list)
    _unwritten: dict[ConvertedMerging, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of the tensors merged into."""
        return tuple(
            name
            for name in self.entries
            if (merging := self.computed.get(name)) is not None and (isinstance(merging, Merging) or merging.parts)
        )

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of the tensors replaced, or part of whose values are."""
        found = self.computed.items()
        parts = {name for name, merging in found if isinstance(merging, ConvertedMerging) and merging.replaced}
        return tuple(name for name in self.entries if name in self.values or name in parts)

    def float8_problems(self) -> list[str]:
        """Return which changed tensors are 8-bit floats, which may have scales and would lose most of an update."""
        kinds = {name: self.entries[name].dtype for name in (*self.computed, *self.values)}
        narrow = [name for name, kind in kinds.items() if kind.is_floating_point and kind.itemsize == 1]
        return [f"8-bit floats: {shortened(narrow)}; convert the model to a wider dtype first"] if narrow else []

    def tensors_of(self, shard: Shard, dtype: torch.dtype | None) -> list[Planned]:
        """Return how the tensors of a file of the checkpoint are written, under the names and in the shapes of now."""
        planned = []
        for entry in shard.entries:
            if entry.name not in self.unused:
                wanted = dtype if dtype and entry.dtype.is_floating_point else entry.dtype
                own = self.values.get(entry.name)
                shape = entry.shape if own is None else tuple(own.shape)  # a head for other labels
                name = self.renamed.get(entry.name, entry.name)
                planned.append(Planned(name, wanted, shape, partial(self.pieces, entry, wanted)))
        return planned

    def added_tensors(self, dtype: torch.dtype | None) -> list[Planned]:
        """Return how the tensors that the checkpoint does not have are written."""
        return [Planned.whole(name, _cast(name, own, dtype or own.dtype)) for name, own in self.added.items()]

    def pieces(self, entry: Entry, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the new values of a tensor of the checkpoint in pieces, reading it as they are needed.

        They are computed in the wider of ``dtype`` and the tensor's, and rounded once to ``dtype``. A value that was
        finite before and is not now raises an error.
        """
        own, merging = self.values.get(entry.name), self.computed.get(entry.name)
        if isinstance(merging, Merging):
            yield _cast(entry.name, merging.merged(self._read(entry.name, dtype)), dtype)
        elif merging is not None:
            yield _cast(entry.name, self._converted(merging, entry.name, dtype), dtype)
        elif own is not None:
            yield _cast(entry.name, own.to(torch.promote_types(entry.dtype, dtype)), dtype)
        else:
            yield from (_cast(entry.name, piece, dtype) for piece in read_pieces(entry))

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a tensor before a merge, in the dtype in which it is merged into."""
        wide = torch.promote_types(self.entries[name].dtype, dtype)
        if (own := self.values.get(name)) is not None:  # an adapter's own, which another adapts, and may be wider
            return own.to(torch.promote_types(own.dtype, wide))
        return read_tensor(self.entries[name]).to(wide)

    def _converted(self, merging: ConvertedMerging, name: str, dtype: torch.dtype) -> Tensor:
        """Return a tensor after a merge. Those computed with it are kept until they are needed, for two weights."""
        kept = self._unwritten.pop(merging, {})
        if name not in kept:
            # experts' tensors are written one after the other, and belong to two weights by turns
            for other in [*self._unwritten][:-1]:
                del self._unwritten[other]
            kept |= merging.merged(partial(self._read, dtype=dtype))
        self._unwritten[merging] = kept
        return kept.pop(name)

    def mergings(self, fqn: str, slot: Slot) -> list[Merging]:
        """Return the merging of a weight, or of all its copies, created if there is none yet."""
        if slot.converted is not None:
            own, conversion = slot.converted
            return [self.converted(conversion).parts.setdefault(own, Merging(fqn, slot))]
        found = [self.computed.setdefault(name, Merging(fqn, slot)) for name in slot.names]
        assert all(isinstance(merging, Merging) for merging in found), "a weight is converted for every adapter"
        return [merging for merging in found if isinstance(merging, Merging)]

    def converted(self, conversion: Conversion) -> ConvertedMerging:
        """Return the merging of the tensors of a conversion, created if there is none yet."""
        found = self.computed.setdefault(next(iter(conversion.sources)), ConvertedMerging(conversion))
        assert isinstance(found, ConvertedMerging), "a tensor is converted for every adapter"
        self.computed.update(dict.fromkeys(conversion.sources, found))
        return found


def find_changes(
    base: Base,
    adapters: Mapping[str, tuple[Path, AdapterFile, float]],
    prefix: str | None = None,
) -> Changes:
    """Fit adapters to a checkpoint, draw their bases, and return which tensors they change.

    ``adapters`` are their directories, files and the factors of their updates, by the names that messages give them.
    """
    bank = BasisBank()
    for _, file, _ in adapters.values():
        base = as_trained(base, file)
    found = Changes(base.directory.entries)
    if not isinstance(base.model, str) and base.trained_on is not None:
        found = Changes(
            found.entries, trained_on=base.trained_on, renamed=base.model.prefixed, unused=base.model.unused
        )
    for name, (directory, file, factor) in adapters.items():
        with naming(name):
            adapter, fit = open_fitted(directory, file, base, prefix, bank)
            own = {fqn: found.converted(conversion).replaced for fqn, conversion in fit.conversions.items()}
            if repeated := [
                fqn
                for fqn, names in fit.trained.items()
                if fqn in own.get(fqn, ()) or fqn in found.added or found.values.keys() & set(names)
            ]:
                raise CheckpointError(
                    f"an adapter before it trained {', '.join(repeated)} too, and the model can hold only one of them"
                )
        found.notes.extend(f"{name}: {note}" for note in (*adapter.file.doubts, *stream_notes(adapter.file)))
        for fqn, slot in fit.slots.items():
            update = adapter.update(fqn, factor)
            for merging in found.mergings(fqn, slot):
                merging.updates.append(update)
        for fqn, names in fit.trained.items():
            value = fit.file.trained[fqn]
            if fqn in own:
                own[fqn][fqn] = value
            elif names:
                found.values.update(dict.fromkeys(names, value))
            else:
                found.added[fqn] = value.to(base.dtype_of(fqn))
    _require_complete(base, found.added)
    return found


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Raise an error of the block anew, with the name of the adapter that cannot be merged."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"cannot merge {name!r}: {error.args[0]}", *error.args[1:]) from error


def _require_complete(base: Base, added: Collection[str]) -> None:
    """Refuse to write a model of the class that an adapter was trained on without some of its parameters."""
    if isinstance(base.model, str) or base.trained_on is None:
        return
    if missing := [fqn for fqn in base.model.missing if fqn not in added]:
        raise CheckpointError(
            f"cannot merge: a {base.trained_on.name} has {shortened(missing)}, which neither the model's files nor an "
            "adapter has: they were random when the adapter was trained, and name them in train_also= for another one"
        )


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    if tensor.dtype.itemsize > 1 and not torch.equal(torch.isfinite(converted), torch.isfinite(tensor)):
        raise MergeError(f"{name} has values that are too large for {dtype}: choose a wider dtype")
    return converted

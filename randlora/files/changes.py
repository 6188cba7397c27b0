"""The changes that adapters make to a checkpoint: the tensors merged into, and those replaced.

The arithmetic is that of `randlora.merge`, update by update.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from randlora.bases.bank import BasisBank
from randlora.checkpoint.base_model import ModelClass
from randlora.checkpoint.bases import stream_notes
from randlora.checkpoint.read import AdapterFile, read_adapter
from randlora.config import Stream
from randlora.disk.tensor_file import Entry, Planned, Shard, read_pieces, read_tensor
from randlora.errors import CheckpointError, MergeError
from randlora.files.adapter import open_fitted
from randlora.files.base_fit import Base, Slot, as_trained
from randlora.files.conversion import Conversion, Read
from randlora.layers.experts import Experts
from randlora.layers.update import Update
from randlora.model.mergeable import require_finite
from randlora.targets.match import shortened


@dataclass(frozen=True, eq=False)
class Merging:
    """A weight that adapters are merged into, with their updates in the order of addition."""

    fqn: str
    slot: Slot
    updates: list[Update] = field(default_factory=list)

    @property
    def has_own_updates(self) -> bool:
        """Whether it is a stack of experts, of which each matrix has an update of its own and can be merged alone."""
        is_stack = self.slot.layer_class.kind == Experts.kind
        return is_stack and any(len(update.shape) == 3 for update in self.updates)

    @torch.no_grad()
    def merged(self, weight: Tensor, at: slice | None = None) -> Tensor:
        """Return the merged weight, or some matrices ``at`` of a stack, in the dtype and layout of ``weight``.

        It is an error if it is not finite.
        """
        is_part = at is not None
        updates = [update.at(at) if is_part and len(update.shape) == 3 else update for update in self.updates]
        return require_finite(self.fqn, self.slot.layer_class.with_updates(weight, updates))


@dataclass(frozen=True, eq=False)
class ConvertedMerging:
    """Tensors that become weights which adapters are merged into when the model is loaded.

    ``parts`` are the merged weights and ``replaced`` new values of others, by FQN.
    """

    conversion: Conversion
    parts: dict[str, Merging] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)

    def merged(self, name: str, read: Read) -> dict[str, Tensor]:
        """Return the new value of one of the tensors, and of those that are computed with it, by name.

        Of a stack that is made matrix by matrix, one matrix is computed, else all that the tensors become.
        """
        conversion, joined = self.conversion, self.conversion.joined
        if joined is None:
            return conversion.revert({fqn: self._changed(fqn, own) for fqn, own in conversion.convert(read).items()})
        index = joined.places[name]
        names = joined.names[index]
        sources = [read(name) for name in names]
        matrix = torch.cat(sources, joined.dim).unsqueeze(0)
        changed = self._changed(conversion.fqn, matrix, slice(index, index + 1)).squeeze(0)
        parts = changed.split([source.shape[joined.dim] for source in sources], joined.dim)
        return {name: part.clone() for name, part in zip(names, parts, strict=True)}  # one may be kept longer

    def _changed(self, fqn: str, weight: Tensor, at: slice | None = None) -> Tensor:
        if (own := self.replaced.get(fqn)) is not None:  # one adapter's own version, which another may adapt
            weight = (own if at is None else own[at]).to(weight.dtype)
        merging = self.parts.get(fqn)
        return weight if merging is None else merging.merged(weight, at)


@dataclass(frozen=True, eq=False)
class Changes:
    """The changes to a checkpoint, by the names of its tensors, whose headers are ``entries``.

    ``computed`` are the weights merged into, and tensors that become other weights when the model is loaded;
    ``values`` are new values, and ``added`` those that the checkpoint has no tensors for, such as a new head's. Names
    in ``renamed`` and ``unused`` have another one, or no place, in the class ``trained_on``, if an adapter names that.
    ``notes`` are what was assumed of the adapters, and doubts about their files.
    """

    entries: dict[str, Entry]
    computed: dict[str, Merging | ConvertedMerging]
    values: dict[str, Tensor]
    added: dict[str, Tensor]
    trained_on: ModelClass | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    _unwritten: dict[ConvertedMerging, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of the tensors merged into."""
        found = self.computed.items()
        return tuple(name for name, merging in found if isinstance(merging, Merging) or merging.parts)

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of the tensors replaced, or part of whose values are."""
        found = self.computed.items()
        parts = {name for name, merging in found if isinstance(merging, ConvertedMerging) and merging.replaced}
        return tuple(name for name in self.entries if name in self.values or name in parts)

    def float8_problems(self, dtype: torch.dtype | None) -> list[str]:
        """Return why 8-bit floats cannot be changed: they have scales, or would lose most of an update."""
        for name in (*self.computed, *self.values):
            kind = self.entries[name].dtype
            if not kind.is_floating_point or kind.itemsize > 1:
                continue
            if (scale := _scale_of(name, self.entries)) is not None:
                return [f"{name} is {kind} and has a scale, {scale}: dequantize the model first"]
            if dtype is None:
                return [f"{name} is {kind}, which would lose most of an update: give a dtype, as dtype=torch.bfloat16"]
        return []

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
        wide = _wider(entry.dtype, dtype)
        if isinstance(merging, Merging) and merging.has_own_updates and own is None:
            for index, piece in enumerate(read_pieces(entry, nbytes=entry.nbytes // entry.shape[0])):
                matrix = piece.reshape(1, *entry.shape[1:]).to(wide)
                yield _cast(entry.name, merging.merged(matrix, slice(index, index + 1)), dtype)
        elif merging is not None:
            yield _cast(entry.name, self._computed(merging, entry.name, dtype), dtype)
        elif own is not None:
            yield _cast(entry.name, own.to(wide), dtype)
        else:
            yield from (_cast(entry.name, piece, dtype) for piece in read_pieces(entry))

    def _computed(self, merging: Merging | ConvertedMerging, name: str, dtype: torch.dtype) -> Tensor:
        """Return a tensor after a merge. Those computed with it are kept until they are needed, for two weights."""

        def read(name: str) -> Tensor:
            wide = _wider(self.entries[name].dtype, dtype)
            if (own := self.values.get(name)) is not None:  # an adapter's own, which another adapts, and may be wider
                return own.to(torch.promote_types(own.dtype, wide))
            return read_tensor(self.entries[name]).to(wide)

        if isinstance(merging, Merging):
            return merging.merged(read(name))
        kept = self._unwritten.pop(merging, {})
        if name not in kept:
            # one expert's tensors are written one after the other, and belong to two weights by turns
            for other in [*self._unwritten][:-1]:
                del self._unwritten[other]
            kept |= merging.merged(name, read)
        self._unwritten[merging] = kept
        return kept.pop(name)


def find_changes(
    base: Base,
    adapters: Mapping[str, tuple[Path, float]],
    prefix: str | None = None,
    stream: Stream | None = None,
) -> Changes:
    """Read adapters, fit them to a checkpoint, draw their bases, and return which tensors they change.

    ``adapters`` are their directories and the factors of their updates, by the names that messages give them.
    ``stream`` is that of the bases of each, as in `randlora.load`. It is an error if two trained the same parameter.
    """
    bank = BasisBank()
    computed: dict[str, Merging | ConvertedMerging] = {}
    values: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    notes: list[str] = []
    files: dict[str, AdapterFile] = {}
    for name, (directory, _) in adapters.items():
        with _naming(name):
            files[name] = read_adapter(directory, stream)
            base = as_trained(base, files[name])
    for name, (directory, factor) in adapters.items():
        with _naming(name):
            adapter, fit = open_fitted(directory, files[name], base, prefix, bank)
            own = {fqn: _conversion(computed, found).replaced for fqn, found in fit.conversions.items()}
            if taken := ", ".join(
                fqn
                for fqn, names in fit.trained.items()
                if fqn in own.get(fqn, ()) or fqn in added or values.keys() & set(names)
            ):
                raise CheckpointError(f"an adapter before it trained {taken} too, and the model has room for one")
        notes += [f"{name}: {note}" for note in (*adapter.file.doubts, *stream_notes(adapter.file))]
        for fqn, slot in fit.slots.items():
            update = adapter.update(fqn, factor)
            for merging in _mergings(computed, fqn, slot):
                merging.updates.append(update)
        for fqn, names in fit.trained.items():
            if fqn in own:
                own[fqn][fqn] = fit.file.trained[fqn]
            else:
                values |= dict.fromkeys(names, fit.file.trained[fqn])
        added |= {fqn: _in_dtype_of(base, fqn, fit.file.trained[fqn]) for fqn in fit.absent}
    _require_complete(base, added)
    entries = base.directory.entries
    in_order = {name: computed[name] for name in entries if name in computed}
    if isinstance(base.model, str) or base.trained_on is None:
        return Changes(entries, in_order, values, added, notes=tuple(notes))
    unused = tuple(base.model.unused)
    return Changes(entries, in_order, values, added, base.trained_on, base.model.prefixed, unused, tuple(notes))


def _in_dtype_of(base: Base, fqn: str, value: Tensor) -> Tensor:
    """Return the values of a parameter that the files lack, in the dtype that it has in the model."""
    assert not isinstance(base.model, str), "only a class has parameters that the files lack"
    return value.to(next(held.parameter.dtype for held in base.model.census.parameters if held.fqn == fqn))


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Say in an error of the block which adapter cannot be merged."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"cannot merge {name!r}: {error}") from error


def _require_complete(base: Base, added: Collection[str]) -> None:
    """Refuse to write a model of the class that an adapter was trained on without some of its parameters."""
    if isinstance(base.model, str) or base.trained_on is None:
        return
    if missing := [fqn for fqn in base.model.missing if fqn not in added]:
        raise CheckpointError(
            f"cannot merge: a {base.trained_on.name} has {shortened(missing)}, which neither the model's files nor an "
            "adapter has: they were random when the adapter was trained, and name them in train_also= for another one"
        )


def _mergings(computed: dict[str, Merging | ConvertedMerging], fqn: str, slot: Slot) -> list[Merging]:
    """Return the merging of a weight, or those of all its copies, created if there are none yet."""
    if slot.converted is not None:
        own, conversion = slot.converted
        return [_conversion(computed, conversion).parts.setdefault(own, Merging(fqn, slot))]
    found = [computed.setdefault(name, Merging(fqn, slot)) for name in slot.names]
    assert all(isinstance(merging, Merging) for merging in found), "a weight is converted for every adapter or for none"
    return [merging for merging in found if isinstance(merging, Merging)]


def _conversion(computed: dict[str, Merging | ConvertedMerging], conversion: Conversion) -> ConvertedMerging:
    """Return the merging of the tensors of a conversion, created if there is none yet."""
    first = next(iter(conversion.sources))
    found = computed.setdefault(first, ConvertedMerging(conversion))
    assert isinstance(found, ConvertedMerging), "a tensor is converted for every adapter or for none"
    computed |= dict.fromkeys(conversion.sources, found)
    return found


def _scale_of(name: str, entries: Collection[str]) -> str | None:
    """Return the name of a tensor beside a weight that looks like its scale, as ``scale_weight`` does."""
    module = name.rpartition(".")[0]
    beside = [other for other in entries if other.rpartition(".")[0] == module]
    return next((other for other in beside if "scale" in other.rpartition(".")[2]), None)


def _wider(stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """Return the wider of two dtypes; torch promotes no floats of 8 bits, which every other holds."""
    return dtype if stored.itemsize == 1 else torch.promote_types(stored, dtype)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    if tensor.dtype.itemsize > 1 and not torch.equal(torch.isfinite(converted), torch.isfinite(tensor)):
        raise MergeError(f"{name} has values too large for {dtype}: choose a wider dtype")
    return converted

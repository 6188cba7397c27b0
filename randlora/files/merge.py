"""`randlora.files.merge`: merging adapters into a checkpoint on disk, tensor by tensor, and writing a new one.

Everything is checked with the headers before the first byte is written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from randlora.bases.basis import BasisBank
from randlora.checkpoint.bases import stream_notes
from randlora.checkpoint.header import ModelClass
from randlora.checkpoint.read import AdapterFile, locate, read_adapter
from randlora.config import Factor, Source, Stream
from randlora.disk.formats import Entry, Planned, is_there, read_pieces, read_tensor, write_tensor_file
from randlora.disk.hub import is_on_hub, local_path
from randlora.disk.replace import new_directory
from randlora.errors import CheckpointError, ConfigError, MergeError, raise_collected, refusing, spelled
from randlora.files.adapter import Base, open_base, open_fitted, out_problems, read_base
from randlora.files.model_directory import (
    INDEX_FILE,
    MODEL_CONFIG_FILE,
    WHOLE,
    ModelDirectory,
    Progress,
    copy_companion,
    copy_config,
    find_companions,
    no_progress,
    write_json,
)
from randlora.files.transformers_model import named_base
from randlora.hints import require_types
from randlora.layers.base import AdapterLayer
from randlora.layers.rows import RowsAdapter
from randlora.layers.weight import Update
from randlora.model.mergeable import require_finite
from randlora.report import as_bytes, as_lines, with_factor
from randlora.targets.match import shortened

Sources = Source | Sequence[Source] | Mapping[str, float] | Mapping[Path, float]  # one or several, or their factors

MODEL_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
"""The names of files of weights that another merge may have left, which is replaced as a whole."""
CASTABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # dtypes that tensors are cast from and to

IN_MEMORY = "load the model with randlora.files.load_model(adapter), then call randlora.files.save_merged(model, out)"


@dataclass(frozen=True)
class FileMergeReport:
    """The report of `randlora.files.merge` and of `randlora.files.save_merged`.

    Attributes:
        out: The new checkpoint's directory.
        adapters: The factors of the updates by adapter, its directory or its name in a model.
        merged: Names of the tensors merged into.
        replaced: Names of the tensors replaced by values that were trained with an adapter.
        shards: Number of files with weights; 0 if a different process, which trains a copy of the model, writes them.
        nbytes: Size of all weights in bytes.
        dtype: The dtype that floating tensors were cast to; ``None`` if each tensor kept its dtype.
        notes: Other notes for the user, such as which files were not copied.
    """

    out: Path
    adapters: Mapping[str, Factor]
    merged: tuple[str, ...]
    replaced: tuple[str, ...]
    shards: int
    nbytes: int
    dtype: torch.dtype | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Return a summary of a few lines."""
        if not self.shards:
            return as_lines([f"another process, with a copy of the model, writes {self.out}", *self.notes])
        names = ", ".join(with_factor(name, factor) for name, factor in self.adapters.items())
        dtype = f", as {str(self.dtype).removeprefix('torch.')}" if self.dtype else ""
        files = "1 file" if self.shards == 1 else f"{self.shards} files"
        lines = [f"merged {names} into {len(self.merged)} weights"]
        if self.replaced:
            tensors = "1 tensor" if len(self.replaced) == 1 else f"{len(self.replaced)} tensors"
            lines.append(f"replaced {tensors} trained with the adapters")
        return as_lines([*lines, f"wrote {self.out}, {as_bytes(self.nbytes)} in {files}{dtype}", *self.notes])


def merge(
    adapters: Sources,
    out: Source,
    *,
    base: Source | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
    prefix: str | None = None,
    stream: Stream | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> FileMergeReport:
    """Merge adapters into a checkpoint and write the result to a new directory, without loading the model.

    The tensors are bit for bit the same as if you load the model and the adapters, merge and save. The config,
    tokenizer and other files are copied, and shards keep their names. Memory holds the bases, the adapters, and the
    working memory for the largest weight. ``out`` appears when it is complete.

    Args:
        adapters: The directory of one adapter, or its repository on the Hub; several of them, whose updates are summed;
            or a mapping from them to the factors of their updates.
        out: The directory to create.
        base: The model's directory, with safetensors files, which is only read; or a repository on the Hub, which is
            downloaded. ``None`` means the model that the adapters' files name.
        dtype: Cast every floating tensor to this dtype. A merged weight is computed in float32 or wider and rounded
            once.
        revision: Branch, tag or commit of the repository of every adapter.
        base_revision: Branch, tag or commit of the base model's repository.
        prefix: The prefix by which the names in the adapters and in the model differ, as in `randlora.load`.
        stream: The stream of the bases of every adapter, as in `randlora.load`. If the adapters' streams differ,
            `convert` them first to files that record the stream.
        overwrite: Whether to replace a checkpoint in ``out``. The directory may not contain anything else.
        progress: Called with the number of bytes written.

    Raises:
        ConfigError: For an invalid factor, dtype or stream.
        CheckpointError: If a file is missing or damaged, the checkpoint is quantized, an adapter does not fit or has a
            new head, transformers converts an adapted weight as it loads it, or no base model is given or named.
        MergeError: If ``out`` is not empty or is inside an input, a value is not finite, or weights are 8-bit or codes.
        OSError: If the disk refuses.
    """
    require_types(merge, locals())
    factors, destination = _factors(adapters), Path(out)
    problems = [] if factors else ["there is no adapter: name at least one"]
    if dtype not in (None, *CASTABLE):
        problems.append(f"dtype must be one of {', '.join(map(str, CASTABLE))}, or None, got {dtype!r}")
    raise_collected(ConfigError, problems, doing="merge")
    opened = dict[str, tuple[Path, AdapterFile, float]]()
    for adapter, factor in factors.items():  # before a download of the base, which may be large
        directory = locate(adapter, revision)
        with refusing(f"merge {str(adapter)!r}"):
            opened[str(adapter)] = directory, read_adapter(directory, stream), factor
    if base is None:
        base = named_base({adapter: file for adapter, (_, file, _) in opened.items()})
        if not (is_there(Path(base)) or is_on_hub(base)):
            give = f"give {spelled('base')}, a directory or a repository"
            raise CheckpointError(f"the base model {base!r}, which the adapter names, is not there: {give}")
    problems = out_problems(destination, [base, *factors], overwrite=overwrite)
    raise_collected(MergeError, problems, doing="merge")
    model = open_base(base, base_revision)
    if model.codes:
        raise CheckpointError(
            f"cannot merge into {str(base)!r}, which is quantized ({model.kinds}): load the model and merge in memory, "
            "or merge into the checkpoint that it was quantized from"
        )
    if is_on_hub(base):  # of which only headers are here yet
        model = read_base(local_path(base, model.directory.path.name, WHOLE, are_patterns=True))
    changes = find_changes(model, opened, prefix)
    nbytes, left_out = _write(destination, model.directory, changes, dtype, progress, overwrite=overwrite)
    return FileMergeReport(
        out=destination,
        adapters={str(path): factor for path, factor in factors.items()},
        merged=tuple(name for name in changes.entries if name in changes.merged),
        replaced=tuple(name for name in changes.entries if name in changes.replaced or name in changes.rows),
        shards=len(model.directory.shards),
        nbytes=nbytes,
        dtype=dtype,
        notes=(*changes.notes, *(f"not copied: {path}, which may hold the base model's weights" for path in left_out)),
    )


def _factors(adapters: Sources) -> dict[str | Path, float]:
    if isinstance(adapters, str | os.PathLike):
        adapters = [adapters]
    given = adapters if isinstance(adapters, Mapping) else dict.fromkeys(adapters, 1.0)
    factors = {source if is_on_hub(source) else Path(source): factor for source, factor in given.items()}
    if len({os.path.realpath(source) for source in factors}) < len(adapters):
        raise ConfigError("cannot merge: an adapter is named twice; give it one factor instead")
    return factors


@dataclass(frozen=True, eq=False)
class Merging:
    """A weight that adapters are merged into, with their updates in the order of addition."""

    fqn: str
    layer_class: type[AdapterLayer]
    updates: list[Update] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Changes:
    """The changes that adapters make to the tensors of a checkpoint, whose headers are ``entries``.

    Tensors in ``merged`` are merged into, and tensors in ``replaced`` get new values, which may be merged into too. At
    last ``rows`` replace some.
    """

    entries: Mapping[str, Entry]
    merged: dict[str, Merging] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def planned(self, entry: Entry, dtype: torch.dtype | None) -> Planned:
        """Return how a tensor is written, with its new values and in its new shape, such as of a head."""
        new = self.replaced.get(entry.name)
        dtype = dtype if dtype and entry.dtype.is_floating_point else entry.dtype
        shape = entry.shape if new is None else tuple(new.shape)
        return Planned(entry.name, dtype, shape, partial(self._pieces, entry, dtype))

    @torch.no_grad()
    def _pieces(self, entry: Entry, dtype: torch.dtype) -> Iterator[Tensor]:
        merging, new = self.merged.get(entry.name), self.replaced.get(entry.name)
        if merging is None and new is None and entry.name not in self.rows:
            yield from (_cast(entry.name, piece, dtype) for piece in read_pieces(entry))
            return
        wide = torch.promote_types(entry.dtype, dtype)
        if new is None:
            value = read_tensor(entry).to(wide)
        else:  # they may be wider, and a different adapter may adapt them
            value = new.to(wide if merging is None else torch.promote_types(new.dtype, wide))
        if merging is not None:
            value = require_finite(merging.fqn, merging.layer_class.with_updates(value, merging.updates))
        yield _cast(entry.name, RowsAdapter.with_updates(value, self.rows.get(entry.name, ())), dtype)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    if tensor.dtype.itemsize > 1 and not torch.equal(torch.isfinite(converted), torch.isfinite(tensor)):
        raise MergeError(f"{name} has values that are too large for {dtype}: choose a wider dtype")
    return converted


def find_changes(base: Base, adapters: Mapping[str, tuple[Path, AdapterFile, float]], prefix: str | None) -> Changes:
    """Return which tensors of a checkpoint some adapters change, given directory, file and factor of each by name."""
    bank, changes, claimed = BasisBank(), Changes(base.directory.entries), set[str]()
    for name, (directory, file, factor) in adapters.items():
        with refusing(f"merge {name!r}"):
            if _has_other_head(base, file):
                raise CheckpointError(f"it was trained with a head or labels that the model lacks: {IN_MEMORY}")
            adapter, fit = open_fitted(directory, file, base, prefix, bank)
            if fit.converted:
                raise CheckpointError(
                    f"the files do not have {shortened(fit.converted)} in one tensor each: {IN_MEMORY}"
                )
            rows = fit.file.rows
            claims = {f"row {row} of {fqn}" for fqn, own in rows.items() for row in own}
            claims |= fit.trained.keys() - rows.keys()
            if repeated := sorted(claims & claimed):
                raise CheckpointError(
                    f"an adapter before it trained {', '.join(repeated)} too, and the model can hold only one of them"
                )
        changes.notes.extend(f"{name}: {note}" for note in (*adapter.file.doubts, *stream_notes(adapter.file)))
        for fqn, weight in fit.weights.items():
            update = adapter.update(fqn, factor)
            for tensor in weight.names:
                changes.merged.setdefault(tensor, Merging(fqn, weight.layer_class)).updates.append(update)
        for fqn, names in fit.trained.items():
            for tensor in names:
                if fqn in rows:
                    changes.rows.setdefault(tensor, []).append((torch.tensor(rows[fqn]), fit.file.trained[fqn]))
                else:
                    changes.replaced[tensor] = fit.file.trained[fqn]
        claimed |= claims
    if both := sorted(changes.rows.keys() & (changes.replaced.keys() | changes.merged.keys())):
        what = f"one adapter trains rows of {shortened(both)}, and another one trains or adapts all of it"
        raise CheckpointError(f"cannot merge: {what}: merge them into two models")
    dtypes = {name: changes.entries[name].dtype for name in (*changes.merged, *changes.replaced, *changes.rows)}
    # 8-bit floats may have scales, and would lose most of an update; integers are codes, except for buffers
    narrow = {name for name, dtype in dtypes.items() if dtype.is_floating_point and dtype.itemsize == 1}
    coded = {name for name in changes.merged if not dtypes[name].is_floating_point}
    if narrow or coded:
        what = f"8-bit floats or integers: {shortened([name for name in dtypes if name in narrow | coded])}"
        raise MergeError(f"cannot merge: {what}; convert the model to a wider floating dtype first")
    return changes


def _has_other_head(base: Base, file: AdapterFile) -> bool:
    trained_on = None if file.header is None else file.header.model_class
    if isinstance(base.model, str) or trained_on is None or trained_on.library != "transformers":
        return False
    own = ModelClass.of(base.model.census.model, has_trained=True)
    if own is not None and own.name == trained_on.name:
        return trained_on.labels is not None and own != trained_on
    ends = {(*held.fqn.split(".")[-2:],) for held in base.model.census.tensors}  # whatever prefix differs
    return any((*fqn.split(".")[-2:],) not in ends for fqn in file.trained)


def _write(
    out: Path,
    directory: ModelDirectory,
    changes: Changes,
    dtype: torch.dtype | None,
    progress: Progress,
    *,
    overwrite: bool,
) -> tuple[int, tuple[Path, ...]]:
    """Write the new checkpoint. Returns the size of its weights, and which files were not copied."""
    companions = find_companions(directory)
    written = {*companions.carried, Path(INDEX_FILE), *(Path(shard.path.name) for shard in directory.shards)}
    found = {path.relative_to(out) for path in out.rglob("*") if path.is_symlink() or not path.is_dir()}
    if others := [str(path) for path in sorted(found - written) if not MODEL_FILE.fullmatch(str(path))]:
        lost = f"{out} holds other files, which would be lost: {shortened(others)}"
        raise MergeError(f"cannot merge: {lost}; choose a different name")
    shards = [(shard, [changes.planned(entry, dtype) for entry in shard.entries]) for shard in directory.shards]
    nbytes = sum(tensor.nbytes for _, tensors in shards for tensor in tensors)
    done = 0

    def wrote(count: int, name: str) -> None:
        nonlocal done
        done += count
        progress(done, nbytes, name)

    with new_directory(out, overwrite=overwrite) as scratch:
        for shard, tensors in shards:
            write_tensor_file(scratch / shard.path.name, tensors, shard.metadata, wrote)
        if (index := directory.index) is not None:
            places = {entry.name: shard.path.name for shard in directory.shards for entry in shard.entries}
            new_index = {**index, "weight_map": dict(sorted(places.items()))}
            if isinstance(metadata := index.get("metadata"), dict) and nbytes != directory.nbytes:
                new_index["metadata"] = {**metadata, "total_size": nbytes}
            if new_index == index:  # which keeps its form
                copy_companion(directory.path / INDEX_FILE, scratch / INDEX_FILE)
            else:
                write_json(scratch / INDEX_FILE, new_index)
        for path in companions.carried:
            if path == Path(MODEL_CONFIG_FILE) and dtype is not None:
                copy_config(directory.path / path, scratch / path, dtype)
            else:
                copy_companion(directory.path / path, scratch / path)
    return nbytes, companions.left_out

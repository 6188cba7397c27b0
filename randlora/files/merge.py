"""`randlora.files.merge`: adapters into a checkpoint on disk, tensor by tensor, to a new checkpoint beside it.

Everything is planned and checked from headers before the first byte is written. Tensors that nothing changes are
copied as bytes; of the others one at a time is in memory.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from randlora.checkpoint.tensors_file import Shard
from randlora.errors import CheckpointError, ConfigError, MergeError, raise_collected
from randlora.files.base_fit import open_base
from randlora.files.changes import Changes, find_changes
from randlora.files.companions import copy_companion, copy_config, find_companions, write_json
from randlora.files.model_directory import CONFIG_FILE, INDEX_FILE, ModelDirectory, read_model_directory
from randlora.files.progress import Progress, no_progress
from randlora.files.quantized import DenseView
from randlora.files.staging import staged
from randlora.files.tensor_file import Planned, write_tensor_file
from randlora.layers import bnb_codes
from randlora.report import as_bytes

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What tensors are cast from and to."""

Source = str | os.PathLike[str]
Sources = Source | Sequence[Source] | Mapping[str, float] | Mapping[Path, float]


@dataclass(frozen=True)
class FileMergeReport:
    """What `randlora.files.merge` wrote.

    Attributes:
        out: The new checkpoint's directory.
        adapters: Directories of the adapters merged, and the factors of their updates.
        merged: Names of the tensors merged into.
        replaced: Names of the tensors taken over from an adapter, which had been trained beside it.
        shards: How many files the weights are in.
        nbytes: Bytes of all weights.
        dtype: What floating tensors were cast to; ``None`` where each kept its own.
        notes: What the user should know, such as which files were left out.
        dequantized: Names of the tensors that are codes in the model and dense here, and what kind of codes.
        base_nbytes: Bytes of the model's weights, as they are stored.
    """

    out: Path
    adapters: dict[str, float]
    merged: tuple[str, ...]
    replaced: tuple[str, ...]
    shards: int
    nbytes: int
    dtype: torch.dtype | None
    notes: tuple[str, ...]
    dequantized: dict[str, str] = field(default_factory=dict)
    base_nbytes: int = 0

    def __str__(self) -> str:
        """Say it in a few lines."""
        names = ", ".join(name if factor == 1 else f"{factor:g} x {name}" for name, factor in self.adapters.items())
        dtype = f", as {str(self.dtype).removeprefix('torch.')}" if self.dtype else ""
        files = "1 file" if self.shards == 1 else f"{self.shards} files"
        lines = [f"merged {names} into {len(self.merged)} weights"]
        if self.replaced:
            lines.append(f"took over {len(self.replaced)} tensors that were trained beside")
        if self.dequantized:
            kinds = ", ".join(sorted(set(self.dequantized.values())))
            was = f"{len(self.dequantized)} weights of a model of {as_bytes(self.base_nbytes)}"
            lines.append(f"dequantized {was} ({kinds}): what is written is dense")
        return "\n".join([*lines, f"wrote {self.out}, {as_bytes(self.nbytes)} in {files}{dtype}", *self.notes])


def merge(
    base: Source,
    adapters: Sources,
    out: Source,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress = no_progress,
) -> FileMergeReport:
    """Merge adapters into a checkpoint and write the result to a new directory, without loading the model.

    The tensors written are, bit for bit, those of loading the model and the adapters, merging and saving. Shards,
    index, metadata, config, tokenizer and other files are carried over. Memory holds the bases, the adapters, and what
    merging the largest weight takes. ``out`` appears when it is complete: a call that fails removes what it wrote, and
    after a kill the same call starts anew.

    Of a model that bitsandbytes quantized a dense one is made: all its codes are written out, in the dtype that was
    quantized, and ``config.json`` says nothing of quantization any more. Codes of 4 bits need the extra ``bnb``.

    Args:
        base: The model's directory, with one safetensors file or with shards and an index. It is only read.
        adapters: One adapter's directory; several, whose updates add; or directories with the factors of their updates.
        out: The directory to make.
        dtype: Cast every floating tensor: a merged one is computed in float32 or wider and rounded once.
        progress: Told how many bytes are written.

    Raises:
        ConfigError: For a factor or a dtype that cannot be.
        CheckpointError: When a file is missing, truncated or damaged, the checkpoint is quantized and not by
            bitsandbytes, or that is not installed, or an adapter does not fit.
        MergeError: When ``out`` exists or lies in an input, the disk has not the room, or a value would not be finite.
        OSError: When the disk refuses.
    """
    factors = _factors(adapters)
    source, destination = Path(base), Path(out)
    _check(source, factors, destination, dtype)
    directory = read_model_directory(source)
    found = open_base(directory)
    dense = found.dense
    _require_bitsandbytes(dense)
    changes = find_changes(found, factors)
    shards = [(shard, _planned(shard, changes, dtype)) for shard in dense.directory.shards]
    companions = find_companions(directory)
    nbytes = sum(tensor.nbytes for _, tensors in shards for tensor in tensors)
    beside = sum((source / path).stat().st_size for path in companions.carried)
    written = _Written(nbytes, progress)
    with staged(destination.absolute()) as scratch:
        _require_room(scratch, nbytes + beside, destination)
        for shard, tensors in shards:
            write_tensor_file(scratch / shard.path.name, tensors, shard.metadata, written.add)
        _write_index(directory, dense.directory.index, scratch, nbytes)
        without = directory.config.keys() - dense.directory.config.keys()
        for path in companions.carried:
            if path == Path(CONFIG_FILE):
                copy_config(source / path, scratch / path, dtype, without)
            else:
                copy_companion(source / path, scratch / path)
    return FileMergeReport(
        out=destination,
        adapters={str(path): factor for path, factor in factors.items()},
        merged=tuple(changes.merged),
        replaced=tuple(changes.replaced),
        shards=len(shards),
        nbytes=nbytes,
        dtype=dtype,
        notes=(
            *changes.notes,
            *(f"left out: {path}, which may hold the weights as they were" for path in companions.left_out),
        ),
        dequantized={name: codes.kind for name, codes in dense.codes.items()},
        base_nbytes=directory.nbytes,
    )


@dataclass
class _Written:
    """Counts bytes, and tells how far that is."""

    total: int
    progress: Progress
    done: int = 0

    def add(self, count: int, name: str) -> None:
        self.done += count
        self.progress(self.done, self.total, name)


def _factors(adapters: Sources) -> dict[Path, float]:
    """Name the adapters' directories and the factors of their updates, in the caller's order."""
    if isinstance(adapters, str | os.PathLike):
        adapters = [adapters]
    given = adapters if isinstance(adapters, Mapping) else dict.fromkeys(adapters, 1.0)
    factors = {Path(source): factor for source, factor in given.items()}
    if len(factors) < len(adapters):
        raise ConfigError("cannot merge: an adapter is named twice; give it one factor instead")
    return factors


def _check(base: Path, adapters: Mapping[Path, float], out: Path, dtype: torch.dtype | None) -> None:
    """Refuse what can be refused before a file is read."""
    problems = [
        f"the factor of {path} must be a finite number, got {factor!r}"
        for path, factor in adapters.items()
        if isinstance(factor, bool) or not isinstance(factor, Real) or not math.isfinite(factor)
    ]
    if not adapters:
        problems.append("there is no adapter: name at least one")
    if dtype not in (None, *DTYPES):
        problems.append(f"dtype must be one of {', '.join(map(str, DTYPES))}, or None, got {dtype!r}")
    raise_collected(ConfigError, problems, doing="merge")
    problems = [f"{out} exists: choose another name, or remove it"] if os.path.lexists(out) else []  # links too
    problems += [
        f"{out} lies in {place}, which is an input and stays as it is: choose a place outside of it"
        for place in (base, *adapters)
        if place.resolve() in out.resolve().parents
    ]
    raise_collected(MergeError, problems, doing="merge")


def _require_bitsandbytes(base: DenseView) -> None:
    """Refuse what cannot be read without it."""
    needs = next((name for name, codes in base.codes.items() if codes.needs_bitsandbytes), None)
    if needs is not None and (reason := bnb_codes.missing()) is not None:
        raise CheckpointError(f"cannot merge: reading {needs} ({base.codes[needs].kind}) {reason}")


def _planned(shard: Shard, changes: Changes, dtype: torch.dtype | None) -> list[Planned]:
    """Say what becomes of the tensors of one file."""
    dtypes = {entry: dtype if dtype and entry.dtype in DTYPES else entry.dtype for entry in shard.entries}
    return [
        Planned(entry.name, wanted, entry.shape, partial(changes.pieces, entry, wanted))
        for entry, wanted in dtypes.items()
    ]


def _require_room(place: Path, needed: int, out: Path) -> None:
    """Refuse to begin what the disk cannot hold."""
    free = shutil.disk_usage(place).free
    if free < needed:
        raise MergeError(f"cannot merge to {str(out)!r}: it takes {as_bytes(needed)}, and {as_bytes(free)} are free")


def _write_index(directory: ModelDirectory, index: dict[str, Any] | None, scratch: Path, nbytes: int) -> None:
    """Carry the index over, or what it is without the tensors that are left out; the size that it says may change."""
    if index is None:
        return
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and nbytes != directory.nbytes:
        index = {**index, "metadata": {**metadata, "total_size": nbytes}}
    if index == directory.index:
        copy_companion(directory.path / INDEX_FILE, scratch / INDEX_FILE)
    else:
        write_json(scratch / INDEX_FILE, index)

"""`randlora.files.merge`: merging adapters into a checkpoint on disk, tensor by tensor, and writing a new one.

Everything is checked with the headers before the first byte is written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from randlora.checkpoint.read import AdapterFile, locate, named_base, read_adapter
from randlora.config import Factor, Source, Sources, Stream
from randlora.disk.formats import Planned, Shard, is_there
from randlora.disk.hub import is_on_hub, local_path
from randlora.disk.replace import new_directory
from randlora.errors import CheckpointError, ConfigError, MergeError, raise_collected, spelled
from randlora.files.adapter import out_problems
from randlora.files.base_fit import open_base, read_base
from randlora.files.changes import Changes, find_changes, naming
from randlora.files.model_directory import INDEX_FILE, MODEL_CONFIG_FILE, WHOLE, ModelDirectory
from randlora.files.write_model import ModelWriter, copy_companion, copy_config, find_companions
from randlora.hints import require_types
from randlora.report import Progress, as_bytes, as_lines, no_progress, with_factor
from randlora.targets.match import shortened

CASTABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that tensors are cast from and to."""


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
        added: Names of the tensors with trained values that the base does not have, such as a new head.
    """

    out: Path
    adapters: Mapping[str, Factor]
    merged: tuple[str, ...]
    replaced: tuple[str, ...]
    shards: int
    nbytes: int
    dtype: torch.dtype | None
    notes: tuple[str, ...]
    added: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return a summary of a few lines."""
        if not self.shards:
            return as_lines([f"another process, with a copy of the model, writes {self.out}", *self.notes])
        names = ", ".join(with_factor(name, factor) for name, factor in self.adapters.items())
        dtype = f", as {str(self.dtype).removeprefix('torch.')}" if self.dtype else ""
        files = "1 file" if self.shards == 1 else f"{self.shards} files"
        lines = [f"merged {names} into {len(self.merged)} weights"]
        for done, changed in {"replaced": self.replaced, "added": self.added}.items():
            if changed:
                tensors = "1 tensor" if len(changed) == 1 else f"{len(changed)} tensors"
                lines.append(f"{done} {tensors} trained with the adapters")
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
    working memory for the largest weight. ``out`` appears when it is complete; after a kill, the same call starts over.
    A quantized checkpoint is refused: load its model, and merge in memory or write it with `save_merged`.

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
        CheckpointError: If a file is missing or damaged, the checkpoint is quantized, an adapter does not fit, or no
            base model is given or named.
        MergeError: If ``out`` is not empty or is inside an input, the disk is too small, a value is not finite, or
            weights are 8-bit floats.
        OSError: If the disk refuses, or a different process creates ``out`` meanwhile.
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
        with naming(str(adapter)):
            opened[str(adapter)] = directory, read_adapter(directory, stream), factor
    if base is None:
        base = _base_of({adapter: file for adapter, (_, file, _) in opened.items()})
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
    raise_collected(MergeError, changes.float8_problems(), doing="merge")
    shards = [(shard, changes.tensors_of(shard, dtype)) for shard in model.directory.shards]
    shards[-1][1].extend(changes.added_tensors(dtype))
    nbytes, notes = _write(destination, model.directory, shards, changes, dtype, progress, overwrite=overwrite)
    return FileMergeReport(
        out=destination,
        adapters={str(path): factor for path, factor in factors.items()},
        merged=changes.merged,
        replaced=changes.replaced,
        shards=len(shards),
        nbytes=nbytes,
        dtype=dtype,
        notes=(*changes.notes, *notes),
        added=tuple(changes.added),
    )


def _factors(adapters: Sources) -> dict[Source, float]:
    """Return the factors of the updates by directory or repository, in the caller's order."""
    if isinstance(adapters, str | os.PathLike):
        adapters = [adapters]
    given = adapters if isinstance(adapters, Mapping) else dict.fromkeys(adapters, 1.0)
    factors: dict[Source, float] = {
        source if is_on_hub(source) else Path(source): factor for source, factor in given.items()
    }
    if len({os.path.realpath(source) for source in factors}) < len(adapters):
        raise ConfigError("cannot merge: an adapter is named twice; give it one factor instead")
    return factors


def _base_of(adapters: Mapping[str, AdapterFile]) -> str:
    """Return the base model that adapters name."""
    base = named_base(adapters)
    if not (is_there(Path(base)) or is_on_hub(base)):
        give = f"give {spelled('base')}, a directory or a repository"
        raise CheckpointError(f"the base model {base!r}, which the adapter names, is not there: {give}")
    return base


def _write(
    out: Path,
    directory: ModelDirectory,
    shards: Sequence[tuple[Shard, Sequence[Planned]]],
    changes: Changes,
    dtype: torch.dtype | None,
    progress: Progress,
    *,
    overwrite: bool,
) -> tuple[int, list[str]]:
    """Write the new checkpoint with the files that go with it, and return the size of its weights, and notes."""
    companions = find_companions(directory)
    if others := _others(out, {*companions.carried, Path(INDEX_FILE)}):
        lost = f"{out} holds other files, which would be lost: {shortened(others)}"
        raise MergeError(f"cannot merge: {lost}; choose a different name")
    nbytes = sum(tensor.nbytes for _, tensors in shards for tensor in tensors)
    needed = nbytes + sum((directory.path / path).stat().st_size for path in companions.carried)
    done = 0

    def wrote(count: int, name: str) -> None:
        nonlocal done
        done += count
        progress(done, nbytes, name)

    index = directory.index
    if index is not None and isinstance(metadata := index.get("metadata"), dict) and nbytes != directory.nbytes:
        index = {**index, "metadata": {**metadata, "total_size": nbytes}}
    with new_directory(out, overwrite=overwrite) as scratch:
        if (free := shutil.disk_usage(scratch).free) < needed:
            room = f"it needs {as_bytes(needed)}, and {as_bytes(free)} are free"
            raise MergeError(f"cannot merge to {str(out)!r}: {room}")
        writer = ModelWriter(scratch, wrote=wrote)
        for shard, tensors in shards:
            for tensor in tensors:
                writer.add(tensor)
            writer.end_file(shard.path.name, shard.metadata)
        if index is not None and writer.write_index(index) == directory.index:  # whose bytes stay
            copy_companion(directory.path / INDEX_FILE, scratch / INDEX_FILE)
        for path in companions.carried:
            if path == Path(MODEL_CONFIG_FILE):
                copy_config(directory.path / path, scratch / path, dtype, changes.trained_on)
            else:
                copy_companion(directory.path / path, scratch / path)
    notes = [f"not copied: {path}, which may hold the base model's weights" for path in companions.left_out]
    if changes.trained_on is not None and changes.unused:
        notes.append(f"not copied: {shortened(changes.unused)}, which a {changes.trained_on.name} does not have")
    return nbytes, notes


def _others(out: Path, written: Collection[Path]) -> list[str]:
    """Return the files in a directory that are neither written again nor weights of a model."""
    found = [path.relative_to(out) for path in out.rglob("*") if path.is_symlink() or not path.is_dir()]
    return [
        str(path)
        for path in sorted(found)
        if path not in written and not (path.parent == Path() and path.match("model*.safetensors"))
    ]

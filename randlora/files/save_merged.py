"""`randlora.save_merged`: the merged model of an adapted one, written as a checkpoint, tensor by tensor.

The model is not changed, and memory holds the tensors of one file. Where processes hold the model together, all gather
each tensor, and the first of them computes merged weights from all their values, with the bits of one process.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from randlora.disk.replace import new_directory
from randlora.disk.tensor_file import TORCH_DTYPES, Planned, write_tensor_file
from randlora.errors import ConfigError, MergeError
from randlora.files.model_directory import INDEX_FILE, SINGLE_FILE, write_json
from randlora.files.transformers_saving import Saved, left_out, saved_as, write_config
from randlora.hints import require_types, shortly
from randlora.model.engines import is_first_copy
from randlora.model.merged_tensors import MergedTensors
from randlora.model.merged_values import Share
from randlora.model.moving import moved_note
from randlora.model.untrained import untrained_notes
from randlora.ranks import one_writes
from randlora.report import as_bytes, as_lines
from randlora.targets.walk import Census

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
"""What sizes are given in, as to ``save_pretrained``."""

METADATA = {"format": "pt"}
"""What transformers writes into each file and asks for."""

DOING = "save the merged model"


@dataclass(frozen=True)
class MergedSaveReport:
    """What `randlora.save_merged` wrote.

    Attributes:
        directory: The new checkpoint's directory.
        merged: Names of the weights that updates were merged into.
        shards: Number of files with weights; 0 if another process writes them, which trains a copy of the model.
        nbytes: Size of all weights in bytes; then 0.
        dtype: The dtype that floating tensors were cast to; ``None`` if each kept its own.
        notes: Other notes for the user, such as that no config was written.
    """

    directory: Path
    merged: tuple[str, ...]
    shards: int
    nbytes: int
    dtype: torch.dtype | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Return one line, and one more for each note."""
        if not self.shards:
            return as_lines([f"another process, with a copy of the model, writes {self.directory}", *self.notes])
        files = "1 file" if self.shards == 1 else f"{self.shards} files"
        dtype = f", as {str(self.dtype).removeprefix('torch.')}" if self.dtype else ""
        wrote = f"wrote {self.directory}, {as_bytes(self.nbytes)} in {files}{dtype}"
        return as_lines([f"merged into {len(self.merged)} weights", wrote, *self.notes])


def save_merged(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> MergedSaveReport:
    """Write the merged model to a new directory, as ``save_pretrained`` would, without merging the model.

    The files have what `randlora.merged_tensors` yields, under the names of the plain model's ``state_dict``, in one
    safetensors file or in several with an index, and the model's config where it has one of transformers. The directory
    appears when it is complete: a call that fails removes what it wrote.

    If any parameter of the model is sharded, as by `fully_shard` or ZeRO-3, this is a collective: every process calls
    it, the first one writes, and all get its report or an error. The files are those that one process would write, byte
    for byte. The first process has the tensors of one file in the CPU's memory, and the others hold one tensor at a
    time. If each process trains a copy of the model, as with `DistributedDataParallel`, it may be called in all, where
    the first one writes and no other waits for it, or in that one alone.

    Args:
        model: A model with adapters, or a wrapper of torch or DeepSpeed around one.
        directory: The directory to create.
        dtype: The dtype of all floating tensors. ``None`` means that of each parameter; for dequantized weights, the
            dtype that `merge` would choose.
        max_shard_size: The largest size of a file, in bytes or as ``"5GB"``. A larger tensor has a file of its own.

    Returns:
        What was written.

    Raises:
        AdapterError: If the model has no adapter.
        ConfigError: For a dtype that is not floating, or another form of size.
        MergeError: If the directory exists, no adapter is active, they are disabled, an adapted module was replaced, a
            value is not here, a merged weight is not finite, or the files can hold no tensor of some dtype.
        OSError: If the disk refuses, or another process creates the directory meanwhile.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = randlora.inject(model, r=4)
        >>> report = randlora.save_merged(model, "merged")
    """
    require_types(save_merged, {"model": model, "directory": directory, "max_shard_size": max_shard_size})
    limit = _bytes_of(max_shard_size)
    tensors = MergedTensors.of(model, dtype, doing=DOING)
    factors = tensors.state.active
    merged = tuple(site.fqn for site in tensors.census.adapted if site.layer.factors(factors))
    out, ranks = Path(directory), tensors.ranks
    if not is_first_copy(model):
        return MergedSaveReport(out, merged, 0, 0, dtype, ())
    with ExitStack() as stack:
        files = _Files(limit, left_out(tensors.census))
        notes = one_writes(ranks, partial(_begin, tensors, out, files, stack))
        share = Share.WHOLE if ranks is None or ranks.is_first else Share.NONE
        for _ in tensors.each(files.add, share):
            pass

        def end() -> MergedSaveReport:
            files.finish(tensors.census.size)
            stack.close()  # the directory appears
            return MergedSaveReport(out, merged, len(files.names), files.nbytes, dtype, notes)

        return one_writes(ranks, end)


def _bytes_of(size: int | str) -> int:
    number, unit = (size[:-2], UNITS.get(size[-2:].upper())) if isinstance(size, str) else (size, 1)
    try:
        found = int(float(number) * (unit or 0))
    except (ValueError, OverflowError):
        found = 0
    if found < 1:
        raise ConfigError(f"max_shard_size must be a number of bytes or a text like '5GB', got {shortly(size)}")
    return found


def _begin(tensors: MergedTensors, out: Path, files: _Files, stack: ExitStack) -> tuple[str, ...]:
    """Open the directory, write the config into it, and return notes."""
    if os.path.lexists(out):
        raise MergeError(f"cannot {DOING}: {out} exists: choose another name, or remove it")
    files.directory = stack.enter_context(new_directory(out))
    files.saved, notes = saved_as(tensors.census)
    notes += write_config(tensors.census.model, files.directory, tensors.dtype)
    state, census = tensors.state, Census.of(tensors.root)
    active = [adapter for adapter in state.adapters.values() if adapter.is_active]
    notes += untrained_notes(census, state, active)
    notes += moved_note(census, state, active, "the files have them as they are now, and no file of the adapter")
    return tuple(notes)


@dataclass
class _Files:
    """The files of a checkpoint, each written when it is full.

    Attributes:
        limit: The largest size of a file in bytes.
        left_out: Names of entries that are not written.
        saved: What entries become.
        directory: Where the files are.
        held: The tensors of the next file.
        held_bytes: Their size.
        names: The names of the tensors of each file written.
        nbytes: The size of all tensors so far.
    """

    limit: int
    left_out: Collection[str]
    saved: Saved = field(init=False)
    directory: Path = field(init=False)
    held: dict[str, Tensor] = field(default_factory=dict)
    held_bytes: int = 0
    names: list[list[str]] = field(default_factory=list)
    nbytes: int = 0

    def add(self, fqn: str, tensor: Tensor) -> None:
        """Take an entry of the state dict."""
        if fqn in self.left_out:
            return
        if tensor.dtype not in TORCH_DTYPES.values():
            raise MergeError(f"cannot {DOING}: {fqn} has {tensor.dtype}, which safetensors files do not hold")
        for name, part in self.saved(fqn, tensor.detach().to("cpu")).items():
            if self.held and self.held_bytes + part.nbytes > self.limit:
                self._write()
            self.held[name] = part
            self.held_bytes += part.nbytes

    def finish(self, parameters: int) -> None:
        """Write the last file, give all their names, and write an index if there are several."""
        self._write()
        count = len(self.names)
        files = [f"model-{index + 1:05}-of-{count:05}.safetensors" for index in range(count)]
        files = files if count > 1 else [SINGLE_FILE]
        for index, file in enumerate(files):
            (self.directory / _unnamed(index)).rename(self.directory / file)
        if count > 1:
            places = {name: file for file, names in zip(files, self.names, strict=True) for name in names}
            metadata = {"total_parameters": parameters, "total_size": self.nbytes}
            index_of_files = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
            write_json(self.directory / INDEX_FILE, index_of_files)

    def _write(self) -> None:
        path = self.directory / _unnamed(len(self.names))
        write_tensor_file(path, [Planned.whole(*each) for each in self.held.items()], METADATA)
        self.names.append([*self.held])
        self.nbytes += self.held_bytes
        self.held, self.held_bytes = {}, 0


def _unnamed(index: int) -> str:
    """Return the name of a file before it is known how many there are."""
    return f"{index}.unnamed"

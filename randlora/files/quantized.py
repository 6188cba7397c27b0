"""Quantized checkpoints: those of bitsandbytes are read as if they were not quantized, others are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from randlora.disk.tensor_file import Entry, read_tensor
from randlora.errors import CheckpointError, raise_collected
from randlora.files.bnb_layout import FLOATS, StoredCodes, find_codes
from randlora.files.model_directory import ModelDirectory
from randlora.files.transformers_model import TransformersModel

MARKS = {
    ".qweight": "GPTQ or AWQ",
    ".weight_scale_inv": "blocks of 8-bit floats",
    ".weight_packed": "compressed-tensors",
}
"""Parts of tensor names that show another quantization, and which one."""

SETTINGS = "quantization_config"
METHOD = "bitsandbytes"
UNSAID = torch.float16
"""The dtype of dequantized 8-bit codes if ``config.json`` has none: bitsandbytes rounds to it before it quantizes."""


@dataclass(frozen=True, eq=False)
class DenseView:
    """A checkpoint as if it were not quantized.

    Attributes:
        directory: The checkpoint, with the shapes and dtypes that quantized tensors had, without the other tensors of
            the quantization, and without the quantization in its config.
        codes: The tensors that are stored as codes, by name.
        transposed: Names of those that were transposed before they were quantized.
    """

    directory: ModelDirectory
    codes: Mapping[str, StoredCodes]
    transposed: frozenset[str] = frozenset()

    def read(self, entry: Entry) -> Tensor:
        """Return a tensor of the directory, dequantized to float32 if it is stored as codes."""
        if (codes := self.codes.get(entry.name)) is None:
            return read_tensor(entry)
        return codes.read().T if entry.name in self.transposed else codes.read()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of codes."""
        return tuple(sorted({codes.kind for codes in self.codes.values()}))


def as_dense(directory: ModelDirectory, model: TransformersModel | str) -> DenseView:
    """Return a checkpoint as if it were not quantized.

    Args:
        directory: The checkpoint.
        model: The result of `build_model` for it.

    Raises:
        CheckpointError: If codes are incomplete, damaged or not of bitsandbytes, or if the model's class cannot be
            built, without which it is not known which weights were transposed before they were quantized.
    """
    _refuse_others(directory)
    codes = find_codes(directory.entries)
    if not codes and not isinstance(directory.config.get(SETTINGS), dict):
        return DenseView(directory, {})
    problems = [
        f"{entry.file} has {name} in {entry.dtype} without the scales needed to read it: get a complete copy"
        for name, entry in directory.entries.items()
        if name.endswith(".weight") and entry.dtype in (torch.int8, torch.uint8) and name not in codes
    ]
    raise_collected(CheckpointError, problems, doing="read the quantized tensors")
    if isinstance(model, str) and (directory.architecture or directory.model_type):
        raise CheckpointError(f"{directory.path} is quantized, and cannot be read without its model: {model}")
    transposed = frozenset() if isinstance(model, str) else model.transposed & codes.keys()
    said = directory.config.get("dtype", directory.config.get("torch_dtype"))
    dtype_8bit = FLOATS.get(said, UNSAID) if isinstance(said, str) else UNSAID
    dense = {}
    for name, found in codes.items():
        shape = found.shape[::-1] if name in transposed else found.shape
        dtype = found.dtype or dtype_8bit
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        dense[name] = replace(found.entry, dtype=dtype, shape=shape, nbytes=nbytes)
    parts = {part.name for found in codes.values() for part in found.parts.values()}
    entries = ((shard, [entry for entry in shard.entries if entry.name not in parts]) for shard in directory.shards)
    # a file may have had nothing but parts of codes
    shards = tuple(replace(shard, entries=tuple(dense.get(e.name, e) for e in kept)) for shard, kept in entries if kept)
    index = directory.index
    if index is not None:
        places = {name: file for name, file in index["weight_map"].items() if name not in parts}
        index = {**index, "weight_map": places}
    config = {name: value for name, value in directory.config.items() if name != SETTINGS}
    return DenseView(ModelDirectory(directory.path, config, shards, index), codes, transposed)


def _refuse_others(directory: ModelDirectory) -> None:
    advice = "only codes of bitsandbytes can be read: take the checkpoint in a floating dtype"
    for name in directory.entries:
        for mark, origin in MARKS.items():
            if mark in f"{name}.":
                raise CheckpointError(f"{directory.path} is quantized ({name} is of {origin}): {advice}")
    settings = directory.config.get(SETTINGS)
    if not isinstance(settings, dict):
        return
    # the first checkpoints of bitsandbytes do not name it
    is_unnamed = "quant_method" not in settings and ("load_in_4bit" in settings or "load_in_8bit" in settings)
    if not is_unnamed and settings.get("quant_method") != METHOD:
        method = settings.get("quant_method", "an unnamed method")
        raise CheckpointError(f"{directory.path} is quantized (config.json says with {method}): {advice}")

"""Quantized checkpoints: those of bitsandbytes are read as the dense ones they stand for, others are refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from randlora.checkpoint.tensors_file import Entry, Shard
from randlora.errors import CheckpointError, raise_collected
from randlora.files.bnb_layout import find_codes
from randlora.files.codes import FLOATS, Codes
from randlora.files.model_directory import ModelDirectory
from randlora.files.tensor_file import read_tensor
from randlora.files.transformers_model import TransformersModel, build_model

MARKS = {
    ".qweight": "GPTQ or AWQ",
    ".weight_scale_inv": "blocks of 8-bit floats",
    ".weight_packed": "compressed-tensors",
}
"""What the names of tensors contain that only checkpoints quantized in other ways have, and what wrote them."""

SETTINGS = "quantization_config"
METHOD = "bitsandbytes"
UNSAID = torch.float16
"""What codes of 8 bits are taken to stand for where ``config.json`` says no dtype: bitsandbytes rounds to it first."""


@dataclass(frozen=True, eq=False)
class DenseView:
    """A checkpoint as the dense one that it stands for.

    Attributes:
        directory: The checkpoint. Codes have the names, shapes and dtypes of dense tensors in it, what stands beside
            codes is not in it, and its config says nothing of quantization.
        codes: The tensors that are stored as codes, by name.
        transposed: Names of those that a dense checkpoint holds transposed.
    """

    directory: ModelDirectory
    codes: Mapping[str, Codes]
    transposed: frozenset[str] = frozenset()

    def read(self, entry: Entry) -> Tensor:
        """Read a tensor of the directory, one that is stored as codes in float32."""
        if (codes := self.codes.get(entry.name)) is None:
            return read_tensor(entry)
        return codes.read().T if entry.name in self.transposed else codes.read()

    @property
    def kinds(self) -> tuple[str, ...]:
        """What kinds of codes there are, in words."""
        return tuple(sorted({codes.kind for codes in self.codes.values()}))


def as_dense(directory: ModelDirectory, model: TransformersModel | str | None = None) -> DenseView:
    """Look at a checkpoint as the dense one that it stands for; one that is not quantized stays as it is.

    Args:
        directory: The checkpoint.
        model: What `build_model` returned for it; ``None`` to have it built where it is needed.

    Raises:
        CheckpointError: When codes are incomplete or damaged, or none of bitsandbytes, naming the tensor or the entry
            of ``config.json`` that shows it; or when its class, which alone says which weights were transposed before
            they were quantized, cannot be had.
    """
    _refuse_others(directory)
    codes = find_codes(directory.entries)
    if not codes and not isinstance(directory.config.get(SETTINGS), dict):
        return DenseView(directory, {})
    raise_collected(CheckpointError, _bare_codes(directory, codes), doing="read what is quantized")
    model = build_model(directory) if model is None else model
    if isinstance(model, str) and (directory.architecture or directory.model_type):
        raise CheckpointError(f"{directory.path} is quantized, and cannot be read without its model: {model}")
    transposed = frozenset() if isinstance(model, str) else model.transposed & codes.keys()
    beside = {part.name for found in codes.values() for part in found.parts.values()}
    dense = {name: _dense(found, directory, is_transposed=name in transposed) for name, found in codes.items()}
    shards = (_without(shard, beside, dense) for shard in directory.shards)
    view = ModelDirectory(
        directory.path,
        {name: value for name, value in directory.config.items() if name != SETTINGS},
        tuple(shard for shard in shards if shard.entries),  # what stood beside codes may have filled a file
        _index(directory, beside),
    )
    return DenseView(view, codes, transposed)


def _refuse_others(directory: ModelDirectory) -> None:
    advice = "only codes of bitsandbytes can be read: take the checkpoint in a floating dtype"
    for name in directory.entries:
        for mark, origin in MARKS.items():
            if mark in f"{name}.":
                raise CheckpointError(f"{directory.path} is quantized ({name} is of {origin}): {advice}")
    settings = directory.config.get(SETTINGS)
    if isinstance(settings, dict) and not _is_bitsandbytes(settings):
        method = settings.get("quant_method", "an unnamed method")
        raise CheckpointError(f"{directory.path} is quantized (config.json says with {method}): {advice}")


def _is_bitsandbytes(settings: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of bitsandbytes, which the first of them do not name."""
    if "quant_method" in settings:
        return bool(settings["quant_method"] == METHOD)
    return "load_in_4bit" in settings or "load_in_8bit" in settings


def _bare_codes(directory: ModelDirectory, codes: Mapping[str, Codes]) -> list[str]:
    """Say which weights are codes, and lack what says how to read them."""
    return [
        f"{entry.file} has {name} in {entry.dtype} but nothing that says how to read it: get a complete copy"
        for name, entry in directory.entries.items()
        if name.endswith(".weight") and entry.dtype in (torch.int8, torch.uint8) and name not in codes
    ]


def _dense(codes: Codes, directory: ModelDirectory, *, is_transposed: bool) -> Entry:
    """Describe what codes stand for; its place in the file stays theirs."""
    dtype = codes.dtype or _said_dtype(directory.config)
    shape = codes.shape[::-1] if is_transposed else codes.shape
    return replace(codes.entry, dtype=dtype, shape=shape, nbytes=torch.Size(shape).numel() * dtype.itemsize)


def _said_dtype(config: Mapping[str, Any]) -> torch.dtype:
    said = config.get("dtype", config.get("torch_dtype"))
    return FLOATS.get(said, UNSAID) if isinstance(said, str) else UNSAID


def _without(shard: Shard, beside: Collection[str], dense: Mapping[str, Entry]) -> Shard:
    """Leave out what stands beside codes, and put in the codes' places what they stand for."""
    entries = (dense.get(entry.name, entry) for entry in shard.entries if entry.name not in beside)
    return replace(shard, entries=tuple(entries))


def _index(directory: ModelDirectory, beside: Collection[str]) -> dict[str, Any] | None:
    if directory.index is None:
        return None
    places = {name: file for name, file in directory.index["weight_map"].items() if name not in beside}
    return {**directory.index, "weight_map": places}

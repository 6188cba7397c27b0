"""The files of a model's directory that hold no weights: config, tokenizer and others, which a merge copies."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from randlora.checkpoint.format import CONFIG_FILE
from randlora.disk.replace import flush
from randlora.files.model_directory import INDEX_FILE, ModelDirectory

WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data"),
    *(".ot", ".tflite", ".npz", ".mlmodel", ".pkl", ".index.json"),
)
"""Ends of the names of files with weights, or of their indexes."""

ADAPTER_PREFIX = "adapter_"
DTYPE_FIELDS = frozenset({"dtype", "torch_dtype"})


@dataclass(frozen=True)
class Companions:
    """The files of a model's directory other than its checkpoint, as paths inside the directory.

    Attributes:
        carried: Files to copy.
        left_out: Weights in other formats, which are not merged.
    """

    carried: tuple[Path, ...]
    left_out: tuple[Path, ...]


def find_companions(directory: ModelDirectory) -> Companions:
    """Return the files of a model's directory that are not part of its checkpoint.

    Hidden files and adapters in the directory are ignored.
    """
    own = {shard.path for shard in directory.shards} | {directory.path / INDEX_FILE}
    carried: list[Path] = []
    left_out: list[Path] = []
    for path in _files(directory.path):
        if path in own or path.name.startswith(ADAPTER_PREFIX):
            continue
        (left_out if path.name.endswith(WEIGHT_SUFFIXES) else carried).append(path.relative_to(directory.path))
    return Companions(tuple(carried), tuple(left_out))


def copy_companion(source: Path, destination: Path) -> None:
    """Copy one file and flush it to disk."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, destination)
    flush(destination)


def copy_config(
    source: Path, destination: Path, dtype: torch.dtype | None, without: Collection[str] = frozenset()
) -> None:
    """Copy ``config.json``, with another dtype if one is given, and without some of its fields."""
    if dtype is None and not without:
        copy_companion(source, destination)
        return
    config = {
        name: value for name, value in json.loads(source.read_text(encoding="utf-8")).items() if name not in without
    }
    write_json(destination, config if dtype is None else _with_dtype(config, dtype))


def write_json(path: Path, content: object) -> None:
    """Write a JSON file as transformers does and flush it to disk."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    flush(path)


def _with_dtype(config: Any, dtype: torch.dtype) -> Any:
    """Return a config with another dtype in its fields and in those of configs inside it."""
    if not isinstance(config, dict):
        return config
    name = str(dtype).removeprefix("torch.")
    return {
        key: name if key in DTYPE_FIELDS and value is not None else _with_dtype(value, dtype)
        for key, value in config.items()
    }


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        is_adapter = folder != os.fspath(root) and CONFIG_FILE in names
        folders[:] = [] if is_adapter else sorted(name for name in folders if not name.startswith("."))
        if not is_adapter:
            yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))

"""The writer of merged models, of `merge` and `save_merged`: weights, their index, and the files around them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from randlora.checkpoint.header import ModelClass
from randlora.checkpoint.peft_config import CONFIG_FILE
from randlora.checkpoint.tensors import METADATA
from randlora.disk.formats import Planned, open_regular, require_regular, write_tensor_file
from randlora.errors import CheckpointError, raise_collected
from randlora.files.model_directory import INDEX_FILE, ModelDirectory, read_object

WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data"),
    *(".ot", ".tflite", ".npz", ".mlmodel", ".pkl", ".index.json"),
)
"""Ends of the names of files with weights, or of their indexes."""

LARGEST_CARRIED = 2**30
"""The size above which a file is treated as weights in an unknown format."""

BLOBS = "blobs"
"""The directory beside the one of all snapshots to which links in the Hub's cache lead."""

ADAPTER_PREFIX = "adapter_"
DTYPE_FIELDS = frozenset({"dtype", "torch_dtype"})


@dataclass
class ModelWriter:
    """Writes a model's weights into a directory, in files of at most ``limit`` bytes, and then their index.

    A larger tensor has a file alone. ``wrote`` is as for `write_tensor_file`.
    """

    directory: Path
    limit: int | None = None
    wrote: Callable[[int, str], object] | None = None
    waiting: dict[str, Planned] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)
    nbytes: int = 0  # of all tensors
    written: int = 0  # of those in files

    def add(self, tensor: Planned) -> None:
        """Take a tensor for the next file."""
        if self.limit is not None and self.waiting and self.nbytes + tensor.nbytes > self.written + self.limit:
            self.end_file()
        self.waiting[tensor.name] = tensor
        self.nbytes += tensor.nbytes

    def end_file(self, name: str | None = None, metadata: Mapping[str, str] = METADATA) -> None:
        """Write a file of all tensors since the last one, under a name or, if that is not known yet, a number."""
        name, tensors, self.waiting = name or str(len(self.files)), [*self.waiting.values()], {}
        write_tensor_file(self.directory / name, tensors, metadata, self.wrote)
        self.files[name] = [tensor.name for tensor in tensors]
        self.written = self.nbytes

    def rename_files(self, names: Sequence[str]) -> None:
        """Give the files, in their order, other names."""
        for number, name in zip(self.files, names, strict=True):
            (self.directory / number).rename(self.directory / name)
        self.files = dict(zip(names, self.files.values(), strict=True))

    def write_index(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Write the index of the files, with other fields, and return its contents."""
        places = {tensor: name for name, tensors in self.files.items() for tensor in tensors}
        index = {**fields, "weight_map": dict(sorted(places.items()))}
        write_json(self.directory / INDEX_FILE, index)
        return index


class Companions(NamedTuple):
    """The other files of a model's directory, by their paths in it; weights in other formats are ``left_out``."""

    carried: tuple[Path, ...]
    left_out: tuple[Path, ...]


def find_companions(directory: ModelDirectory) -> Companions:
    """Return the files of a model's directory that are not part of its checkpoint, hidden, or of an adapter.

    A pipe, a device, a broken link or a link to a file elsewhere raises a `CheckpointError`.
    """
    own = {shard.path for shard in directory.shards} | {directory.path / INDEX_FILE}
    root = Path(os.path.realpath(directory.path))
    blobs = [parent / BLOBS for parent in [*root.parents][:2]]  # where the Hub's cache has all files
    carried: list[Path] = []
    left_out: list[Path] = []
    problems = []
    for path in _files(directory.path):
        if path in own or path.name.startswith(ADAPTER_PREFIX):
            continue
        try:
            is_weights = path.name.endswith(WEIGHT_SUFFIXES) or require_regular(path).st_size > LARGEST_CARRIED
            # a directory from a stranger could point at secrets, which whoever publishes the output would publish
            found = Path(os.path.realpath(path))
            if not is_weights and root not in found.parents and found.parent not in blobs:
                raise CheckpointError(f"{path} is a link to {found}, outside of the directory")
        except (CheckpointError, OSError) as error:
            problems.append(f"{error}, which would be copied: put a file in its place, or remove it")
            continue
        (left_out if is_weights else carried).append(path.relative_to(directory.path))
    raise_collected(CheckpointError, problems, doing=f"copy the files of {str(directory.path)!r}")
    return Companions(tuple(carried), tuple(left_out))


def copy_companion(source: Path, destination: Path) -> None:
    """Copy one file."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with open_regular(source) as read, destination.open("wb") as written:
        shutil.copyfileobj(read, written)


def copy_config(
    source: Path, destination: Path, dtype: torch.dtype | None, trained_on: ModelClass | None = None
) -> None:
    """Copy ``config.json``, with a different dtype or class if one is given."""
    if dtype is None and trained_on is None:
        copy_companion(source, destination)
        return
    config = read_object(source)
    if trained_on is not None:
        config = dict(sorted({**config, "architectures": [trained_on.name], **trained_on.config_fields}.items()))
    write_json(destination, config if dtype is None else _with_dtype(config, dtype))


def write_json(path: Path, content: object) -> None:
    """Write a JSON file as transformers does."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _with_dtype(config: Any, dtype: torch.dtype) -> Any:
    """Return a config with a different dtype in its fields and in the configs inside it."""
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

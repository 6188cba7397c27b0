"""The headers of a model's checkpoint: names, dtypes and shapes of its tensors and where they are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from randlora.disk.tensor_file import Entry, Shard, read_shard
from randlora.errors import CheckpointError, raise_collected

MODEL_CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, eq=False)
class ModelDirectory:
    """A directory with a model's weights in one safetensors file or several.

    Attributes:
        path: The directory.
        config: The contents of ``config.json``; empty if there is none.
        shards: The files with weights.
        index: The contents of the index of a sharded checkpoint, else ``None``.
    """

    path: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None = None

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """All tensors by their names in the files."""
        return {entry.name: entry for shard in self.shards for entry in shard.entries}

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def model_type(self) -> str | None:
        """The model's type in ``config.json``."""
        found = self.config.get("model_type")
        return found if isinstance(found, str) else None

    @property
    def architecture(self) -> str:
        """The first class that ``config.json`` names, or an empty string."""
        found = self.config.get("architectures")
        return str(found[0]) if isinstance(found, list) and found else ""


def read_model_directory(directory: str | os.PathLike[str]) -> ModelDirectory:
    """Return the headers of a model's checkpoint, one file or sharded, after checking that they agree.

    Args:
        directory: A directory as transformers' ``save_pretrained`` writes it: ``model.safetensors``, or shards with
            ``model.safetensors.index.json``, and ``config.json``.

    Raises:
        CheckpointError: If there is no such checkpoint, a file is missing, truncated or damaged, or a file holds other
            tensors than the index says. All problems are named.
    """
    path = Path(directory)
    index = None
    if (path / SINGLE_FILE).is_file():
        files: Iterable[str] = [SINGLE_FILE]
    elif (path / INDEX_FILE).is_file():
        index = _read_json(path / INDEX_FILE)
        files = sorted(set(_weight_map(path, index).values()))
    else:
        raise CheckpointError(_what_is_there_instead(path))
    config = _read_json(path / MODEL_CONFIG_FILE) if (path / MODEL_CONFIG_FILE).is_file() else {}
    shards = _read_shards(path, files)
    problems = _repeated(shards) + ([] if index is None else _disagreements(shards, _weight_map(path, index)))
    raise_collected(CheckpointError, problems, doing=f"read the checkpoint in {str(path)!r}")
    return ModelDirectory(path, config, shards, index)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path} ({error}): get an undamaged copy") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged (not a JSON object): get an undamaged copy")
    return content


def _weight_map(path: Path, index: Mapping[str, Any]) -> dict[str, str]:
    found = index.get("weight_map")
    if isinstance(found, dict) and found:
        files = found.values()
        if all(isinstance(file, str) and Path(file).name == file for file in files):  # not in another directory
            return found
    raise CheckpointError(
        f"{path / INDEX_FILE} is damaged: expected 'weight_map' with a file of the directory for each tensor"
    )


def _read_shards(path: Path, files: Iterable[str]) -> tuple[Shard, ...]:
    shards, problems = [], []
    for file in files:
        if not (path / file).is_file():
            problems.append(f"there is no {path / file}, which the index names: get a complete copy")
            continue
        try:
            shards.append(read_shard(path / file))
        except CheckpointError as error:
            problems.append(str(error))
    raise_collected(CheckpointError, problems, doing=f"read the checkpoint in {str(path)!r}")
    return tuple(shards)


def _repeated(shards: Iterable[Shard]) -> list[str]:
    places: dict[str, list[str]] = {}
    for shard in shards:
        for entry in shard.entries:
            places.setdefault(entry.name, []).append(shard.path.name)
    return [f"{name} is in {' and in '.join(files)}" for name, files in places.items() if len(files) > 1]


def _disagreements(shards: Iterable[Shard], weight_map: Mapping[str, str]) -> list[str]:
    held = {shard.path.name: {entry.name for entry in shard.entries} for shard in shards}
    return [
        f"{file} lacks {name}, which the index says it holds"
        for name, file in weight_map.items()
        if name not in held[file]
    ]


def _what_is_there_instead(path: Path) -> str:
    """Return what a directory without a safetensors checkpoint holds, and what to do."""
    expected = f"expected a directory with {SINGLE_FILE} or {INDEX_FILE}"
    if not path.is_dir():
        return f"{path} is not a directory: {expected}"
    names = sorted(file.name for file in path.iterdir())
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if any(name.endswith(".gguf") for name in names):
        return f"{path} holds weights in the GGUF format: {expected}"
    if "adapter_config.json" in names:
        return f"{path} holds an adapter, not a model: {expected}"
    if pickled:
        return (
            f"{path} holds pickled weights ({pickled[0]}), and nothing is unpickled here: load the model with "
            f"transformers and write it with save_pretrained; {expected}"
        )
    return f"{path} holds no weights: {expected}"

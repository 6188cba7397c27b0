"""Checkpoints that transformers writes, adapters of their models, and what merging in memory makes of the two."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import randlora
from tests.kit import all_bits, fill
from tests.models import RealModel

SHARD = "20KB"
"""Small enough for several files."""

HEADS = {"llama": "model.norm", "gpt2": "ln_f", "bert": "classifier", "vit": "classifier"}
"""Something to train beside an adapter, by kind of model."""


def save_model(
    kind: RealModel, directory: Path, *, dtype: torch.dtype = torch.float32, is_sharded: bool = False
) -> Path:
    """Let transformers write a model."""
    return write(kind.build().to(dtype), directory, is_sharded=is_sharded)


def write(model: nn.Module, directory: Path, *, is_sharded: bool = False, shard: str = SHARD) -> Path:
    """Let transformers write what a model holds now, in files of at most the size of a shard if ``is_sharded``."""
    options = {"max_shard_size": shard} if is_sharded else {}
    model.save_pretrained(directory, **options)  # type: ignore[operator]
    return directory


def save_adapter(
    kind: RealModel, directory: Path, *, dtype: torch.dtype = torch.float32, values: int = 0, **options: Any
) -> Path:
    """Save an adapter of a model, with values as after some training; ``values`` is the seed of those."""
    model = kind.build().to(dtype)
    randlora.inject(model, **{"r": 4, "targets": list(kind.targets), **options})
    fill(model, seed=values)
    randlora.save(model, directory)
    return directory


def merge_in_memory(
    kind: RealModel, adapters: Mapping[Path, float], *, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Build the model, load adapters, and merge them: what merging on disk must equal."""
    model = kind.build().to(dtype)
    for number, directory in enumerate(adapters):
        randlora.load(model, directory, name=f"adapter_{number}")
    randlora.activate(model, {f"adapter_{number}": weight for number, weight in enumerate(adapters.values())})
    randlora.merge(model)
    return model


def contents(directory: Path) -> dict[str, bytes]:
    """Read every file below a directory, hidden ones too."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def stored(directory: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_tensors(found: Path, expected: Path) -> None:
    """Compare the tensors of two checkpoints, bit for bit, in whatever files they are."""
    ours, theirs = all_bits(stored(found)), all_bits(stored(expected))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []

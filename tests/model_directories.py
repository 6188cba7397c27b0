"""Checkpoints that transformers writes, adapters of their models, and what merging in memory makes of the two."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import randlora
from tests.kit import Model, adapt, all_bits
from tests.models import RealModel

SHARD = "20KB"
"""Small enough for several files."""

HEADS = {"llama": "model.norm", "gpt2": "ln_f", "bert": "classifier", "vit": "classifier"}
"""Something to train beside an adapter, by kind of model."""


def save_model(
    kind: RealModel, directory: Path, *, dtype: torch.dtype = torch.float32, is_sharded: bool = False
) -> Path:
    return write(kind.build().to(dtype), directory, is_sharded=is_sharded)


def write(model: nn.Module, directory: Path, *, is_sharded: bool = False, shard: str = SHARD) -> Path:
    options = {"max_shard_size": shard} if is_sharded else {}
    model.save_pretrained(directory, **options)  # type: ignore[operator]
    return directory


def edit_json(path: Path, **changes: object) -> None:
    fields = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    kept = {name: value for name, value in fields.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


def edit_model(directory: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Change some tensors of a checkpoint of one file; ``None`` takes one out."""
    file = directory / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, {"format": "pt"})


def adapter_of(model: nn.Module, directory: Path, *, values: int = 0, **options: Any) -> Path:
    """Save an adapter of a model, with values as after some training, and leave the model plain."""
    randlora.save(adapt(model, **options, values=values), directory)
    randlora.eject(model)
    return directory


def save_adapter(kind: RealModel, directory: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    return adapter_of(kind.build().to(dtype), directory, **{"targets": list(kind.targets), **options})


def carrying(model: Model, adapters: Mapping[Path, float]) -> Model:
    for number, directory in enumerate(adapters):
        randlora.load(model, directory, name=f"adapter_{number}")
    randlora.activate(model, {f"adapter_{number}": weight for number, weight in enumerate(adapters.values())})
    return model


def merge_into(model: Model, adapters: Mapping[Path, float]) -> Model:
    """Load adapters into a model, and merge them: what merging on disk must equal."""
    randlora.merge(carrying(model, adapters))
    return model


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def stored(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_tensors(found: Path, expected: Path) -> None:
    ours, theirs = all_bits(stored(found)), all_bits(stored(expected))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []

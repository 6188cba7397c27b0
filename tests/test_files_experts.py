"""Adapters of experts on disk: merged into the tensors that a checkpoint has, saved, loaded, inspected, converted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import nn

import randlora
from tests.kit import fill, same_bits
from tests.model_directories import write
from tests.quantized_checkpoints import stored
from tests.test_experts import EXPERTS, each_or_shared, every_model, made


def adapted(model: nn.Module, directory: Path, **options: Any) -> Path:
    """Save an adapter of a model, and leave the model plain."""
    randlora.inject(model, **{"r": 3, "targets": EXPERTS, **options})
    fill(model)
    randlora.save(model, directory)
    randlora.eject(model)
    return directory


def read(directory: Path) -> nn.Module:
    """Let transformers load a model."""
    return cast("nn.Module", transformers.AutoModelForCausalLM.from_pretrained(directory))


def checkpoint(model: nn.Module, directory: Path, *, is_sharded: bool = False) -> Path:
    """Let transformers write a model as it is when it was loaded, with some parameters in float32."""
    write(model, directory / "made")
    return write(read(directory / "made"), directory / "base", is_sharded=is_sharded, shard="2KB")


def in_memory(base: Path, adapters: dict[Path, float], directory: Path) -> Path:
    """Load a model and adapters, merge and save: what merging on disk must equal."""
    loaded = read(base)
    for number, adapter in enumerate(adapters):
        randlora.load(loaded, adapter, name=f"adapter_{number}")
    randlora.activate(loaded, {f"adapter_{number}": factor for number, factor in enumerate(adapters.values())})
    randlora.merge(loaded)
    return write(loaded, directory)


def assert_same_tensors(found: Path, expected: Path) -> None:
    ours, theirs = stored(found), stored(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not same_bits(ours[name], theirs[name])] == []


@every_model
@each_or_shared
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_sharded", [False, True], ids=["one file", "many files"])
def test_merging_on_disk_is_loading_merging_and_saving(
    build: Callable[[], nn.Module], experts: Any, dtype: torch.dtype, is_sharded: bool, tmp_path: Path
) -> None:
    model = made(build, dtype=dtype)
    base = checkpoint(model, tmp_path, is_sharded=is_sharded)
    assert (len(list(base.glob("*.safetensors"))) > 4) is is_sharded
    adapter = adapted(model, tmp_path / "adapter", experts=experts)
    assert randlora.files.verify(adapter, base).passed
    report = randlora.files.merge(base, adapter, tmp_path / "out")
    assert_same_tensors(report.out, in_memory(base, {adapter: 1.0}, tmp_path / "expected"))
    before, after = stored(base), stored(report.out)
    changed = {name for name in after if not same_bits(before[name], after[name])}
    assert changed == set(report.merged)
    assert all("experts." in name for name in changed)
    assert report.replaced == ()

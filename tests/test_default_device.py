"""Verbs do the same whatever device and dtype torch makes tensors on and of where none are given."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora import files, serving
from randlora.bases import BasisBank, BasisSpec
from randlora.errors import CheckpointError
from tests.kit import all_bits, bits, fill
from tests.laws import TOKENS, Mixed
from tests.model_directories import contents, save_adapter, save_model
from tests.models import LLAMA
from tests.strategies import KINDS_AND_STREAMS


def inside(model: nn.Module, block: Any) -> Tensor:
    with block:
        output: Tensor = model(TOKENS)
    return output


def drawn() -> list[Any]:
    drawings = [BasisSpec(*each, 3, 4, 12, 8, (2, 2) if each[0] == "block" else None) for each in KINDS_AND_STREAMS]
    bank = BasisBank()
    return [bank.acquire(spec).slices(12, 8, device="cpu", dtype=torch.float32) for spec in drawings]


def story(model: nn.Module, at: Path) -> dict[str, Callable[[], Any]]:
    adapter, base, every = at / "adapter", at / "base", at / "every"
    return {
        "drawn": drawn,
        "convert": lambda: files.convert(adapter, at / "lora", to="lora", rank=12, tolerance=1.0),
        "inspect": lambda: files.inspect(adapter, base=base),
        "join": lambda: files.join((at / "q_proj", at / "up_proj"), at / "whole"),
        "load_model": lambda: files.load_model(adapter, base=base),
        "merge on disk": lambda: files.merge(adapter, at / "merged", base=base),
        "plan on disk": lambda: files.plan(base, r=4),
        "verify": lambda: files.verify(adapter, base=base),
        "adapter_state": lambda: randlora.adapter_state(model, "a", bases="stored"),
        "check": lambda: randlora.check(model, TOKENS),
        "check_ranks": lambda: randlora.check_ranks(model, values=True),
        "delta_weight": lambda: randlora.delta_weight(model, "up", name="a"),
        "disabled": lambda: inside(model, randlora.disabled(model)),
        "merged": lambda: inside(model, randlora.merged(model)),
        "merged_tensors": lambda: dict(randlora.merged_tensors(model)),
        "routed": lambda: inside(model, serving.routed(model, ["a", "b", None] * 3)),
        "save": lambda: randlora.save(model, at / "a", name="a", bases="stored"),
        "save_all": lambda: randlora.save_all(model, every),
        "save_merged": lambda: files.save_merged(model, at / "saved"),
        "train": lambda: torch.autograd.grad(model(TOKENS).square().sum(), [*randlora.trainable_parameters(model)]),
        "training_memory": lambda: randlora.training_memory(model, r=3, tokens=8),
        "update_norms": lambda: randlora.update_norms(model, name="b"),
        "activate": lambda: randlora.activate(model, {"a": 0.5, "b": 1.0}),
        "unmerge": lambda: (randlora.merge(model, reversible=True), randlora.unmerge(model)),
        "combine": lambda: serving.combine(model, {"a": 1.0}, name="c"),
        "limit_norms": lambda: randlora.limit_norms(model, 0.01, name="a"),
        "swap": lambda: randlora.swap(model, every / "b", name="a"),
        "load": lambda: randlora.load(model, every / "b", name="d", trainable=True),
        "inject": lambda: randlora.inject(model, r=3, name="e", targets=["q"], train_also=["norm"]),
        "eject": lambda: randlora.eject(model),
        "pool": lambda: inside(model, serving.AdapterPool(model, every, max_loaded=1).using(["a"] * len(TOKENS))),
        "load_all": lambda: (randlora.eject(model), randlora.load_all(model, every)),
        "remove": lambda: randlora.remove(model, "b"),
        "merge": lambda: randlora.merge(model),
    }


def described(result: Any) -> Any:
    if isinstance(result, Tensor):
        return bits(result)
    if isinstance(result, nn.Module):
        return all_bits(result.state_dict())
    if isinstance(result, Mapping):
        return {key: described(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [described(value) for value in result]
    if dataclasses.is_dataclass(result):
        return {field.name: described(getattr(result, field.name)) for field in dataclasses.fields(result)}
    return repr(result)


@contextmanager
def defaults(device: str | None, dtype: torch.dtype) -> Iterator[None]:
    if device:  # torch 2.9 and older fail to read a None that was set
        torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        with suppress(AttributeError):
            del torch._GLOBAL_DEVICE_CONTEXT.device_context


def told(at: Path, device: str | None, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Mixed().eval()
    for name in ("a", "b"):
        randlora.inject(model, r=4, name=name, targets=["q", "up", "down"], basis="block", dropout=0.1)
        fill(model, name, seed=ord(name))
    save_model(LLAMA, at / "base")
    for name, targets in (("adapter", [*LLAMA.targets]), ("q_proj", ["q_proj"]), ("up_proj", ["up_proj"])):
        save_adapter(LLAMA, at / name, stream="portable", targets=targets)
    found: dict[str, Any] = {}
    for verb, call in story(model, at).items():
        if device and verb == "load_model":
            with defaults(device, dtype), pytest.raises(CheckpointError, match="meta device context manager"):
                call()  # a rule of transformers
        with defaults(None if verb == "load_model" else device, dtype):
            result = described(call())
        found[verb] = result, all_bits(model.state_dict()), bits(model(TOKENS))
    found["files"] = contents(at)
    shutil.rmtree(at)
    return found


@pytest.mark.medium
def test_every_verb_does_the_same(tmp_path: Path) -> None:
    expected, found = (told(tmp_path / "at", *of) for of in ((None, torch.float32), ("meta", torch.float64)))
    assert [verb for verb in expected if found[verb] != expected[verb]] == []

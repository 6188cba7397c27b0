"""Every public verb does the same whatever device and dtype torch makes tensors on and of where none are given."""

import copy
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.bases import BasisBank, BasisSpec
from randlora.errors import CheckpointError
from tests.kit import all_bits, bits, fill
from tests.laws import TOKENS, Mixed
from tests.model_directories import contents, save_adapter, save_model
from tests.models import LLAMA
from tests.strategies import KINDS_AND_STREAMS


@dataclasses.dataclass(frozen=True)
class Place:
    """What a verb is called with: a model with adapters ``a``, which is active, and ``b``, and directories."""

    model: nn.Module
    saved: Path
    base: Path
    adapter: Path
    parts: tuple[Path, ...]
    out: Path


@pytest.fixture(scope="module")
def beforehand(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Make everything on the CPU, once."""
    at = tmp_path_factory.mktemp("default_device")
    torch.manual_seed(0)
    model = Mixed()
    for name in ("a", "b"):
        randlora.inject(model, r=4, name=name, targets=["q", "up", "down"], basis="block", dropout=0.1)
        fill(model, name, seed=ord(name))
    randlora.save_all(model, at / "saved")
    save_model(LLAMA, at / "base")
    parts = (save_adapter(LLAMA, at / name, targets=[name], stream="portable") for name in ("q_proj", "up_proj"))
    return Place(model.eval(), at / "saved", at / "base", save_adapter(LLAMA, at / "adapter"), (*parts,), at)


def output_inside(block: Callable[[nn.Module], Any]) -> Callable[[Place], Tensor]:
    def run(at: Place) -> Tensor:
        with block(at.model):
            output: Tensor = at.model(TOKENS)
        return output

    return run


def merged_for_good(at: Place) -> Any:
    randlora.remove(at.model, "b")
    return randlora.merge(at.model)


def pooled(at: Place) -> Tensor:
    randlora.eject(at.model)
    pool = randlora.serving.AdapterPool(at.model, at.saved, max_loaded=1)
    return output_inside(lambda _: pool.using(["a"] * len(TOKENS)))(at)


def drawn(_: Place) -> list[Any]:
    drawings = [BasisSpec(*each, 3, 4, 12, 8, (2, 2) if each[0] == "block" else None) for each in KINDS_AND_STREAMS]
    bank = BasisBank()
    return [bank.acquire(spec).slices(12, 8, device="cpu", dtype=torch.float32) for spec in drawings]


VERBS: dict[str, Callable[[Place], Any]] = {
    "bases.BasisBank": drawn,
    "serving.AdapterPool": pooled,
    "activate": lambda at: randlora.activate(at.model, {"a": 0.5, "b": 1.0}),
    "adapter_state": lambda at: randlora.adapter_state(at.model, "a", bases="stored"),
    "adapters": lambda at: randlora.adapters(at.model),
    "check": lambda at: randlora.check(at.model, TOKENS),
    "check_ranks": lambda at: randlora.check_ranks(at.model, values=True),
    "serving.combine": lambda at: randlora.serving.combine(at.model, {"a": 1.0}, name="c"),
    "delta_weight": lambda at: randlora.delta_weight(at.model, "up", name="a"),
    "disabled": output_inside(randlora.disabled),
    "eject": lambda at: randlora.eject(at.model),
    "equivalent_alpha": lambda _: randlora.equivalent_alpha(8, 16),
    "files.convert": lambda at: randlora.files.convert(at.adapter, at.out / "lora", to="lora", rank=12, tolerance=1.0),
    "files.inspect": lambda at: randlora.files.inspect(at.adapter, base=at.base),
    "files.join": lambda at: randlora.files.join(at.parts, at.out / "whole"),
    "files.merge": lambda at: randlora.files.merge(at.adapter, at.out / "merged", base=at.base),
    "files.plan": lambda at: randlora.files.plan(at.base, r=4),
    "files.training_memory": lambda at: randlora.files.training_memory(at.base, r=4, tokens=8),
    "files.verify": lambda at: randlora.files.verify(at.adapter, base=at.base),
    "find_targets": lambda at: [site.fqn for site in randlora.find_targets(at.model, "all-linear")],
    "inject": lambda at: randlora.inject(at.model, r=3, name="c", targets=["q"], train_also=["norm"]),
    "limit_norms": lambda at: randlora.limit_norms(at.model, 0.01, name="a"),
    "load": lambda at: randlora.load(at.model, at.saved / "b", name="c", trainable=True),
    "load_all": lambda at: (randlora.eject(at.model), randlora.load_all(at.model, at.saved)),
    "files.load_model": lambda at: randlora.files.load_model(at.adapter, base=at.base),
    "merge": merged_for_good,
    "merged": output_inside(randlora.merged),
    "merged_tensors": lambda at: dict(randlora.merged_tensors(at.model)),
    "plan": lambda at: randlora.plan(at.model, r=3, name="c"),
    "prepare_quantized": lambda at: randlora.prepare_quantized(at.model),
    "remove": lambda at: randlora.remove(at.model, "a"),
    "rename": lambda at: randlora.rename(at.model, "a", "c"),
    "serving.routed": output_inside(
        lambda model: randlora.serving.routed(model, ["a", "b", None] * (len(TOKENS) // 3))
    ),
    "save": lambda at: randlora.save(at.model, at.out / "a", name="a", bases="stored"),
    "save_all": lambda at: randlora.save_all(at.model, at.out / "all"),
    "files.save_merged": lambda at: randlora.files.save_merged(at.model, at.out / "merged"),
    "set_compute": lambda at: randlora.set_compute(at.model, "materialized"),
    "set_trainable": lambda at: randlora.set_trainable(at.model, "b"),
    "swap": lambda at: randlora.swap(at.model, at.saved / "b", name="a"),
    "trainable_parameters": lambda at: torch.autograd.grad(
        at.model(TOKENS).square().sum(), list(randlora.trainable_parameters(at.model))
    ),
    "training_memory": lambda at: randlora.training_memory(at.model, r=3, tokens=8),
    "unmerge": lambda at: (randlora.merge(at.model, reversible=True), randlora.unmerge(at.model)),
    "update_norms": lambda at: randlora.update_norms(at.model, name="b"),
}
"""A call of each: where it matters one of the kind that makes most tensors."""

MAKE_NO_TENSORS = {"RandLoRAConfig", "files.Progress"}


def described(result: Any) -> Any:
    """Return a result in a form that can be compared bit for bit."""
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
def other_defaults(device: str | None = "meta") -> Iterator[None]:
    torch.set_default_device(device)
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        with suppress(AttributeError):
            del torch._GLOBAL_DEVICE_CONTEXT.device_context  # torch 2.9 and older fail to read the None that is there


def done(verb: str, beforehand: Place, out: Path, defaults: Callable[[], Any]) -> tuple[Any, ...]:
    """Call a verb on a copy of the model; return the result, the model, its output and the files written."""
    at = dataclasses.replace(beforehand, model=copy.deepcopy(beforehand.model), out=out)
    out.mkdir()
    try:
        with defaults():
            result = described(VERBS[verb](at))
        return result, all_bits(at.model.state_dict()), bits(at.model(TOKENS)), contents(out)
    finally:
        shutil.rmtree(out)


def test_the_table_has_every_public_name() -> None:
    named = {name for name in randlora.__all__ if not isinstance(getattr(randlora, name), ModuleType)}
    named |= {f"{space}.{name}" for space in ("files", "serving") for name in getattr(randlora, space).__all__}
    assert named | {"bases.BasisBank"} == VERBS.keys() | MAKE_NO_TENSORS


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_does_the_same(verb: str, beforehand: Place, tmp_path: Path) -> None:
    defaults: Callable[[], Any] = other_defaults
    expected = done(verb, beforehand, tmp_path / "out", nullcontext)
    if verb == "files.load_model":
        with pytest.raises(CheckpointError, match="meta device context manager"):  # a rule of transformers
            done(verb, beforehand, tmp_path / "out", other_defaults)
        defaults = partial(other_defaults, None)
    assert done(verb, beforehand, tmp_path / "out", defaults) == expected

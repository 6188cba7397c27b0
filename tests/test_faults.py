"""A change of a model that fails in the middle, at whatever call, leaves the model as it was."""

import concurrent.futures
import contextlib
import gc
import queue
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import thread
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora.model import view
from randlora.targets.census import Census
from tests.kit import assert_unchanged, fill, snapshot

GUARD = view.unchanged_if_raised.__wrapped__.__code__  # type: ignore[attr-defined]  # of the generator itself
LOCKS = type(threading.Lock()), type(threading.RLock())
SPARED = contextlib, queue, threading, weakref, concurrent.futures._base, thread
FILES = tuple(str(module.__file__) for module in SPARED)


class Fault(BaseException):
    """Raised at the k-th call."""


class Faults:
    """Counts calls while a model is being changed, and raises at the k-th; with ``k=None``, at none.

    Not in `contextlib`, for what is raised there is raised before or after the change, nor where locks are taken and
    released, which would then be taken for ever, nor in callbacks of weak references, where Python drops it.
    """

    def __init__(self, k: int | None = None) -> None:
        self.k, self.calls, self.is_open = k, 0, False

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        if frame.f_code is GUARD:
            self.is_open = event == "return" and self.calls == 0  # as it yields to the block, until it goes on
            return
        files = [each.f_code.co_filename for each in (frame, frame.f_back) if each is not None]
        if not self.is_open or event not in ("call", "c_call") or any(file.startswith(FILES) for file in files):
            return
        if not isinstance(getattr(arg, "__self__", None), LOCKS):
            self.calls += 1
            if self.calls == self.k:
                raise Fault(f"at call {self.k}, of {frame.f_code.co_qualname}")


def under(faults: Faults, verb: Callable[[], Any]) -> BaseException | None:
    gc.disable()  # a collection calls finalizers at any time
    before = sys.getprofile()
    sys.setprofile(faults)
    try:
        verb()
    except BaseException as error:
        return error
    else:
        return None
    finally:
        sys.setprofile(before)
        gc.enable()


INJECT: dict[str, Any] = {"r": 3, "active": True, "train_also": ["norm", "1.bias"], "targets": ["0"]}
VERBS: dict[str, Callable[[nn.Module, Path], object]] = {
    "inject": lambda model, _: randlora.inject(model, name="c", **INJECT),
    "load": lambda model, saved: randlora.load(model, saved, name="c", active=True),
    "eject": lambda model, _: randlora.eject(model),
    "remove": lambda model, _: randlora.remove(model, "b"),
    "activate": lambda model, _: randlora.activate(model, {"b": 0.5}),
    "set_trainable": lambda model, _: randlora.set_trainable(model, "b"),
    "disabled": lambda model, _: randlora.disabled(model).__enter__(),
    "merge": lambda model, _: randlora.merge(model),
    "merge reversibly": lambda model, _: randlora.merge(model, reversible=True),
    "prepare": lambda model, _: randlora.prepare_quantized(model, checkpointing=False),
    "unmerge merged": lambda model, _: randlora.unmerge(model),
    "eject merged": lambda model, _: randlora.eject(model),
}


def adapted(*, merged: bool = False) -> nn.Module:
    """Return a model with two adapters, one of which trains a norm beside it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 4, bias=False))
    model.add_module("norm", nn.LayerNorm(4, dtype=torch.bfloat16))
    model.get_submodule("2").requires_grad_(False)
    randlora.inject(model, r=4, targets=["0", "1"], name="a", train_also=["norm"])
    randlora.inject(model, r=2, targets=["1", "2"], name="b", stream="portable", active=True)
    randlora.activate(model, ["a", "b"])
    fill(fill(model, "a"), "b")
    if merged:
        randlora.merge(model, reversible=True)
    return model


def positions(model: nn.Module) -> list[dict[str, int | None]]:
    layers = (site.layer for site in Census.of(model).adapted)
    return [{name: part.position for name, part in layer.adapters.items()} for layer in layers]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("saved")
    randlora.save(adapted(), path, name="a")
    return path


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a fault in a finalizer, see below
@pytest.mark.parametrize("name", VERBS)
@settings(max_examples=4)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_change_that_fails_at_any_call_is_undone(saved: Path, name: str, share: float) -> None:
    verb, merged = VERBS[name], name.endswith("merged")
    verb(adapted(merged=merged), saved)  # what is done once in a process
    counted, twin, model = Faults(), adapted(merged=merged), adapted(merged=merged)
    assert under(counted, lambda: verb(twin, saved)) is None
    assert counted.calls > 20, "nothing would be undone"
    before, places = snapshot(model), positions(model)
    error = under(Faults(1 + int(share * counted.calls)), lambda: verb(model, saved))
    if error is None:  # Python drops what is raised in a finalizer
        return
    assert isinstance(error, Fault), "it is raised, whatever else goes wrong"
    assert_unchanged(model, before)
    assert positions(model) == places, "which compiled code would read"
    verb(model, saved)

"""A change of a model that fails in the middle, at whatever call, leaves the model as it was."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import randlora
from tests.faults import Fault, Faults, under
from tests.kit import assert_unchanged, fill, snapshot

Verb = Callable[[nn.Module], object]

VERBS: dict[str, Verb] = {
    "inject": lambda model: randlora.inject(
        model, r=3, name="c", active=True, train_also=["norm", "1.bias"], targets=["0"]
    ),
    "eject": randlora.eject,
    "remove": lambda model: randlora.remove(model, "b"),
    "activate": lambda model: randlora.activate(model, {"b": 0.5}),
    "set_trainable": lambda model: randlora.set_trainable(model, "b"),
    "disabled": lambda model: randlora.disabled(model).__enter__(),
    "merge": randlora.merge,
    "merge reversibly": lambda model: randlora.merge(model, reversible=True),
    "prepare": lambda model: randlora.prepare_quantized(model, checkpointing=False),
}
AFTER_MERGING: dict[str, Verb] = {"unmerge": randlora.unmerge, "eject merged": randlora.eject}


def adapted(*, merged: bool) -> nn.Module:
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an adapter of the model that trains a norm beside it."""
    path: Path = tmp_path_factory.mktemp("saved")
    randlora.save(adapted(merged=False), path, name="a")
    return path


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a fault in a finalizer, see below
@settings(max_examples=30)
@given(name=st.sampled_from([*VERBS, *AFTER_MERGING, "load"]), share=st.floats(0, 1, exclude_max=True))
def test_a_change_that_fails_at_any_call_is_undone(saved: Path, name: str, share: float) -> None:
    verbs: dict[str, Verb] = {
        **VERBS,
        **AFTER_MERGING,
        "load": lambda model: randlora.load(model, saved, name="c", active=True),
    }
    verb, merged = verbs[name], name in AFTER_MERGING
    verb(adapted(merged=merged))  # what is done once in a process
    counted, twin, model = Faults(), adapted(merged=merged), adapted(merged=merged)
    assert under(counted, lambda: verb(twin)) is None
    before = snapshot(model)
    error = under(Faults(1 + int(share * counted.calls)), lambda: verb(model))
    if error is None:  # Python drops what is raised in a finalizer
        return
    assert isinstance(error, Fault), "it is raised, whatever else goes wrong"
    assert_unchanged(model, before)
    verb(model)

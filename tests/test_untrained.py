"""An adapter that nothing has trained is spoken of when it is saved or merged."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import randlora
from tests.laws import TOKENS, Mixed

NOTE = "is exactly zero in all layers"


def step(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Take a step as a user does, of what requires grad when the optimizer is made."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(TOKENS).square().mean().backward()
        optimizer.step()


def notes(model: nn.Module, directory: Path) -> tuple[bool, bool]:
    """Return whether `save` and `merge` have the note."""
    saved, merged = randlora.save(model, directory).notes, randlora.merge(model, reversible=True).notes
    randlora.unmerge(model)
    return any(NOTE in note for note in saved), any(NOTE in note for note in merged)


@pytest.mark.parametrize("init", ["lambda", "gamma"])
@pytest.mark.parametrize("also", [None, ["head"]], ids=["alone", "with-head"])
def test_an_optimizer_made_before_inject_trains_nothing(
    init: Literal["lambda", "gamma"], also: list[str] | None, tmp_path: Path
) -> None:
    model = Mixed()
    too_early = list(model.parameters())
    randlora.inject(model, r=4, init=init, train_also=also)
    step(model, too_early)
    assert notes(model, tmp_path) == (True, True)
    (note,) = (note for note in randlora.save(model, tmp_path).notes if NOTE in note)
    assert "made before inject" in note
    assert ("train_also" in note) == (also is not None)
    step(model, randlora.trainable_parameters(model))
    assert notes(model, tmp_path) == (False, False)


def test_one_weight_that_moved_is_enough(tmp_path: Path) -> None:
    for move in ("Λ", "head"):
        model = Mixed()
        randlora.inject(model, r=4, train_also=["head"])
        with torch.no_grad():
            moved: Tensor = model.head.bias if move == "head" else randlora.trainable_parameters(model)[0]
            moved.view(-1)[-1] += 1e-6
        assert notes(model, tmp_path) == (False, False), move


def test_each_of_several_adapters_is_named(tmp_path: Path) -> None:
    model = Mixed()
    for name in ("a", "b", "c"):
        randlora.inject(model, r=4, name=name, targets=["q"])
    randlora.activate(model, ["b"])
    randlora.set_trainable(model, ["b"])
    step(model, randlora.trainable_parameters(model))
    randlora.activate(model, ["a", "b", "c"])
    merged = [note for note in randlora.merge(model, reversible=True).notes if NOTE in note]
    assert [("'a'" in note, "'c'" in note) for note in merged] == [(True, False), (False, True)]
    saved = randlora.save_all(model, tmp_path)
    assert [any(NOTE in note for note in report.notes) for report in saved] == [True, False, True]

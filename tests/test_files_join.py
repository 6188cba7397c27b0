"""`files.join`: the adapters of parts of a model are, together, the adapter that the whole model would have saved."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora.checkpoint.read import read_adapter
from randlora.errors import CheckpointError

WIDTHS = (6, 10, 6, 14, 8)


class Model(nn.Module):
    """Layers by name, so that a stage of them keeps their names, with a head in the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({
            str(index): nn.ModuleDict({"q": nn.Linear(*pair), "v": nn.Linear(pair[0], 3)})
            for index, pair in enumerate(pairwise(WIDTHS))
        })
        self.head = nn.Linear(WIDTHS[-1], 3)


def stages(model: Model, cuts: list[int]) -> list[Model]:
    """Return copies of a model of which each has the layers up to the next cut, and the last one the head."""
    bounds = [0, *cuts, len(model.layers)]
    parts = []
    for start, end in pairwise(bounds):
        parts.append(copy.deepcopy(model))
        for index in {*range(len(model.layers))} - {*range(start, end)}:
            del parts[-1].layers[str(index)]
        if end < len(model.layers):
            del parts[-1].head
    return parts


def save_all(models: list[Model], root: Path, **options: Any) -> list[Path]:
    """Adapt models, fill the adapters by name, save them, and return where."""
    options = dict[str, Any](r=2, targets=["q", "v"], stream="portable") | options
    for index, model in enumerate(models):
        has_head = hasattr(model, "head")
        randlora.inject(model, train_also=["head"] if has_head else None, **options)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(sum(name.encode()))
                parameter.data = torch.randn(parameter.shape, generator=generator)
        randlora.save(model, root / str(index))
    return [root / str(index) for index in range(len(models))]


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "README.md"}


@settings(max_examples=12, deadline=None)
@given(
    cuts=st.sets(st.integers(1, 3), min_size=1),
    options=st.sampled_from([
        {},
        {"basis": "sparse"},
        {"r": 4, "basis": "block", "blocks": (2, 2)},
        {"r": {"v": 4, ".*": 2}},
        {"alpha": {"q": 3.0, ".*": 5.0}, "dropout": 0.1},
    ]),
)
def test_joined_parts_are_the_files_of_the_whole(
    cuts: set[int], options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("join")
    torch.manual_seed(0)
    model = Model()
    parts = save_all(stages(model, sorted(cuts)), root / "parts", **options)
    (whole,) = save_all([model], root / "whole", **options)
    report = randlora.files.join(parts, root / "joined")
    assert files_of(root / "joined") == files_of(whole)
    assert report.layers == 8
    assert f"8 layers of {len(parts)} parts" in str(report)
    randlora.load(Model(), root / "joined")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stream": "torch"}, "of which no model has both at once: train the parts with stream='portable'"),
        ({"seed": 1}, "seed is 0 in "),
        ({"dropout": 0.5}, "dropout is 0.0 in "),
        ({"basis": "sparse"}, "basis is 'dense' in "),
        ({"targets": ["q"]}, "both have layers.1.q"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_parts_of_different_adapters_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    first, second = stages(Model(), [2])
    common = {"stream": options["stream"]} if "stream" in options else {}
    if "targets" in options:
        second = Model()
        options = {"targets": r"layers\.[1-3]\.q"}
    parts = [*save_all([first], tmp_path / "a", **common), *save_all([second], tmp_path / "b", **options)]
    with pytest.raises(CheckpointError, match="cannot join") as caught:
        randlora.files.join(parts, tmp_path / "joined")
    assert said in str(caught.value)
    assert not (tmp_path / "joined").exists()


@pytest.mark.parametrize("alphas", [(None, 3.0), (5.0, 3.0), (3.0, {"q": 3.0, ".*": 5.0})], ids=str)
def test_each_layer_keeps_its_alpha(alphas: tuple[Any, ...], tmp_path: Path) -> None:
    parts = stages(Model(), [1])
    directories = [
        *save_all(parts[:1], tmp_path / "a", alpha=alphas[0]),
        *save_all(parts[1:], tmp_path / "b", alpha=alphas[1]),
    ]
    randlora.files.join(directories, tmp_path / "joined")
    own = {fqn: option for directory in directories for fqn, option in read_adapter(directory).options.items()}
    assert len({option.alpha for option in own.values()}) == 2
    assert read_adapter(tmp_path / "joined").options == own


def test_what_two_parts_train_must_be_one(tmp_path: Path) -> None:
    parts = stages(Model(), [2])
    parts[0].head = copy.deepcopy(parts[1].head)
    directories = save_all(parts, tmp_path)
    randlora.files.join(directories, tmp_path / "joined")
    parts[0].head.bias.data.add_(1)
    randlora.save(parts[0], directories[0])
    with pytest.raises(CheckpointError, match=r"head\.bias has other values in .*0 than in .*1"):
        randlora.files.join(directories, tmp_path / "joined", overwrite=True)


def test_what_a_directory_holds_is_not_replaced_unless_asked_for(tmp_path: Path) -> None:
    parts = save_all(stages(Model(), [2]), tmp_path)
    for out, said in ((parts[0], "or inside it, an input that must not change"), (tmp_path, "exists and is not empty")):
        with pytest.raises(CheckpointError, match=said):
            randlora.files.join(parts, out)
    with pytest.raises(CheckpointError, match="expected two or more parts, got 1"):
        randlora.files.join(parts[:1], tmp_path / "joined")
    randlora.files.join(parts, tmp_path / "joined")
    before = files_of(tmp_path / "joined")
    randlora.files.join(parts, tmp_path / "joined", overwrite=True)
    assert files_of(tmp_path / "joined") == before

"""A sharded model that is built without memory, and one whose run is resumed by another number of processes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

import randlora
from randlora.config import Init
from randlora.errors import AdapterError
from randlora.layers.diagonals import Diagonal
from tests.distributed.processes import Processes
from tests.distributed.test_fsdp_at_rest import Two
from tests.distributed.test_fsdp_training import TOKENS, Case, require_alike, share_of, train_alike, values
from tests.distributed.trained import distance

TRAINED = StateDictOptions(ignore_frozen_params=True)


def build_on_meta(is_sharded_first: bool, init: Init) -> None:
    case = Case()
    base = case.base()
    one = case.base()
    options: dict[str, Any] = {"init": init, "alpha": 3 if init == "gamma" else None}
    options |= {"r": 3, "targets": ["q", "up", "down", "embed"]}
    randlora.inject(one, **options)
    with torch.device("meta"):
        model = Two()
    if is_sharded_first:
        case.shard(model)
    randlora.inject(model, **options)
    if not is_sharded_first:
        case.shard(model)
    model.to_empty(device="cpu")
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    loaded = set_model_state_dict(model, base.state_dict() if dist.get_rank() == 0 else {}, options=whole)
    assert not loaded.unexpected_keys
    assert all("randlora" in key for key in loaded.missing_keys)
    for module in model.modules():
        if isinstance(module, Diagonal):
            module.reset_parameters()  # type: ignore[operator]  # of both kinds of `Diagonal`
    require_alike(one, model, within=0)
    train_alike(one, model)


@pytest.mark.parametrize(("is_sharded_first", "init"), [(False, "gamma"), (True, "lambda")])
def test_a_model_built_on_meta_trains_as_one_that_was_not(pair: Processes, is_sharded_first: bool, init: Init) -> None:
    pair.run(build_on_meta, is_sharded_first, init)


def follow_the_docs() -> None:
    page = Path(__file__).parents[2] / "docs" / "distributed.md"
    (block,) = re.findall(r"```python[^\n]*\n([^`]*to_empty[^`]*)```", page.read_text(encoding="utf-8"))
    base, rank = layers(), dist.get_rank()
    names: dict[str, Any] = {"torch": torch, "randlora": randlora, "fully_shard": fully_shard, "build": layers}
    names |= {"device": "cpu", "rank": rank, "base_weights": base.state_dict()}
    exec(block, names)
    randlora.inject(base, r=32)
    require_alike(base, names["model"], within=0)
    x = torch.randn(2, 8)
    torch.testing.assert_close(names["model"](x), base(x))


class Rotary(nn.Module):
    """Has values that no state dict has, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.arange(8.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.get_buffer("inv_freq").cos()


def layers() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 8), Rotary(), nn.LayerNorm(8), nn.Linear(8, 8))


def test_values_that_no_state_dict_has_are_missed_when_a_model_is_built_on_meta() -> None:
    with torch.device("meta"):
        model = layers()
    report = randlora.inject(model)
    assert "1.inv_freq" in next(note for note in report.notes if "to_empty" in note)
    with init_empty_weights():
        model = layers()
    assert not any("to_empty" in note for note in randlora.inject(model).notes)


def test_what_the_docs_do_on_meta_is_enough(pair: Processes) -> None:
    pair.run(follow_the_docs)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(randlora.trainable_parameters(model), lr=0.02, momentum=0.9)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    for _ in range(2):
        model(tokens).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def train_and_save(case: Case, directory: Path) -> dict[str, Tensor]:
    """Train, save, train on; return the values of the adapter."""
    model = case.models()[1]
    optimizer = momentum(model)
    steps(model, optimizer, share_of(TOKENS))
    state, moments = get_state_dict(model, optimizer, options=TRAINED)
    assert state
    assert all("randlora" in key or "norm" in key for key in state), "only what is trained"
    state_dict_saver.save({"model": state, "optimizer": moments}, checkpoint_id=directory)
    steps(model, optimizer, share_of(TOKENS))
    return {name: value.clone() for name, value in values(model).items()}


def resumed(model: nn.Module, directory: Path, tokens: Tensor, *, is_alone: bool = False) -> None:
    optimizer = momentum(model)
    state, moments = get_state_dict(model, optimizer, options=TRAINED)
    state_dict_loader.load({"model": state, "optimizer": moments}, checkpoint_id=directory, no_dist=is_alone)
    partly = StateDictOptions(strict=False, ignore_frozen_params=True)
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=moments, options=partly)
    steps(model, optimizer, tokens)


def resume(case: Case, directory: Path, expected: dict[str, Tensor]) -> None:
    model = case.models()[1]
    resumed(model, directory, share_of(TOKENS))
    assert distance(values(model), expected) <= 1e-6


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as it is meant
@pytest.mark.parametrize("is_sharded_first", [False, True])
def test_another_number_of_processes_resumes(
    pair: Processes, four: Processes, tmp_path: Path, is_sharded_first: bool
) -> None:
    case = Case(is_sharded_first=is_sharded_first, train_also=() if is_sharded_first else ("norm",))
    expected = pair.run(train_and_save, case, tmp_path / "run")[0]
    four.run(resume, case, tmp_path / "run", expected)
    alone = case.adapt(case.base())
    resumed(alone, tmp_path / "run", TOKENS, is_alone=True)
    assert distance(dict(alone.named_parameters()), expected) <= 1e-6


def without_private_names() -> None:
    """A torch that renames what tells of all sharded modules must not lead to processes that differ silently."""
    composable = vars(torch.distributed)["_composable_state"]
    mapping = composable._module_state_mapping
    model, plain, adapted = Case().shard(Case().base()), Case().base(), Case().models()[1]
    del composable._module_state_mapping
    try:
        with pytest.raises(AdapterError, match="does not tell which modules fully_shard was called on"):
            Case().adapt(model)
        assert not randlora.state.is_adapted(model)
        Case().adapt(plain)
        with pytest.raises(AdapterError, match="use a different version of torch"):
            randlora.merge(adapted)
    finally:
        composable._module_state_mapping = mapping
    Case().adapt(model)


def test_names_that_torch_could_change_are_missed_loudly(pair: Processes) -> None:
    pair.run(without_private_names)

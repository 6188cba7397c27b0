"""What else `fully_shard` does: second adapters, other objects and dtypes, checkpoints, models without memory."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import randlora
from randlora.errors import AdapterError
from randlora.layers.diagonals import Diagonal
from tests.checkpoint_files import CONFIG_FILE, TENSORS_FILE
from tests.distributed.engines import ENGINES, sharded, trained
from tests.distributed.processes import FOUR, PAIR, in_two
from tests.distributed.trained import Block, Drawn, distance, filled, optimizer_of, reshard, trained_alone, values
from tests.pages import DOCS

DRAWN, ALSO = Drawn(), Drawn(train_also=("norm", "head"))
WHOLE = StateDictOptions(full_state_dict=True)
each_order = pytest.mark.parametrize("engine", ["FSDP2", "FSDP2 first"])


def require_alike(one: nn.Module, model: nn.Module, within: float = 1e-6) -> None:
    apart = distance(values(model), values(one))
    assert apart <= within, apart


def train_alike(one: nn.Module, model: nn.Module, within: float = 1e-6) -> None:
    reshard(model)  # the outermost module may hold whole parameters, after a forward without a backward
    trained_alone(one, DRAWN, range(dist.get_world_size()))
    trained(model, DRAWN, dist.get_rank())
    require_alike(one, model, within)


@torch.no_grad()
def outputs_alike(one: nn.Module, model: nn.Module) -> None:
    torch.testing.assert_close(model(*DRAWN.batch(0, 9)), one(*DRAWN.batch(0, 9)))


@in_two
@each_order
def test_what_is_trained_beside_is_exchanged_by_values_and_a_second_adapter_trains(engine: str) -> None:
    one, model = ALSO.adapted(), ENGINES[engine].make(ALSO)
    train_alike(one, model)
    with randlora.disabled(model):
        assert torch.equal(values(model)["blocks.0.norm.weight"], torch.ones(12))
    with pytest.raises(AdapterError, match="which is sharded, so only one adapter can train it"):
        randlora.inject(model, r=2, targets=["up"], train_also=["norm"], name="second")
    for name in ("second", "default"):
        for each in (one, model):
            if name == "second":
                DRAWN.adapt(each, name)
            randlora.activate(each, name)
            randlora.set_trainable(each, name)
        outputs_alike(one, model)
        train_alike(one, model)
    randlora.eject(model)
    require_alike(ALSO.build(), model, within=0)


@in_two
def test_other_parameter_objects_are_averaged_also_if_a_part_is_called() -> None:
    one, model = DRAWN.adapted(), ENGINES["FSDP2 first"].make(DRAWN)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if isinstance(module, nn.ParameterDict) and parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().clone())
    inputs, one, model = torch.randn(2, 3, 2, 12), one.blocks[0], model.blocks[0]
    model(inputs[dist.get_rank()]).pow(3).mean().backward()  # squares of what a norm gives are constant
    torch.stack([one(x).pow(3).mean() for x in inputs]).mean().backward()
    for own, expected in zip(model.parameters(), one.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(own.grad, expected.grad)


def _again(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    output: Tensor = checkpoint(run, x, use_reentrant=True)
    return output


BLOCKWISE: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "kept": lambda run, x: run(x),
    "not reentrant": lambda run, x: checkpoint(run, x, use_reentrant=False),
    "reentrant": _again,
    "one inside another": lambda run, x: _again(partial(_again, run), x),
}


class Deep(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.last, self.way = nn.Linear(8, 8), nn.Linear(8, 8), way
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = BLOCKWISE[self.way](block, x).tanh()
        output: Tensor = self.last(x)
        return output


@in_two
@pytest.mark.parametrize("targets", [r"blocks\.\d", "all-linear"])
@pytest.mark.parametrize("way", BLOCKWISE)
def test_gradients_are_averaged_once_at_the_end_of_the_outermost_backward(way: str, targets: str) -> None:
    """Of each backward that accumulates, of two outputs together, and after one that failed in its midst.

    `torch.autograd.grad`, which accumulates nothing, averages nothing.
    """
    one, rank = Deep(way), dist.get_rank()
    model: Any = sharded(copy.deepcopy(one), parts=[f"blocks.{index}" for index in range(3)])
    for each in (model, one):
        randlora.inject(each, r=2, targets=targets)
        filled(each)
    rows = torch.randn(2, 3, 8, requires_grad=True)  # else reentrant checkpointing has nothing to train

    def loss(each: nn.Module, *ranks: int) -> Tensor:
        return torch.stack([each(rows[rank]).pow(3).sum() for rank in ranks]).mean()

    def averages(backward: Callable[[], object]) -> int:
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as collective:
            backward()
        return collective.call_count

    def fail(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(mock.Mock(side_effect=ZeroDivisionError))

    if way in ("kept", "not reentrant"):  # torch refuses it otherwise
        own = loss(model, rank)
        assert averages(lambda: torch.autograd.grad(own, randlora.trainable_parameters(model))) == 0
    failing = model.blocks[1].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        loss(model, rank).backward()
    failing.remove()
    model.zero_grad()
    for _ in range(2):
        assert averages(loss(model, rank).backward) == 1
        loss(one, 0, 1).backward()
    assert averages((loss(model, rank) + 2 * loss(model, rank)).backward) == 1
    (3 * loss(one, 0, 1)).backward()
    for found, expected in zip(randlora.trainable_parameters(model), randlora.trainable_parameters(one), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


@in_two
def test_diagonals_stay_float32_where_the_model_computes_in_bfloat16() -> None:
    one = DRAWN.adapted()
    model = DRAWN.adapt(sharded(DRAWN.build(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)))
    train_alike(one, model, within=2e-2)
    assert {value.dtype for value in values(model).values()} == {torch.float32}


@in_two
@pytest.mark.parametrize(("end", "engine"), [(randlora.eject, "FSDP2"), (randlora.merge, "FSDP2 first")])
def test_what_had_an_adapter_is_used_and_adapted_again(
    end: Callable[[nn.Module], Any], engine: str, tmp_path: Path
) -> None:
    case = Drawn(train_also=("norm",))
    one, model = case.adapted(), ENGINES[engine].make(case)
    for each in (one, model):
        end(each)
    assert list(model.state_dict()) == list(one.state_dict())
    assert all(isinstance(value, DTensor) for value in model.state_dict().values())
    outputs_alike(one, model)
    require_alike(one, model)
    assert list(get_model_state_dict(model, options=WHOLE)) == list(one.state_dict())
    set_model_state_dict(model, one.state_dict(), options=WHOLE)
    assert all(parameter.requires_grad for parameter in model.parameters())
    plain = {name: value.clone() for name, value in one.state_dict().items()}
    for each in (one, model):
        case.adapt(each)
    train_alike(one, model)
    randlora.save(model, tmp_path / "adapter")
    dist.barrier()
    loaded = sharded(case.build())
    set_model_state_dict(loaded, plain, options=WHOLE)
    randlora.load(loaded, tmp_path / "adapter", trainable=True)
    require_alike(one, loaded)
    train_alike(one, loaded)


@in_two
@pytest.mark.parametrize(("is_first", "alpha"), [(False, 3), (True, None)])
def test_a_model_built_on_meta_trains_as_one_that_was_not(is_first: bool, alpha: float | None) -> None:
    base, one = DRAWN.build(), DRAWN.build()
    options: dict[str, Any] = {"init": "gamma" if alpha else "lambda", "alpha": alpha}
    options |= {"r": 3, "targets": list(DRAWN.targets)}
    randlora.inject(one, **options)
    with torch.device("meta"):
        model = DRAWN.build()
    for adapts in (not is_first, is_first):
        randlora.inject(model, **options) if adapts else sharded(model)
    model.to_empty(device="cpu")
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    found = set_model_state_dict(model, base.state_dict() if dist.get_rank() == 0 else {}, options=whole)
    assert not found.unexpected_keys
    assert all("randlora" in key for key in found.missing_keys)
    for module in model.modules():
        if isinstance(module, Diagonal):
            module.reset_parameters()  # of both kinds of `Diagonal`
    require_alike(one, model, within=0)
    train_alike(one, model)


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.arange(8.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.get_buffer("inv_freq").cos()


def layers() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 8), Rotary(), nn.LayerNorm(8), nn.Linear(8, 8))


@in_two
def test_what_the_docs_do_on_meta_is_enough() -> None:
    (block,) = re.findall(r"```python[^\n]*\n([^`]*to_empty[^`]*)```", (DOCS / "distributed.md").read_text("utf-8"))
    base = layers()
    names: dict[str, Any] = {"torch": torch, "randlora": randlora, "fully_shard": fully_shard, "build": layers}
    names |= {"device": "cpu", "rank": dist.get_rank(), "base_weights": base.state_dict()}
    exec(block, names)
    randlora.inject(base, r=32)
    require_alike(base, names["model"], within=0)
    x = torch.randn(2, 8)
    torch.testing.assert_close(names["model"](x), base(x))


TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state, moments = get_state_dict(model, optimizer, options=TRAINED)
    assert state
    assert all("randlora" in key or "norm" in key for key in state), "only what is trained"
    return {"model_state_dict": state, "optim_state_dict": moments}


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, case: Drawn, ranks: Any, first: int) -> None:
    for step in range(first, first + 2):
        torch.stack([case.loss(model(*case.batch(rank, step)), rank) for rank in ranks]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def train_and_save(engine: str, case: Drawn, directory: Path) -> dict[str, Tensor]:
    model = ENGINES[engine].make(case)
    optimizer = optimizer_of(model)
    own = [dist.get_rank() * 2, dist.get_rank() * 2 + 1]
    steps(model, optimizer, case, own, 0)
    state_dict_saver.save(states(model, optimizer), checkpoint_id=directory)
    steps(model, optimizer, case, own, 2)
    return values(model)


def resume(engine: str, case: Drawn, directory: Path, expected: dict[str, Tensor]) -> None:
    model = ENGINES[engine].make(case) if engine else case.adapted()
    optimizer = optimizer_of(model)
    found = states(model, optimizer)
    state_dict_loader.load(found, checkpoint_id=directory, no_dist=not engine)
    set_state_dict(model, optimizer, options=TRAINED, **found)
    steps(model, optimizer, case, [dist.get_rank()] if engine else range(4), 2)
    assert distance(values(model), expected) <= 1e-6


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as it is meant
@each_order
def test_another_number_of_processes_resumes(engine: str, tmp_path: Path) -> None:
    case = Drawn(train_also=("norm",) if engine == "FSDP2" else ())
    expected = PAIR.run(train_and_save, engine, case, tmp_path)[0]
    FOUR.run(resume, engine, case, tmp_path, expected)
    resume("", case, tmp_path, expected)


WRAPPED = {"blocks": Block, "targets": nn.Linear | nn.LayerNorm, "later": Block}


@in_two
@pytest.mark.parametrize("way", ["reentrant", *WRAPPED])
def test_checkpointing_changes_no_training_and_no_name(way: str, tmp_path: Path) -> None:
    case = Drawn(train_also=("norm",), checkpointed=way == "reentrant")
    one = case.adapted()
    trained_alone(one, case, range(2))

    def wrapped(model: Any) -> Any:
        if way in WRAPPED:
            apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, WRAPPED[way]))
        model.is_reentrant = way == "reentrant"
        return model

    orders: list[list[Callable[[Any], Any]]] = [[case.adapt, sharded], [sharded, case.adapt]]
    for order, steps in enumerate(orders):
        model = case.build()
        for step in [*steps, wrapped] if way == "later" else [wrapped, *steps]:
            model = step(model)
        trained(model, case, dist.get_rank())
        found = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in values(model).items()}
        assert distance(found, values(one)) <= 1e-6
        randlora.save(model, place := tmp_path / str(order))
        assert not any("_checkpoint" in name for name in load_file(place / TENSORS_FILE))
        assert "_checkpoint" not in (place / CONFIG_FILE).read_text()
        loaded = case.build()
        randlora.load(loaded, place)
        assert distance(found, values(loaded)) == 0

"""DeepSpeed's ZeRO: training as in one process, and adapters saved, merged and switched while they are spread."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import randlora
from randlora.errors import AdapterError, CheckpointError
from randlora.model import merge, mergeable
from randlora.sharded import places
from randlora.sharded.places import Spread
from tests.distributed.engines import (
    config,
    deepspeed,
    engine_around,
    engine_of,
    needs_deepspeed,
    trained,
    whole_values,
)
from tests.distributed.processes import LAW, Processes
from tests.distributed.test_fsdp_faults import failing_in_last
from tests.distributed.trained import (
    Drawn,
    distance,
    drawn_models,
    mean_over_ranks,
    require_equal_on_ranks,
    trained_alone,
    values_of,
)

pytestmark = needs_deepspeed

DRAWN = Drawn((12, 12, 8, 12), 4, "dense", 2.0, ("norms",))
HALF: dict[str, dict[str, Any]] = {"bf16": {}, "fp16": {"loss_scale": 128}}  # else the first steps look for a scale


def train(drawn: Drawn, stage: str, *, is_spread_first: bool) -> tuple[float, float]:
    """Train; return how far the losses and the values are from those of one process."""
    engine = engine_of(drawn, stage, is_spread_first=is_spread_first)
    losses = [mean_over_ranks(trained(engine, drawn, dist.get_rank(), step)) for step in range(drawn.steps)]
    values = whole_values(engine.module)
    require_equal_on_ranks(values)
    expected_losses, expected = trained_alone(drawn)
    return max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True)), distance(values, expected)


@LAW
@given(
    drawn=drawn_models(), stage=st.sampled_from(["2", "3", "3-persistent", "3-offload"]), is_spread_first=st.booleans()
)
def test_training_equals_that_of_one_process(
    zero_pair: Processes, drawn: Drawn, stage: str, *, is_spread_first: bool
) -> None:
    is_spread_first &= stage != "2"
    for loss, value in zero_pair.run(train, drawn, stage, is_spread_first=is_spread_first):
        assert loss <= 1e-6
        assert value <= 1e-6


def alone(drawn: Drawn, engine: Any) -> torch.nn.Module:
    """Return a model of this process with the values that the engine has trained."""
    model = drawn.adapted()
    for name, value in whole_values(engine.module).items():
        model.get_parameter(name).data.copy_(value)
    return model


def require_saved(engine: Any, directory: str) -> None:
    """Assert that a directory has what the engine has trained."""
    dist.barrier()
    loaded = DRAWN.build()
    randlora.load(loaded, directory, trainable=True)
    expected = {name: value.float() for name, value in whole_values(engine.module).items()}
    assert distance(values_of(loaded), expected) == 0


def save_merge_and_back(stage: str, directory: str, *, is_spread_first: bool) -> None:
    engine = engine_of(DRAWN, stage, is_spread_first=is_spread_first)
    model, rank = engine.module, dist.get_rank()
    trained(engine, DRAWN, rank, 0)
    assert randlora.save(model, directory).directory == Path(directory)
    require_saved(engine, directory)
    twin, rows = alone(DRAWN, engine), DRAWN.batch(rank, 5)
    before = engine(rows).detach()
    for fqn in ("layers.0", "layers.1", "layers.2"):
        assert torch.equal(randlora.delta_weight(model, fqn), randlora.delta_weight(twin, fqn))
    with randlora.merged(twin):
        expected = twin(rows).detach()
    with randlora.merged(engine):
        assert torch.equal(engine(rows), expected)
    assert torch.equal(engine(rows), before)
    randlora.merge(model, reversible=True)
    assert torch.equal(engine(rows), expected)
    randlora.unmerge(model)
    assert torch.equal(engine(rows), before)
    randlora.merge(model)
    assert torch.equal(engine(rows), expected)


@pytest.mark.parametrize(
    ("stage", "is_spread_first"),
    [("3", False), ("3", True), ("3-persistent", False), ("3-offload", False)],
    ids=["inject-first", "init-first", "persistent", "offload"],
)
def test_spread_adapters_are_saved_and_merged_as_by_one_process(
    zero_pair: Processes, tmp_path: Path, stage: str, *, is_spread_first: bool
) -> None:
    zero_pair.run(save_merge_and_back, stage, str(tmp_path / "adapter"), is_spread_first=is_spread_first)


def fail_to_copy() -> None:
    """Raise in one process between the gathers of what is trained beside Λ and Γ."""
    with deepspeed().zero.Init(config_dict_or_path=config("3")):
        model = DRAWN.build()
    with failing_in_last("gathered", places, 0, MemoryError("no room")), pytest.raises(MemoryError, match="no room"):
        DRAWN.adapt(model)
    assert randlora.adapters(model) == []
    DRAWN.adapt(model)


def test_copies_that_cannot_be_made_in_one_process_are_an_error_in_all(zero_pair: Processes) -> None:
    zero_pair.run(fail_to_copy, seconds=30)


def switch(drawn: Drawn, stage: str, *, is_spread_first: bool) -> None:
    """Disable, activate and eject adapters, which with parameters that they train copies of needs others in place."""
    engine = engine_of(drawn, stage, is_spread_first=is_spread_first)
    model, rank = engine.module, dist.get_rank()
    trained(engine, drawn, rank, 0)
    rows, plain = drawn.batch(rank, 5), drawn.build()
    before = engine(rows).detach()
    if stage != "2" and drawn.train_also:
        with pytest.raises(AdapterError, match=r"norms\.0\.weight would have to become a different parameter object"):
            randlora.activate(model, [])
        with pytest.raises(AdapterError, match="would have to become a different"), randlora.disabled(model):
            pass
    else:
        with randlora.disabled(model):
            torch.testing.assert_close(engine(rows), plain(rows))
        assert torch.equal(engine(rows), before)
        randlora.activate(model, [])
        torch.testing.assert_close(engine(rows), plain(rows))
        randlora.activate(model, "default")
    assert torch.equal(engine(rows), before)
    trained(engine, drawn, rank, 1)
    require_equal_on_ranks(whole_values(model))
    randlora.eject(model)
    torch.testing.assert_close(engine(rows), plain(rows))
    with deepspeed().zero.GatheredParameters([*model.parameters()]):
        own = {name: each.detach().clone() for name, each in model.named_parameters()}
    assert distance(own, dict(plain.named_parameters())) == 0


@pytest.mark.parametrize(("stage", "is_spread_first"), [("2", False), ("3", False), ("3", True)])
@pytest.mark.parametrize("also", [(), ("norms",)], ids=["alone", "train_also"])
def test_adapters_are_switched_by_values_or_the_call_is_refused(
    zero_pair: Processes, also: tuple[str, ...], stage: str, *, is_spread_first: bool
) -> None:
    zero_pair.run(switch, replace(DRAWN, train_also=also), stage, is_spread_first=is_spread_first)


def train_another(stage: str, how: str) -> None:
    model = DRAWN.adapted()
    randlora.inject(model, 2, targets="all-linear", name="second", stream="portable")
    engine = engine_around(model, stage)
    trained(engine, DRAWN, dist.get_rank(), 0)
    randlora.set_trainable(model, "default")  # which the engine trains
    changes: dict[str, Callable[[], object]] = {
        "set_trainable": lambda: randlora.set_trainable(model, ["default", "second"]),
        "inject": lambda: randlora.inject(model, 2, targets="all-linear", name="third", trainable=True),
    }
    with pytest.warns(UserWarning, match="requires grad, and the DeepSpeedEngine around the model was made before"):
        changes[how]()


@pytest.mark.parametrize(("stage", "how"), [("2", "set_trainable"), ("3", "set_trainable"), ("3", "inject")])
def test_training_another_adapter_than_the_engine_does_warns(zero_pair: Processes, stage: str, how: str) -> None:
    zero_pair.run(train_another, stage, how)


def train_in_half_precision(stage: str, directory: str, dtype: str) -> None:
    """Λ and Γ are in the engine's dtype, and so is the file; float32 masters are the optimizer's."""
    if dtype == "fp16" and not deepspeed().get_accelerator().is_fp16_supported():
        return  # DeepSpeed makes no such engine on this CPU
    options: dict[str, Any] = {dtype: {"enabled": True, **HALF[dtype]}}
    engine = engine_of(DRAWN, stage, **options)
    losses = [mean_over_ranks(trained(engine, DRAWN, dist.get_rank(), step)) for step in range(DRAWN.steps)]
    expected, _ = trained_alone(DRAWN)
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 0.02
    require_equal_on_ranks(whole_values(engine.module))
    randlora.save(engine.module, directory)
    require_saved(engine, directory)
    rows = DRAWN.batch(0, 5).to(next(engine.module.parameters()).dtype)
    twin = alone(DRAWN, engine).to(rows.dtype)
    before = engine(rows)
    assert torch.equal(before, twin(rows))
    with randlora.merged(engine), randlora.merged(twin):
        assert torch.equal(engine(rows), twin(rows))
        torch.testing.assert_close(engine(rows), before, rtol=0, atol=0.02)
    assert torch.equal(engine(rows), before)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("stage", ["2", "3"])
def test_engines_of_half_precision_train(zero_pair: Processes, tmp_path: Path, stage: str, dtype: str) -> None:
    zero_pair.run(train_in_half_precision, stage, str(tmp_path / "adapter"), dtype)


def resume(stage: str, directory: str, *, has_all: bool) -> None:
    """Train, with a checkpoint in between; another model goes on from there and has the same losses and values."""
    rank = dist.get_rank()
    through = engine_of(DRAWN, stage)
    trained(through, DRAWN, rank, 0)
    through.save_checkpoint(directory, exclude_frozen_parameters=not has_all)
    expected = [trained(through, DRAWN, rank, step) for step in (1, 2)]
    rest = engine_of(DRAWN, stage)
    path, _ = rest.load_checkpoint(directory, load_module_strict=has_all)
    assert path is not None
    assert [trained(rest, DRAWN, rank, step) for step in (1, 2)] == expected
    values = whole_values(through.module)
    assert distance(whole_values(rest.module), values) == 0
    randlora.save(through.module, f"{directory}/adapter")
    dist.barrier()
    if stage == "3":
        with pytest.raises(CheckpointError, match=r"engine\.load_checkpoint"):  # the optimizer would overwrite them
            randlora.swap(rest.module, f"{directory}/adapter")
        assert distance(whole_values(rest.module), values) == 0


@pytest.mark.parametrize("has_all", [True, False], ids=["all", "trained"])
@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_checkpoint_of_deepspeed_resumes_a_run(
    zero_pair: Processes, tmp_path: Path, stage: str, *, has_all: bool
) -> None:
    zero_pair.run(resume, stage, str(tmp_path / "checkpoint"), has_all=has_all)


def fail_in_one_of_all(stage: str, *, reversible: bool) -> None:
    engine = engine_of(DRAWN, stage)
    model, rows = engine.module, DRAWN.batch(dist.get_rank(), 5)
    expected, before = engine(rows), pieces(model)
    check, write, calls = mergeable.require_finite, Spread.write, []

    def fail_before(fqn: str, weight: Tensor) -> Tensor:
        if fqn == "layers.1" and dist.get_rank() == 1:
            raise MemoryError("in one process")
        return check(fqn, weight)

    def fail_after(self: Spread, value: Tensor) -> None:
        write(self, value)
        calls.append(value)
        if len(calls) == 2 and dist.get_rank() == 1:
            raise MemoryError("in one process")

    for owner, name, fail in ((merge, "require_finite", fail_before), (Spread, "write", fail_after)):
        with mock.patch.object(owner, name, fail), pytest.raises(MemoryError, match="in one process"):
            randlora.merge(engine, reversible=reversible)
        assert all(map(torch.equal, pieces(model), before))
        assert torch.equal(engine(rows), expected)
    with randlora.merged(engine):
        torch.testing.assert_close(engine(rows), expected)
    trained(engine, DRAWN, dist.get_rank(), 0)


def pieces(model: torch.nn.Module) -> list[Tensor]:
    """Return copies of what this process has of each parameter."""
    held: list[Any] = [*model.parameters()]
    return [copy.deepcopy(each.ds_tensor.data) for each in held]


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("stage", ["3", "3-persistent"])
def test_a_merge_that_fails_in_one_process_is_undone_in_all(
    zero_pair: Processes, stage: str, *, reversible: bool
) -> None:
    zero_pair.run(fail_in_one_of_all, stage, reversible=reversible, seconds=30)

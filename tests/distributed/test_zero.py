"""DeepSpeed's ZeRO: half precision, its checkpoints and warnings, and merges that fail in one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import randlora
from randlora.model import merge, mergeable
from randlora.sharded import places
from randlora.sharded.places import Spread
from tests.distributed.engines import built_spread, deepspeed, trained, zero
from tests.distributed.processes import in_two_of_zero, on_all
from tests.distributed.test_faults import failing_in_last
from tests.distributed.trained import Drawn, distance, held, require_equal_on_ranks, trained_alone, values

pytestmark = in_two_of_zero

DRAWN = Drawn(train_also=("norm",))
HALF: dict[str, dict[str, Any]] = {"bf16": {}, "fp16": {"loss_scale": 128}}  # else the first steps look for a scale


def test_copies_that_cannot_be_made_in_one_process_raise_in_all() -> None:
    model = built_spread(DRAWN, "3")
    with failing_in_last("gathered", places, 0, MemoryError("no room")), pytest.raises(MemoryError, match="no room"):
        DRAWN.adapt(model)
    assert randlora.adapters(model) == []
    DRAWN.adapt(model)


@pytest.mark.parametrize(("stage", "how"), [("2", "set_trainable"), ("3", "set_trainable"), ("3", "inject")])
def test_training_another_adapter_than_the_engine_does_warns(stage: str, how: str) -> None:
    model = DRAWN.adapted()
    randlora.inject(model, 2, targets=["down"], name="second")
    trained(zero(model, stage), DRAWN, dist.get_rank(), 1)
    randlora.set_trainable(model, "default")  # which the engine trains
    changes: dict[str, Callable[[], object]] = {
        "set_trainable": lambda: randlora.set_trainable(model, ["default", "second"]),
        "inject": lambda: randlora.inject(model, 2, targets=["down"], name="third", trainable=True),
    }
    with pytest.warns(UserWarning, match="requires grad, and the DeepSpeedEngine around the model was made before"):
        changes[how]()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("stage", ["2", "3"])
def test_engines_of_half_precision_train(tmp_path: Path, stage: str, dtype: str) -> None:
    """Λ and Γ are in the engine's dtype, and so is the file; float32 masters are the optimizer's."""
    if dtype == "fp16" and not deepspeed().get_accelerator().is_fp16_supported():
        return  # DeepSpeed makes no such engine on this CPU
    engine = zero(DRAWN.adapted(), stage, **{dtype: {"enabled": True, **HALF[dtype]}})
    losses = torch.tensor(on_all(trained(engine, DRAWN, dist.get_rank()))).mean(0)
    assert (losses - torch.tensor(trained_alone(DRAWN.adapted(), DRAWN, range(2)))).abs().max() < 0.02
    found = values(engine.module, only_trained=True)
    require_equal_on_ranks(found)
    randlora.save(engine.module, tmp_path / "adapter")
    dist.barrier()
    twin, rows = DRAWN.build(), DRAWN.batch(0, 5)
    randlora.load(twin, tmp_path / "adapter", trainable=True)
    assert distance(values(twin, only_trained=True), found) == 0
    twin.to(next(iter(found.values())).dtype)
    before = engine(*rows)
    assert torch.equal(before, twin(*rows))
    with randlora.merged(engine), randlora.merged(twin):
        assert torch.equal(engine(*rows), twin(*rows))
        torch.testing.assert_close(engine(*rows), before, rtol=0, atol=0.02)
    assert torch.equal(engine(*rows), before)


@pytest.mark.parametrize("has_all", [True, False], ids=["all", "trained"])
@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_checkpoint_of_deepspeed_resumes_a_run(tmp_path: Path, stage: str, *, has_all: bool) -> None:
    rank, through = dist.get_rank(), zero(DRAWN.adapted(), stage)
    trained(through, DRAWN, rank, 1)
    through.save_checkpoint(str(tmp_path), exclude_frozen_parameters=not has_all)
    expected = trained(through, DRAWN, rank, 2)
    rest = zero(DRAWN.adapted(), stage)
    path, _ = rest.load_checkpoint(str(tmp_path), load_module_strict=has_all)
    assert path is not None
    assert trained(rest, DRAWN, rank, 2) == expected
    assert distance(values(rest.module), values(through.module)) == 0


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("stage", ["3", "3-persistent"])
def test_a_merge_that_fails_in_one_process_is_undone_in_all(stage: str, *, reversible: bool) -> None:
    engine = zero(DRAWN.adapted(), stage)
    model, rows = engine.module, DRAWN.batch(dist.get_rank(), 5)
    expected, before = engine(*rows), held(model)
    check, write, calls = mergeable.require_finite, Spread.write, []

    def fail_before(fqn: str, weight: Tensor) -> Tensor:
        if fqn == "blocks.1.up" and dist.get_rank() == 1:
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
        assert all(torch.equal(value, before[name]) for name, value in held(model).items())
        assert torch.equal(engine(*rows), expected)
    with randlora.merged(engine):
        torch.testing.assert_close(engine(*rows), expected)
    trained(engine, DRAWN, dist.get_rank(), 1)

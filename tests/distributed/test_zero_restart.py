"""DeepSpeed's ZeRO: a run that its own checkpoint resumes, and a merge in the middle of which one process fails."""

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import randlora
from randlora.errors import CheckpointError
from randlora.model import merge, mergeable
from randlora.sharded.places import Spread
from tests.distributed.engines import engine_of, needs_deepspeed, trained, whole_values
from tests.distributed.processes import Processes
from tests.distributed.trained import Drawn, distance

pytestmark = needs_deepspeed

DRAWN = Drawn((12, 12, 8, 12), 4, "dense", 2.0, ("norms",))


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
    assert distance(whole_values(rest.module), whole_values(through.module)) == 0


@pytest.mark.parametrize("has_all", [True, False], ids=["all", "trained"])
@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_checkpoint_of_deepspeed_resumes_a_run(
    zero_pair: Processes, tmp_path: Path, stage: str, *, has_all: bool
) -> None:
    zero_pair.run(resume, stage, str(tmp_path / "checkpoint"), has_all=has_all)


def restore_into(directory: str) -> None:
    engine = engine_of(DRAWN, "3")
    randlora.save(engine.module, directory)
    before = whole_values(engine.module)
    with pytest.raises(CheckpointError, match=r"engine\.load_checkpoint"):
        randlora.swap(engine.module, directory)
    assert distance(whole_values(engine.module), before) == 0


def test_values_that_the_optimizer_would_overwrite_are_not_restored(zero_pair: Processes, tmp_path: Path) -> None:
    zero_pair.run(restore_into, str(tmp_path / "adapter"))


def fail_in_one_process(stage: str, *, reversible: bool) -> None:
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
    zero_pair.run(fail_in_one_process, stage, reversible=reversible, seconds=30)

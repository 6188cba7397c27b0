"""Norms of gradients, to clip them, and of updates, in a loss or limited, are in several processes as in one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import randlora
from randlora.errors import AdapterError
from tests.distributed.engines import ENGINES, trained
from tests.distributed.processes import in_two, in_two_of_zero
from tests.distributed.trained import Drawn, distance, values
from tests.pages import DOCS, snippets

MAX_NORM = 0.01
CASE = Drawn(train_also=("norm", "head"))


@in_two
@pytest.mark.parametrize("engine", ["FSDP2 first", "tensor parallel first"])
def test_gradients_that_are_sharded_and_whole_are_clipped_by_the_norm_of_one_process(engine: str) -> None:
    """By the function of docs/distributed.md."""
    (snippet,) = (each for each in snippets(DOCS / "distributed.md") if "def clip_grad_norm" in each.code)
    exec(snippet.compiled(), documented := dict[str, Any]())
    one, model, own = CASE.adapted(), ENGINES[engine].make(CASE), ENGINES[engine]
    for rank in own.ranks():
        (CASE.loss(one(*CASE.batch(rank, 0)), rank) / len(own.ranks())).backward()
    CASE.loss(model(*CASE.batch(dist.get_rank() // own.sharing, 0)), 0).backward()
    expected = clip_grad_norm_(randlora.trainable_parameters(one), MAX_NORM)
    assert expected > MAX_NORM
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        clip_grad_norm_(randlora.trainable_parameters(model), MAX_NORM)
    norm = documented["clip_grad_norm"](randlora.trainable_parameters(model), MAX_NORM)
    torch.testing.assert_close(norm, expected)
    for mine, theirs in zip(randlora.trainable_parameters(model), randlora.trainable_parameters(one), strict=True):
        grad: Any = mine.grad
        torch.testing.assert_close(grad.full_tensor() if hasattr(mine, "device_mesh") else grad, theirs.grad)


def with_penalty(model: nn.Module, ranks: range, factor: float = 0.03) -> dict[str, Tensor]:
    """Train with a penalty and a limit, and return the values."""
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=0.02)
    for step in range(3):
        for rank in ranks:
            penalty = sum(norm**2 for norm in randlora.update_norms(getattr(model, "module", model)).values())
            ((DRAWN.loss(model(*DRAWN.batch(rank, step)), rank) + factor * penalty) / len(ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()
        randlora.limit_norms(getattr(model, "module", model), {"blocks.0": 0.04, ".*": 1e3})
    return values(getattr(model, "module", model))


DRAWN = Drawn()


@in_two
@pytest.mark.parametrize("engine", ["DDP", "FSDP2", "FSDP2 first"])
def test_a_penalty_and_a_limit_of_norms_are_those_of_one_process(engine: str) -> None:
    one, model = DRAWN.adapted(), ENGINES[engine].make(DRAWN)
    own, expected = with_penalty(model, range(dist.get_rank(), dist.get_rank() + 1)), with_penalty(one, range(2))
    assert distance(own, expected) <= 1e-6
    assert distance(with_penalty(DRAWN.adapted(), range(2), factor=0), expected) > 1e-4, "the penalty did nothing"
    norms = randlora.update_norms(one)
    for fqn, norm in randlora.update_norms(getattr(model, "module", model)).items():
        torch.testing.assert_close(norm, norms[fqn])
    limited = {fqn for fqn, norm in norms.items() if 0.0399 < norm < 0.0401}
    assert limited == {fqn for fqn in norms if fqn.startswith("blocks.0")}


@in_two_of_zero
@pytest.mark.parametrize("engine", ["ZeRO-3", "ZeRO-3, persistent"])
def test_under_zero_3_norms_are_read_and_neither_trained_nor_limited(engine: str) -> None:
    run = ENGINES[engine].make(DRAWN)
    trained(run, DRAWN, dist.get_rank(), 1)
    twin = DRAWN.adapted()
    twin.load_state_dict(values(run.module), strict=False)
    with torch.no_grad():
        assert randlora.update_norms(run.module) == randlora.update_norms(twin)
    with pytest.raises(AdapterError, match=r"would give no gradients .* under torch\.no_grad"):
        randlora.update_norms(run.module)
    with pytest.raises(AdapterError, match="is partitioned by ZeRO-3, whose optimizer has copies"):
        randlora.limit_norms(run.module, 1.0)

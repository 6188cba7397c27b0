"""Norms of gradients, to clip them, and of updates, in a loss or limited, are in several processes as in one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import randlora
from randlora.errors import AdapterError
from tests.distributed.engines import engine_of, needs_deepspeed, trained
from tests.distributed.processes import Processes
from tests.distributed.test_fsdp_training import TOKENS, Case, require_alike, share_of
from tests.distributed.test_tensor_parallel import Drawn, plain, split
from tests.distributed.test_zero import DRAWN, alone
from tests.distributed.trained import distance
from tests.examples import DOCS
from tests.kit import fill
from tests.pages import snippets

MAX_NORM = 0.01


def clip(one: nn.Module, model: nn.Module) -> None:
    """Clip the gradients of both, by the function of docs/distributed.md where some are sharded, and compare them."""
    (snippet,) = (each for each in snippets(DOCS / "distributed.md") if "def clip_grad_norm" in each.code)
    exec(snippet.compiled(), documented := dict[str, Any]())
    expected = torch.nn.utils.clip_grad_norm_(randlora.trainable_parameters(one), MAX_NORM)
    assert expected > MAX_NORM
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        torch.nn.utils.clip_grad_norm_(randlora.trainable_parameters(model), MAX_NORM)
    norm = documented["clip_grad_norm"](randlora.trainable_parameters(model), MAX_NORM)
    torch.testing.assert_close(norm, expected)
    for mine, theirs in zip(randlora.trainable_parameters(model), randlora.trainable_parameters(one), strict=True):
        grad: Any = mine.grad
        torch.testing.assert_close(grad.full_tensor() if hasattr(mine, "device_mesh") else grad, theirs.grad)


def clip_sharded() -> None:
    one, model = Case(is_sharded_first=True, train_also=("norm", "head")).models()
    one(TOKENS).pow(2).mean().backward()
    model(share_of(TOKENS)).pow(2).mean().backward()
    clip(one, model)


def clip_split() -> None:
    drawn = Drawn(8, 16, 30, True, "whole", {})
    one, model = (plain(drawn) for _ in range(2))
    for each in (one, model):
        randlora.inject(each, r=4, targets=["up", "down"], train_also=["up.bias"])
        fill(each)
    split(model, drawn)
    tokens = torch.arange(16).view(4, 4) + 1
    for each in (one, model):
        each(tokens).square().mean().backward()
    clip(one, model)


def with_penalty(model: nn.Module, tokens: Tensor, factor: float = 1e-3) -> None:
    """Train with a penalty and a limit, two backwards a step."""
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=0.02)
    for _ in range(3):
        for part in tokens.view(2, -1):
            loss = model(part).pow(2).mean()
            norms = randlora.update_norms(model)
            (loss + factor * sum(norm**2 for norm in norms.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        randlora.limit_norms(model, {"first": 0.25, ".*": 1e3})


def train_with_a_penalty() -> None:
    without, replicated = Case().models()[0], DistributedDataParallel(Case().models()[0])
    with_penalty(without, TOKENS, factor=0)
    with_penalty(replicated, share_of(TOKENS, 2))
    for is_sharded_first in (False, True):
        one, model = Case(is_sharded_first=is_sharded_first).models()
        with_penalty(one, TOKENS)
        with_penalty(model, share_of(TOKENS, 2))
        require_alike(one, model)
        assert distance(dict(replicated.module.named_parameters()), dict(one.named_parameters())) <= 1e-6
        expected = randlora.update_norms(one)
        for fqn, norm in randlora.update_norms(model).items():
            torch.testing.assert_close(norm, expected[fqn])
        limited = {fqn for fqn, norm in expected.items() if 0.2499 < norm < 0.2501}
        assert limited == {fqn for fqn in expected if fqn.startswith("first")}
        ours, theirs = (each.get_parameter("second.q.randlora_gamma.default") for each in (one, without))
        assert (ours - theirs).abs().max() > 1e-4, "the penalty did nothing"


@pytest.mark.parametrize("check", [clip_sharded, clip_split, train_with_a_penalty])
def test_norms_are_those_of_one_process(pair: Processes, check: Any) -> None:
    pair.run(check)


def read_norms_of_an_engine(stage: str) -> None:
    engine = engine_of(DRAWN, stage, is_spread_first=False)
    trained(engine, DRAWN, dist.get_rank(), 0)
    twin = alone(DRAWN, engine)
    with torch.no_grad():
        assert randlora.update_norms(engine.module) == randlora.update_norms(twin)
    with pytest.raises(AdapterError, match=r"would give no gradients .* under torch\.no_grad"):
        randlora.update_norms(engine.module)
    with pytest.raises(AdapterError, match="is partitioned by ZeRO-3, whose optimizer has copies"):
        randlora.limit_norms(engine.module, 1.0)


@needs_deepspeed
@pytest.mark.parametrize("stage", ["3", "3-persistent"])
def test_under_zero_3_norms_are_read_and_neither_trained_nor_limited(zero_pair: Processes, stage: str) -> None:
    zero_pair.run(read_norms_of_an_engine, stage)

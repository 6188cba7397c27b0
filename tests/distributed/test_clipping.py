"""The function of `docs/distributed.md` clips gradients of which some are sharded as torch does in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import randlora
from tests.distributed.processes import Processes
from tests.distributed.test_fsdp_training import TOKENS, Case, share_of
from tests.distributed.test_tensor_parallel import Drawn, plain, split
from tests.examples import DOCS
from tests.kit import fill
from tests.pages import snippets

MAX_NORM = 0.01


def documented() -> Any:
    (snippet,) = (each for each in snippets(DOCS / "distributed.md") if "def clip_grad_norm" in each.code)
    namespace: dict[str, Any] = {}
    exec(snippet.compiled(), namespace)
    return namespace["clip_grad_norm"]


def require_clipped_alike(one: nn.Module, model: nn.Module) -> None:
    """Clip the gradients of both and compare them."""
    expected = torch.nn.utils.clip_grad_norm_(randlora.trainable_parameters(one), MAX_NORM)
    assert expected > MAX_NORM
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        torch.nn.utils.clip_grad_norm_(randlora.trainable_parameters(model), MAX_NORM)
    norm = documented()(randlora.trainable_parameters(model), MAX_NORM)
    torch.testing.assert_close(norm, expected)
    for mine, theirs in zip(randlora.trainable_parameters(model), randlora.trainable_parameters(one), strict=True):
        grad: Any = mine.grad
        torch.testing.assert_close(grad.full_tensor() if hasattr(mine, "device_mesh") else grad, theirs.grad)


def clip_sharded() -> None:
    case = Case(is_sharded_first=True, train_also=("norm", "head"))
    one, model = case.adapt(case.base()), case.sharded()
    one(TOKENS).pow(2).mean().backward()
    model(share_of(TOKENS, 1)).pow(2).mean().backward()
    require_clipped_alike(one, model)


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
    require_clipped_alike(one, model)


@pytest.mark.parametrize("clip", [clip_sharded, clip_split])
def test_gradients_are_clipped_as_in_one_process(pair: Processes, clip: Any) -> None:
    pair.run(clip)

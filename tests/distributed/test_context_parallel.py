"""Each process has a part of every sequence: adapted layers see tokens, and gradients are averaged as over data."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

import randlora
from tests.distributed.processes import Processes
from tests.kit import fill


class _Join(torch.autograd.Function):
    """The parts of a sequence of all processes. The gradient of a part is the sum of what all processes have of it."""

    @staticmethod
    def forward(_ctx: Any, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        dist.all_reduce(grad := grad.contiguous())
        return grad.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]


def joined(part: Tensor) -> Tensor:
    whole: Tensor = _Join.apply(part)  # type: ignore[no-untyped-call]
    return whole


class Attention(nn.Module):
    """Attention whose queries may be of a part of the sequence, with the keys and values of all parts."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, *, is_part: bool) -> Tensor:
        query, key, value = self.q(x), self.k(x), self.v(x)
        if is_part:
            key, value = joined(key), joined(value)
        return scaled_dot_product_attention(query, key, value)


def train_on_a_part() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = Attention()
    randlora.inject(model, r=2, targets="all")
    fill(model)
    x = torch.randn(2, 4 * ranks, 8)
    model(x, is_part=False).pow(2).mean().backward()
    expected = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    part = x.chunk(ranks, dim=1)[rank]
    wrapper = DistributedDataParallel(model)
    wrapper(part, is_part=True).pow(2).mean().backward()
    assert len(expected) == 6
    for name, grad in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad)


def test_gradients_of_parts_of_sequences_average_to_the_whole(pair: Processes) -> None:
    pair.run(train_on_a_part)

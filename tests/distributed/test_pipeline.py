"""A pipeline's stages, and processes with a part of each sequence, train what one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.functional import mse_loss, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

import randlora
from tests.distributed.processes import in_two
from tests.kit import fill

OPTIONS: dict[str, Any] = {"r": 2, "targets": ["q"], "basis": "block", "blocks": (2, 2), "alpha": 2.0}
MICROBATCHES, ROWS, STEPS = 2, 3, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + torch.tanh(self.q(x))
        return output


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleDict({str(index): Block() for index in range(4)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def train(model: nn.Module, run: Any) -> None:
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=0.05)
    for step in range(STEPS):
        x, y = torch.randn(2, MICROBATCHES * ROWS, 8, generator=torch.Generator().manual_seed(step))
        run(x, y)
        optimizer.step()
        optimizer.zero_grad()


@in_two
def test_joined_stages_are_what_one_process_saves(tmp_path: Path) -> None:
    """Each keeps the layers of its stage under their own names, and trains them with the others."""
    rank, part = dist.get_rank(), Model()
    for index in range(4):
        if index // 2 != rank:
            del part.layers[str(index)]
    randlora.inject(part, **OPTIONS)
    randlora.check_ranks(part, group=dist.new_subgroups(1)[0])
    stage = PipelineStage(part, rank, dist.get_world_size(), torch.device("cpu"))
    schedule = ScheduleGPipe(stage, MICROBATCHES, loss_fn=mse_loss)
    train(part, lambda x, y: schedule.step(x) if rank == 0 else schedule.step(target=y))
    randlora.save(part, tmp_path / f"stage{rank}")
    dist.barrier()
    if rank == 0:
        randlora.files.join([tmp_path / "stage0", tmp_path / "stage1"], tmp_path / "joined")
        model, other = Model(), Model()
        randlora.inject(model, **OPTIONS)

        def run(x: Tensor, y: Tensor) -> None:
            for rows, expected in zip(x.chunk(MICROBATCHES), y.chunk(MICROBATCHES), strict=True):
                (mse_loss(model(rows), expected) / MICROBATCHES).backward()

        train(model, run)
        randlora.load(other, tmp_path / "joined")
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(other.get_parameter(name), parameter, rtol=0, atol=1e-6)
        assert not torch.equal(model.get_parameter("layers.3.q.randlora_gamma.default"), torch.full((4, 8), 1 / 8))


class _Join(torch.autograd.Function):
    """The parts of a sequence of all processes. The gradient of a part is the sum of what all processes have of it."""

    @staticmethod
    def forward(_ctx: Any, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        dist.all_reduce(grad := grads[0].contiguous())
        return grad.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]


class Attention(nn.Module):
    """Attention whose queries may be of a part of the sequence, with the keys and values of all parts."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, *, is_part: bool) -> Tensor:
        key, value = self.k(x), self.v(x)
        if is_part:
            key, value = (_Join.apply(each) for each in (key, value))  # type: ignore[no-untyped-call]
        return scaled_dot_product_attention(self.q(x), key, value)


@in_two
def test_gradients_of_parts_of_sequences_average_to_the_whole() -> None:
    model = Attention()
    randlora.inject(model, r=2, targets="all")
    fill(model)
    x = torch.randn(2, 8, 8)
    model(x, is_part=False).pow(2).mean().backward()
    expected = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    part = x.chunk(2, dim=1)[dist.get_rank()]
    wrapper = DistributedDataParallel(model)
    wrapper(part, is_part=True).pow(2).mean().backward()
    assert len(expected) == 6
    for name, grad in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad)

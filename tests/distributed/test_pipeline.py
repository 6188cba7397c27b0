"""A pipeline's stages, each with an adapter of its layers, train, save and join as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.functional import mse_loss

import randlora
from tests.distributed.processes import Processes

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
        self.layers = nn.ModuleDict({str(index): Block() for index in range(4)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def built() -> Model:
    torch.manual_seed(3)
    return Model()


def train(model: nn.Module, run: Any) -> None:
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=0.05)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(2, MICROBATCHES * ROWS, 8, generator=generator)
        run(x, y)
        optimizer.step()
        optimizer.zero_grad()


def train_a_stage(root: str) -> None:
    """Keep the layers of this stage under their own names, and train it with the others."""
    rank, model = dist.get_rank(), built()
    for index in range(4):
        if index // 2 != rank:
            del model.layers[str(index)]
    randlora.inject(model, **OPTIONS)
    randlora.check_ranks(model, group=dist.new_subgroups(1)[0])
    stage = PipelineStage(model, rank, dist.get_world_size(), torch.device("cpu"))
    schedule = ScheduleGPipe(stage, MICROBATCHES, loss_fn=mse_loss)
    train(model, lambda x, y: schedule.step(x) if rank == 0 else schedule.step(target=y))
    randlora.save(model, f"{root}/stage{rank}")


def test_joined_stages_are_what_one_process_saves(pair: Processes, tmp_path: Path) -> None:
    pair.run(train_a_stage, str(tmp_path))
    randlora.files.join([tmp_path / "stage0", tmp_path / "stage1"], tmp_path / "joined")
    model = built()
    randlora.inject(model, **OPTIONS)

    def run(x: Tensor, y: Tensor) -> None:
        for rows, expected in zip(x.chunk(MICROBATCHES), y.chunk(MICROBATCHES), strict=True):
            (mse_loss(model(rows), expected) / MICROBATCHES).backward()

    train(model, run)
    other = built()
    randlora.load(other, tmp_path / "joined")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), parameter, rtol=0, atol=1e-6)
    assert not torch.equal(model.get_parameter("layers.3.q.randlora_gamma.default"), torch.full((4, 8), 1 / 8))

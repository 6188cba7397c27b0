"""Sequence parallelism: between the split layers, each process has some of the tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import randlora
from tests.distributed.processes import Processes
from tests.distributed.test_tensor_parallel import close
from tests.kit import fill


class Block(nn.Module):
    """A norm and a feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.mlp(self.norm(x))
        return output


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), Block(), nn.Linear(8, 10, bias=False))


def split(model: nn.Module) -> None:
    plan = {
        "0": PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(1)),
        "1.norm": SequenceParallel(),
        "1.mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "1.mlp.0": ColwiseParallel(),
        "1.mlp.2": RowwiseParallel(output_layouts=Shard(1)),
        "2": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


def in_sequence(first: bool) -> None:
    """Compare output, gradients and the merged model."""
    one, model = plain(), plain()
    if first:
        split(model)
    for each in (one, model):
        randlora.inject(each, r=4, targets=["1.mlp.0", "1.mlp.2", "2"])
    if not first:
        split(model)
    fill(one), fill(model)
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    outputs = [each(x) for each in (one, model)]
    close(outputs[1], outputs[0])
    for output in outputs:
        output.square().mean().backward()
    for ours, expected in zip(*map(randlora.trainable_parameters, (model, one)), strict=True):
        assert ours.grad is not None
        assert expected.grad is not None
        close(ours.grad, expected.grad)
    with torch.no_grad(), randlora.merged(model):
        close(model(x), outputs[0])


@pytest.mark.parametrize("first", [True, False])
def test_a_model_whose_tokens_are_split_between_its_layers(pair: Processes, first: bool) -> None:
    pair.run(in_sequence, first)

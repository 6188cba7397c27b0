"""Tensor parallelism of fused weights: each process has a piece of each of the matrices that one weight is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import randlora
from randlora.sharded.places import is_dtensor
from tests.distributed.processes import Processes
from tests.distributed.test_tensor_parallel import close, in_float64, outputs_of
from tests.kit import fill

TARGETS = ["embed", "gate_up", "down", "head"]


class Fused(nn.Module):
    """A table, a gated block whose first layer is two matrices one above the other, and a head of two tasks."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.gate_up = nn.Linear(8, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, 8)
        self.head = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        if is_dtensor(weight := self.embed._parameters["weight"]):
            ids = DTensor.from_local(ids, weight.device_mesh, [Replicate()])
        gates: Any = self.gate_up(self.embed(ids))
        gate, up = (gates.to_local() if is_dtensor(gates) else gates).chunk(2, -1)
        hidden: Any = torch.relu(gate) * up
        if is_dtensor(gates):
            hidden = DTensor.from_local(hidden, gates.device_mesh, [Shard(2)])
        output: Any = self.head(self.down(hidden))
        whole: Tensor = output.full_tensor() if is_dtensor(output) else output
        return whole


def split(model: Fused) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def place(parameter: Tensor, placement: Any) -> nn.Parameter:
        return nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement]), requires_grad=False)

    in_pieces = {dim: _StridedShard(dim, split_factor=2) for dim in (0, 1)}
    model.embed.weight = place(model.embed.weight, in_pieces[0])
    model.gate_up.weight = place(model.gate_up.weight, in_pieces[0])
    model.down.weight, model.down.bias = place(model.down.weight, Shard(1)), place(model.down.bias, Replicate())
    model.head.weight, model.head.bias = place(model.head.weight, in_pieces[1]), place(model.head.bias, Replicate())


def part_of_gate_up(model: Fused) -> Tensor:
    weight: Any = model.gate_up._parameters["weight"]
    local: Tensor = weight.to_local()
    return local


def in_pieces(hidden: int, basis: Any, place: Path) -> None:
    """Compare output, gradients, the merged model and the saved files."""
    models = []
    for is_split in (False, True):
        torch.manual_seed(0)
        model = Fused(hidden).double()
        if is_split:
            split(model)
        randlora.inject(model, r=4, targets=TARGETS, basis=basis)
        models.append(in_float64(fill(model)))
    one, model = models
    ids = torch.arange(12).view(2, 6)
    outputs = [each(ids) for each in models]
    close(outputs[1], outputs[0])
    for output in outputs:
        output.square().mean().backward()
    for ours, expected in zip(*map(randlora.trainable_parameters, (model, one)), strict=True):
        assert ours.grad is not None
        assert expected.grad is not None
        close(ours.grad, expected.grad)
    before = part_of_gate_up(model).clone()
    with torch.no_grad(), randlora.merged(model):
        close(outputs_of(model, ids), outputs_of(one, ids))
        merged = dict(randlora.merged_tensors(model))
    assert torch.equal(part_of_gate_up(model), before)
    for name, value in randlora.merged_tensors(one):
        close(merged[name], value)
    randlora.save(model, place)
    dist.barrier()
    torch.manual_seed(0)
    fresh = Fused(hidden).double()
    randlora.load(fresh, place)
    close(outputs_of(fresh, ids), outputs_of(one, ids))


@pytest.mark.parametrize("basis", ["dense", "block"])
@pytest.mark.parametrize("hidden", [12, 2])
def test_a_process_that_has_several_pieces_of_a_weight(
    pair: Processes, hidden: int, basis: str, tmp_path: Path
) -> None:
    pair.run(in_pieces, hidden, basis, tmp_path / "adapter")

"""Tensor parallelism of fused weights, of sequences between layers, and together with `fully_shard`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

import randlora
from randlora.sharded.places import is_dtensor
from tests.distributed.processes import Processes
from tests.distributed.test_tensor_parallel import Drawn, close, in_float64, outputs_of, plain, require_alike
from tests.examples import snippet
from tests.kit import fill


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


def split_in_pieces(model: Fused) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def place(parameter: Tensor, placement: Any) -> nn.Parameter:
        return nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement]), requires_grad=False)

    in_pieces = {dim: _StridedShard(dim, split_factor=2) for dim in (0, 1)}
    model.embed.weight = place(model.embed.weight, in_pieces[0])
    model.gate_up.weight = place(model.gate_up.weight, in_pieces[0])
    model.down.weight, model.down.bias = place(model.down.weight, Shard(1)), place(model.down.bias, Replicate())
    model.head.weight, model.head.bias = place(model.head.weight, in_pieces[1]), place(model.head.bias, Replicate())


def in_pieces(hidden: int, basis: Any, place: Path) -> None:
    models = []
    for is_split in (False, True, None):
        torch.manual_seed(0)
        model = Fused(hidden).double()
        if is_split:
            split_in_pieces(model)
        if is_split is not None:
            randlora.inject(model, r=4, targets=["embed", "gate_up", "down", "head"], basis=basis)
            in_float64(fill(model))
        models.append(model)
    one, model, fresh = models
    require_alike(one, model, torch.arange(12).view(2, 6), fresh, place)


@pytest.mark.parametrize(("hidden", "basis"), [(12, "dense"), (2, "block")])
def test_a_process_that_has_several_pieces_of_a_weight(
    pair: Processes, hidden: int, basis: str, tmp_path: Path
) -> None:
    pair.run(in_pieces, hidden, basis, tmp_path / "adapter")


class Block(nn.Module):
    """A norm and a feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.mlp(self.norm(x))
        return output


def split_tokens(model: nn.Module) -> None:
    plan = {
        "0": PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(1)),
        "1.norm": SequenceParallel(),
        "1.mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "1.mlp.0": ColwiseParallel(),
        "1.mlp.2": RowwiseParallel(output_layouts=Shard(1)),
        "2": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


def in_sequence(first: bool, place: Path) -> None:
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(6, 8), Block(), nn.Linear(8, 10, bias=False))
    model, fresh = copy.deepcopy(one), copy.deepcopy(one)
    if first:
        split_tokens(model)
    for each in (one, model):
        randlora.inject(each, r=4, targets=["1.mlp.0", "1.mlp.2", "2"])
    if not first:
        split_tokens(model)
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    require_alike(fill(one), fill(model), x, fresh, place)


@pytest.mark.parametrize("first", [True, False])
def test_a_model_whose_tokens_are_split_between_its_layers(pair: Processes, first: bool, tmp_path: Path) -> None:
    pair.run(in_sequence, first, tmp_path / "adapter")


def on_two_dimensions(first: bool, place: Path) -> None:
    """Train on a mesh of two data-parallel times two tensor-parallel processes."""
    drawn = Drawn(8, 16, 30, first, "whole", {"r": 4, "targets": ["up", "down"]})
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    one, model = plain(drawn), plain(drawn)
    randlora.inject(one, **drawn.options)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if first:
        parallelize_module(model, mesh["tp"], plan)
    randlora.inject(model, **drawn.options)
    if not first:
        parallelize_module(model, mesh["tp"], plan)
    fill(one), fill(model)
    fully_shard(model, mesh=mesh["dp"])
    ids = torch.arange(16).view(4, 4) + 1
    mine = ids.chunk(2)[mesh["dp"].get_local_rank()]
    optimizers = [torch.optim.SGD(randlora.trainable_parameters(each), lr=1e-2) for each in (one, model)]
    for _ in range(2):
        norms = []
        for each, batch, optimizer in zip((one, model), (ids, mine), optimizers, strict=True):
            optimizer.zero_grad()
            each(batch).square().mean().backward()
            norm = torch.nn.utils.clip_grad_norm_(randlora.trainable_parameters(each), 1e-2)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
            optimizer.step()
        close(norms[1], norms[0])
    close(outputs_of(model, ids), outputs_of(one, ids))
    for fqn in ("up", "down"):
        close(randlora.delta_weight(model, fqn), randlora.delta_weight(one, fqn))
    randlora.save(model, place / "adapter")
    dist.barrier()
    fresh = plain(drawn)
    randlora.load(fresh, place / "adapter")
    close(outputs_of(fresh, ids), outputs_of(one, ids))
    with torch.no_grad(), randlora.merged(model):
        close(outputs_of(model, ids), outputs_of(one, ids))


@pytest.mark.parametrize("first", [True, False])
def test_a_mesh_of_two_dimensions(four: Processes, first: bool, tmp_path: Path) -> None:
    four.run(on_two_dimensions, first, tmp_path)


def in_the_pages_order() -> None:
    """Split, adapt and shard as docs/tensor_parallel.md does, and train."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = plain(Drawn(16, 32, 30, True, "whole", {}))
    exec(snippet("tensor_parallel.md", "parallelize_module"), {"randlora": randlora, "model": model, "mesh": mesh})
    model(torch.arange(8).view(2, 4)).square().mean().backward()
    assert [type(parameter.grad) for parameter in randlora.trainable_parameters(model)] == [DTensor] * 4


def test_the_order_of_the_page(four: Processes) -> None:
    four.run(in_the_pages_order)

"""Tensor parallelism together with `fully_shard` on a mesh of two dimensions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import randlora
from tests.distributed.processes import Processes
from tests.distributed.test_tensor_parallel import Drawn, close, outputs_of, plain
from tests.examples import snippet
from tests.kit import fill


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
    other = plain(drawn)
    randlora.load(other, place / "adapter")
    close(outputs_of(other, ids), outputs_of(one, ids))
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

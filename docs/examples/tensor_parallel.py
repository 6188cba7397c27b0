"""Train an adapter of a model that tensor parallelism splits over several processes.

`torchrun --nproc-per-node 2 docs/examples/tensor_parallel.py` runs it. Each process holds a part of the weights and
computes that part of their updates; all see the same batches. The files are those that one process would write.
"""

import math
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import randlora

STEPS_A_LINE = 20


def pretrained() -> nn.Module:
    """Make a network, the same in every process, in the place of one that you would load."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Linear(64, 1)
    )


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw inputs and a curve's values, ``(32, 1)`` each."""
    x = torch.rand(32, 1, generator=generator) * 2 * math.pi - math.pi
    return x, x.sin()


def main(
    steps: Annotated[int, typer.Option(min=1)] = 100,
    out: Annotated[Path, typer.Option(help="Directory for the adapter.")] = Path("build/tensor-parallel"),
) -> None:
    """Train an adapter on all processes of the launcher."""
    is_cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if is_cuda else "gloo")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if is_cuda else torch.device("cpu")
    model = pretrained().to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    parallelize_module(model, mesh, {"2": ColwiseParallel(), "4": RowwiseParallel()})
    report = randlora.inject(model, r=8, targets=["2", "4"])
    randlora.check_ranks(model)  # the same adapter on the same bases everywhere
    optimizer = torch.optim.AdamW(randlora.trainable_parameters(model), lr=1e-2)
    generator = torch.Generator().manual_seed(0)  # the same in every process
    if dist.get_rank() == 0:
        print(report)
    for done in range(1, steps + 1):
        x, y = (each.to(device) for each in batch(generator))
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if done % STEPS_A_LINE == 0 and dist.get_rank() == 0:
            print(f"step {done}: loss {loss.item():.4f}")
    saved = randlora.save(model, out)  # in every process: one writes
    if dist.get_rank() == 0:
        print(saved)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)

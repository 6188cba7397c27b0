"""Train an adapter of a model that is sharded over several processes, and resume the run with any number of them.

`torchrun --nproc-per-node 2 docs/examples/fully_sharded.py` runs it. Called again, it goes on where the newest
checkpoint of the run ends. That has the shards of the adapter and of the optimizer, and nothing of the base model.
"""

import math
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import randlora

STEPS_A_CHECKPOINT = 20
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
"""What is in checkpoints: only what is trained, without the base model."""


def pretrained() -> nn.Sequential:
    """Make a network, the same in every process, in the place of one that you would load."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Draw the inputs and a curve's values that a process has in a step, ``(32, 1)`` each."""
    x = torch.rand(32, 1, generator=torch.Generator().manual_seed(1000 * step + rank)) * 2 * math.pi - math.pi
    return x, x.sin()


def newest(checkpoints: Path) -> int:
    """Return the step of the newest complete checkpoint, 0 if there is none."""
    return max((int(path.parent.name) for path in checkpoints.glob("*/.metadata")), default=0)


def resume(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Load each process's part of a checkpoint, whatever number of processes wrote it."""
    parts, moments = get_state_dict(model, optimizer, options=TRAINED)
    state_dict_loader.load({"model": parts, "optimizer": moments}, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=parts, optim_state_dict=moments, options=TRAINED)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps in all, those of the resumed run included.")] = 100,
    checkpoints: Annotated[Path, typer.Option(help="Their directory.")] = Path("build/fully-sharded/checkpoints"),
    out: Annotated[Path, typer.Option(help="Directory for the adapter.")] = Path("build/fully-sharded/adapter"),
) -> None:
    """Train an adapter on all processes of the launcher."""
    if not dist.is_initialized():  # as it is in a worker of Ray Train
        dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    model = pretrained().to(device)
    randlora.inject(model, r=8, targets=["0", "2", "4"])
    fully_shard(model)  # of a large model each block before it
    optimizer = torch.optim.AdamW(randlora.trainable_parameters(model), lr=1e-2)
    if begun := newest(checkpoints):
        resume(model, optimizer, checkpoints / f"{begun}")
    if dist.get_rank() == 0:
        print(f"trains from step {begun} on {dist.get_world_size()} processes")
    for done in range(begun + 1, steps + 1):
        x, y = (each.to(device) for each in batch(done, dist.get_rank()))
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if done % STEPS_A_CHECKPOINT == 0:
            parts, moments = get_state_dict(model, optimizer, options=TRAINED)
            state_dict_saver.save({"model": parts, "optimizer": moments}, checkpoint_id=checkpoints / f"{done}")
            if dist.get_rank() == 0:
                print(f"step {done}: loss {loss.item():.4f}")
    report = randlora.save(model, out)  # together: the first process writes
    if dist.get_rank() == 0:
        print(report)
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)

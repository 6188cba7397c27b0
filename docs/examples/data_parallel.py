"""Train an adapter on several processes with DistributedDataParallel, or with DeepSpeed.

`torchrun --nproc-per-node 2 docs/examples/data_parallel.py` runs it, with `--zero 3` through DeepSpeed's ZeRO-3. Each
process draws its own batches; gradients are averaged, so that all have the same adapter.
"""

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import randlora

STEPS_A_LINE = 20


def pretrained() -> nn.Module:
    """Make a network, the same in every process, in the place of one that you would load."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw inputs and a curve's values, ``(32, 1)`` each."""
    x = torch.rand(32, 1, generator=generator) * 2 * math.pi - math.pi
    return x, x.sin()


def zero_config(stage: int) -> dict[str, Any]:
    """Return a config of DeepSpeed; it clips gradients at 1.0 unless told otherwise."""
    return {
        "train_micro_batch_size_per_gpu": 32,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000,
    }


def main(
    steps: Annotated[int, typer.Option(min=1)] = 100,
    out: Annotated[Path, typer.Option(help="Directory for the adapter.")] = Path("build/data-parallel"),
    zero: Annotated[int, typer.Option(min=0, max=3, help="Stage of DeepSpeed's ZeRO; 0 uses no DeepSpeed.")] = 0,
) -> None:
    """Train an adapter on all processes of the launcher."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    model = pretrained()
    report = randlora.inject(model, r=8, targets=["2"], train_also=["4"])
    randlora.check_ranks(model)  # before the engine has it: the same adapter on the same bases everywhere
    optimizer = torch.optim.AdamW(randlora.trainable_parameters(model), lr=1e-2)
    engine: Any = None
    if zero:
        import deepspeed  # noqa: PLC0415

        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=zero_config(zero))
    wrapped: nn.Module = engine if zero else DistributedDataParallel(model)
    generator = torch.Generator().manual_seed(dist.get_rank())
    if dist.get_rank() == 0:
        print(report)
    for done in range(1, steps + 1):
        x, y = batch(generator)
        loss = F.mse_loss(wrapped(x), y)
        if zero:
            engine.backward(loss)
            engine.step()
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if done % STEPS_A_LINE == 0 and dist.get_rank() == 0:
            print(f"step {done}: loss {loss.item():.4f}")
    save(model, out, is_sharded=zero == 3)
    dist.destroy_process_group()


def save(model: nn.Module, out: Path, *, is_sharded: bool) -> None:
    """Save on one process, or on all together if parameters are spread over them."""
    if is_sharded or dist.get_rank() == 0:
        report = randlora.save(model, out)
        if dist.get_rank() == 0:
            print(report)
    dist.barrier()


if __name__ == "__main__":
    typer.run(main)

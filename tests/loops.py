"""The page's loop and the sharded example, with a process that kills itself once: what launchers start again."""

import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.pages import imported, snippet

STEPS, EVERY, LAST = 12, 4, 10
"""How long a run is, how often it saves, and the step at which a process is killed."""


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))


def begin(step: int, alive: Path) -> None:
    """Write down the step; kill the second process at one of them, if a file says that it has not been done."""
    if dist.get_rank() == 0:
        with alive.with_name("steps").open("a", encoding="utf-8") as steps:
            steps.write(f"{step}\n")
    elif step == LAST and alive.exists():
        alive.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


def loss_of(alive: Path) -> Any:
    def loss(model: nn.Module, step: int) -> Tensor:
        begin(step, alive)
        x = torch.rand(32, 1, generator=torch.Generator().manual_seed(100 * step + dist.get_rank())) * 2 * math.pi
        return nn.functional.mse_loss(model(x), x.sin())

    return loss


def run_page(part: str, **names: Any) -> dict[str, Any]:
    """Run a block of the page with the names that it needs, and return them with those that it defines."""
    names["__name__"] = "page"
    exec(snippet("long_runs.md", part), names)
    return names


def sharded(run: Path, alive: Path) -> None:
    """Run the example of FSDP2 on all processes of the launcher."""
    example: Any = imported("fully_sharded")
    batch, example.STEPS_A_CHECKPOINT = example.batch, EVERY

    def drawn(step: int, rank: int) -> Any:
        begin(step, alive)
        return batch(step, rank)

    example.batch = drawn
    example.main(STEPS, run, run.with_name(f"{run.name}.adapter"))


if __name__ == "__main__":
    kind, run, alive = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if kind == "sharded":
        sharded(run, alive)
    else:
        page = run_page("def train")
        dist.init_process_group("gloo")
        page["train"](build, loss_of(alive), run, page["newest"](run), steps=STEPS, every=EVERY)
        dist.destroy_process_group()

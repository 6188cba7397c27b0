"""Train an adapter in a loop of one's own, which can be stopped and goes on as if it had not been.

`python docs/examples/plain_pytorch.py` runs it, and `--resume` goes on from the last checkpoint. A small network that
knows one curve learns another. A checkpoint is a directory: the adapter's files, which `randlora.load` reads anywhere,
and beside them what the loop itself needs to go on.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import randlora

STATE_FILE = "training.pt"


def pretrained() -> nn.Sequential:
    """Make a network that knows the sine, in the place of one that you would load."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Dropout(0.01), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        x = torch.empty(64, 1).uniform_(-math.pi, math.pi)
        step(optimizer, F.mse_loss(model(x), x.sin()))
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Draw inputs and the new curve's values, ``(64, 1)`` each, from torch's own generator."""
    x = torch.empty(64, 1).uniform_(-math.pi, math.pi)
    return x, (2 * x).cos()


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    """Take one step down a loss, and return it."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


class Run:
    """A training run: the adapted model, what trains it, and how far it has come."""

    def __init__(self, model: nn.Module, *, steps: int) -> None:
        """Start with a model that carries a trainable adapter."""
        self.model = model
        self.optimizer = torch.optim.AdamW(randlora.trainable_parameters(model), lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=steps)
        self.done = 0

    def train(self, last: int) -> Iterator[float]:
        """Train up to a step, and give each step's loss."""
        while self.done < last:
            x, y = batch()
            yield step(self.optimizer, F.mse_loss(self.model(x), y))
            self.schedule.step()
            self.done += 1

    def save(self, out: Path) -> None:
        """Write a checkpoint. The loop's state comes last and at once, so that a directory that has it is complete."""
        directory = out / f"step-{self.done:06}"
        randlora.save(self.model, directory)
        state = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": torch.get_rng_state(),
            "done": self.done,
        }
        torch.save(state, directory / f"{STATE_FILE}.new")
        (directory / f"{STATE_FILE}.new").replace(directory / STATE_FILE)


def begin(*, steps: int) -> Run:
    """Begin a run from the pretrained network."""
    model = pretrained()
    print(randlora.inject(model, r=8, targets=["2"], train_also=["5"]))
    return Run(model, steps=steps)


def resume(out: Path, *, steps: int) -> Run:
    """Go on from the last complete checkpoint."""
    if not (complete := sorted(out.glob(f"step-*/{STATE_FILE}"))):
        raise typer.BadParameter(f"there is no checkpoint in {out}: begin without --resume")
    model = pretrained()
    print(randlora.load(model, complete[-1].parent, trainable=True))
    run, state = Run(model, steps=steps), torch.load(complete[-1], weights_only=True)
    run.optimizer.load_state_dict(state["optimizer"])
    run.schedule.load_state_dict(state["schedule"])
    run.done = state["done"]
    torch.set_rng_state(state["generator"])
    return run


def main(
    steps: Annotated[int, typer.Option(min=1)] = 200,
    every: Annotated[int, typer.Option(min=1, help="Steps from one checkpoint to the next.")] = 50,
    out: Annotated[Path, typer.Option(help="Directory for the checkpoints.")] = Path("build/plain-pytorch"),
    resumed: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,  # noqa: FBT002
) -> None:
    """Train an adapter in a plain loop with checkpoints."""
    run = resume(out, steps=steps) if resumed else begin(steps=steps)
    while run.done < steps:
        losses = list(run.train(min(run.done + every, steps)))
        run.save(out)
        print(f"step {run.done}: loss {sum(losses) / len(losses):.4f}")


if __name__ == "__main__":
    typer.run(main)

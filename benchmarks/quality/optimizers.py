"""The best rate of Muon and of SGD on Λ and Γ at three widths: ``python -m benchmarks.quality.optimizers``.

The matrices of `spectrum` are fitted in 50 steps. Runs that are kept are not made again; a table is printed of all, of
which docs/learning_rate.md has the best rates.
"""

import statistics
import sys
from collections.abc import Callable, Iterable
from itertools import product

import torch
from torch import Tensor

import randlora
from benchmarks.machine import describe
from benchmarks.quality.contestants import ours
from benchmarks.quality.runs import KEPT, Key, Run, add_run, read_runs
from benchmarks.quality.spectrum import WIDTH_TASKS
from benchmarks.quality.task import Task
from benchmarks.quality.training import LARGEST_NORM, rate_at

OPTIMIZERS: dict[str, tuple[Callable[[Iterable[Tensor], float], torch.optim.Optimizer], tuple[float, ...]]] = {
    "Muon": (
        lambda trained, lr: torch.optim.Muon(trained, lr, weight_decay=0.0),
        tuple(1e-3 * 2**power for power in range(9)),
    ),
    "SGD": (
        lambda trained, lr: torch.optim.SGD(trained, lr, momentum=0.9),
        tuple(4.0**power for power in range(-5, 2)),
    ),
}
"""By name, how to make one, and its rates."""

TASKS = [task for task in WIDTH_TASKS if task.name.endswith((" 64", " 256", " 512"))]
SEEDS = range(3)
FILE = KEPT / "optimizers.jsonl"


def make_run(task: Task, key: Key) -> Run:
    """Fit the matrix of a task with one optimizer at one rate."""
    torch.manual_seed(key.seed)
    prepared = task.prepare(key.seed, "full")
    ours(prepared, key.seed)
    trained = randlora.trainable_parameters(prepared.model)
    optimizer = OPTIMIZERS[key.contestant][0](trained, key.lr)
    steps = len(prepared.batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps))
    for batch in prepared.batches:
        optimizer.zero_grad()
        prepared.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, LARGEST_NORM)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return Run(key, prepared.measure(), None, 0.0, 0, sum(each.numel() for each in trained), 0, describe("cpu"))


def main() -> None:
    """Make the runs that are missing, and print the mean residual of each rate."""
    torch.set_num_threads(1)
    known = {run.key: run for run in read_runs(FILE)}
    for task, (name, (_, rates)) in product(TASKS, OPTIMIZERS.items()):
        for key in (Key(task.name, name, lr, seed) for lr, seed in product(rates, SEEDS)):
            if key not in known:
                known[key] = make_run(task, key)
                add_run(FILE, known[key])
        means = {
            lr: statistics.mean(known[Key(task.name, name, lr, seed)].found[task.metric] for seed in SEEDS)
            for lr in rates
        }
        sys.stdout.write(f"{task.name}, {name}: {', '.join(f'{lr:g} {mean:.3f}' for lr, mean in means.items())}\n")


if __name__ == "__main__":
    main()

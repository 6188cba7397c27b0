"""`randlora demo`."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import randlora
from randlora.errors import CheckpointError
from randlora.report import Progress, as_bytes, no_progress

STEPS, WARM_UP = 300, 20
WIDTH, EXAMPLES = 64, 512

Stage = tuple[str, str, dict[str, Any]]
"""One step of the demo: what is called, the result in words, and its figures for JSON."""


def demo(*, keep: str | None = None, progress: Progress = no_progress) -> tuple[str, dict[str, Any]]:
    """Show every step on a small model that is made on the spot: inject, train, save, load, merge, verify.

    The task is to imitate a model with entirely different weights. Nothing is downloaded, and it takes seconds on one
    core.

    Args:
        keep: Keep the adapter in this directory, which must not exist.
        progress: Called for every step of training.
    """
    if keep is not None and Path(keep).exists():
        raise CheckpointError(f"{keep} exists: choose a different name, or remove it")
    with TemporaryDirectory() as scratch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stages = list(_stages(Path(keep or f"{scratch}/adapter"), progress))
    told = [f"{number}. {title}\n{said.rstrip()}" for number, (title, said, _) in enumerate(stages, 1)]
    lines = ["\n   ".join(each.splitlines()) for each in told]
    facts = {name: value for _, _, figures in stages for name, value in figures.items()}
    return "\n".join([*lines, *([] if keep is None else [f"kept: randlora inspect {keep}"])]), facts


def _stages(directory: Path, progress: Progress) -> Iterator[Stage]:
    base = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH // 4)
    )
    other = deepcopy(base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5 * parameter.std().item())
        examples, new = torch.randn(2, EXAMPLES * 4, WIDTH)
        wanted, expected = other(examples), other(new)
    model = deepcopy(base)
    before = _error(model, new, expected)
    yield "a model, and a task that it cannot do yet", f"error on new examples: {before:.0%}", {"before": before}

    report = randlora.inject(model, r=4)
    yield "randlora.inject(model, r=4)", str(report), {"report": report}

    _train(model, examples, wanted, report.learning_rate, progress)
    after = _error(model, new, expected)
    said = f"error on new examples: {after:.0%}, with {report.share:.0%} of the parameters trained"
    yield f"{STEPS} steps of Adam on the adapter alone", said, {"after": after}

    size = randlora.save(model, directory).nbytes
    said = f"{as_bytes(size)}: Λ, Γ, and the seed of the bases"
    yield 'randlora.save(model, "adapter")', said, {"nbytes": size}

    twin = deepcopy(base)
    randlora.load(twin, directory)
    with torch.no_grad():
        outputs = model(new)
        is_equal = torch.equal(twin(new), outputs)
        said = f"the outputs are {'the same, bit for bit' if is_equal else 'different'}"
        yield 'randlora.load(copy_of_the_base, "adapter")', said, {"loads_equal": is_equal}

        randlora.merge(twin)
        apart = ((twin(new) - outputs).norm() / outputs.norm()).item()
        said = (
            f"plain layers again, and the same outputs except for rounding ({'below 1e-5' if apart < 1e-5 else apart})"
        )
        yield "randlora.merge(copy_of_the_base)", said, {"merged_apart": apart}

    verification = randlora.files.verify(directory)
    verdict = "the adapter is sound" if verification.passed else str(verification)
    yield 'randlora.files.verify("adapter")', verdict, {"passed": verification.passed}


def _error(model: nn.Module, inputs: Tensor, expected: Tensor) -> float:
    """Return the mean squared error as a share of the variance of what is expected."""
    with torch.no_grad():
        return float((model(inputs) - expected).square().mean() / expected.var())


def _train(model: nn.Module, inputs: Tensor, expected: Tensor, learning_rate: float | None, progress: Progress) -> None:
    """Train the adapter with Adam, a short warm-up, and a learning rate that falls to zero."""
    assert learning_rate is not None, "the adapter is trainable"
    optimizer = torch.optim.Adam(randlora.trainable_parameters(model), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / WARM_UP, 1 - step / STEPS))
    for step in range(STEPS):
        chosen = torch.randperm(len(inputs))[:EXAMPLES]
        loss = (model(inputs[chosen]) - expected[chosen]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step + 1, STEPS, "training")

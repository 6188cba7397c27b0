"""`randlora demo`."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

import randlora
from randlora.cli.output import plain, progress_bar, show, show_json
from randlora.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from randlora.report import Progress

STEPS, WARM_UP = 300, 20
WIDTH, EXAMPLES = 64, 512

AsJson = Annotated[bool, Option("--json", help="Print one JSON object and nothing else.")]
Keep = Annotated[Path | None, Option(help="Keep the adapter in this directory, which must not exist.")]


def demo(keep: Keep = None, as_json: AsJson = False) -> None:  # noqa: FBT002
    """Adapt a small model that is made on the spot: inject, train, save, load, merge, verify.

    The task is to compute what another model computes, all of whose weights differ. Nothing is downloaded, and it takes
    seconds on one core.

    **Examples**

    `randlora demo --keep first-adapter`

    `randlora demo --json`
    """
    import torch  # noqa: PLC0415 - it takes seconds, which `--help` should not

    if keep is not None and keep.exists():
        raise CheckpointError(f"{keep} exists: choose another name, or remove it")
    with TemporaryDirectory() as scratch, progress_bar() as progress, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stages = list(_stages(keep or Path(scratch, "adapter"), progress))
    if as_json:
        show_json({name: value for stage in stages for name, value in stage.figures.items()})
        return
    for number, stage in enumerate(stages, 1):
        show(f"{number}. {stage.title}\n   " + stage.text.replace("\n", "\n   ").rstrip())
    if keep is not None:
        show(f"kept: randlora inspect {keep}")


@dataclass(frozen=True)
class Stage:
    """One step of the account: what is called, what came of it, and the same as figures for JSON."""

    title: str
    text: str
    figures: dict[str, Any]


def _stages(directory: Path, progress: Progress) -> Iterator[Stage]:
    import torch  # noqa: PLC0415 - as above
    from torch import nn  # noqa: PLC0415

    from randlora.report import as_bytes  # noqa: PLC0415

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
    yield Stage("a model, and a task that it cannot do yet", f"error on new examples: {before:.0%}", {"before": before})

    report = randlora.inject(model, r=4)
    yield Stage("randlora.inject(model, r=4)", str(report), {"report": plain(report)})

    _train(model, examples, wanted, report.learning_rate, progress)
    after = _error(model, new, expected)
    text = f"error on new examples: {after:.0%}, with {report.share:.0%} of the parameters trained"
    yield Stage(f"{STEPS} steps of Adam on the adapter alone", text, {"after": after})

    saved = randlora.save(model, directory)
    yield Stage(
        'randlora.save(model, "adapter")',
        f"{as_bytes(saved.nbytes)}: Λ, Γ, and the seed of the bases",
        {"nbytes": saved.nbytes},
    )

    twin = deepcopy(base)
    randlora.load(twin, directory)
    with torch.no_grad():
        outputs = model(new)
        is_equal = torch.equal(twin(new), outputs)
        text = f"the outputs are {'the same, bit for bit' if is_equal else 'others'}"
        yield Stage('randlora.load(copy_of_the_base, "adapter")', text, {"loads_equal": is_equal})

        randlora.merge(twin)
        apart = ((twin(new) - outputs).norm() / outputs.norm()).item()
        text = f"plain layers again, and the same outputs but for rounding ({'below 1e-5' if apart < 1e-5 else apart})"
        yield Stage("randlora.merge(copy_of_the_base)", text, {"merged_apart": apart})

    verification = randlora.files.verify(directory)
    verdict = "the adapter is sound" if verification.passed else str(verification)
    yield Stage('randlora.files.verify("adapter")', verdict, {"passed": verification.passed})


def _error(model: nn.Module, inputs: Tensor, expected: Tensor) -> float:
    """Return the mean squared error as a share of the variance of what is expected."""
    import torch  # noqa: PLC0415 - as above

    with torch.no_grad():
        return float((model(inputs) - expected).square().mean() / expected.var())


def _train(model: nn.Module, inputs: Tensor, expected: Tensor, learning_rate: float | None, progress: Progress) -> None:
    """Train the adapter with Adam, a short warm-up, and a learning rate that falls to zero."""
    import torch  # noqa: PLC0415 - as above

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

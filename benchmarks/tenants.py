"""Training many adapters in one batch: a step of all tenants, beside one after another and one adapter on all rows."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import randlora
from benchmarks.command import Settings, main
from benchmarks.models import VOCABULARY
from benchmarks.results import Row
from benchmarks.routed import name_of, ours
from benchmarks.timing import interleaved

TENANTS = 1, 4, 16, 64
ROWS_EACH, TOKENS = 2, 32
QUICK_TENANTS, QUICK_REPEATS, FULL_REPEATS = 16, 5, 9


def step(
    model: nn.Module, names: Sequence[str | None], ids: Tensor, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Take a step of the tenants of a batch, each with the mean of its own rows as its loss."""
    with randlora.serving.routed(model, names):
        backward(model, ids)
    finish(optimizers)


def backward(model: nn.Module, ids: Tensor) -> None:
    """Add up the gradients of the losses of all rows, of which each tenant has as many."""
    logits = model(input_ids=ids).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").div(ROWS_EACH).backward()


def finish(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Let optimizers take their step."""
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def one_after_another(
    model: nn.Module, names: Sequence[str], ids: Tensor, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Take a step of each tenant with its own rows, and with its adapter alone active."""
    for name, own, optimizer in zip(names, ids.split(ROWS_EACH), optimizers, strict=True):
        randlora.activate(model, name)
        backward(model, own)
        finish([optimizer])


def alone(model: nn.Module, ids: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Take a step of one adapter with all rows."""
    backward(model, ids)
    finish(optimizers)


def row(count: int, device: str, repeats: int) -> Row:
    """Time a step of a number of tenants in each way, with dense bases and with blocks."""
    names = [name_of(number) for number in range(count)]
    ids = torch.randint(VOCABULARY, (count * ROWS_EACH, TOKENS), device=device)
    of_rows = [name for name in names for _ in range(ROWS_EACH)]
    runs: dict[str, Callable[[], object]] = {}
    for kind, options in {"dense": {}, "block": {"basis": "block", "blocks": (4, 8)}}.items():
        given: dict[str, Any] = {"trainable": True, **options}
        model, single, in_turn = (ours(size, device, **given) for size in (count, 1, count))
        optimizers, of_one, of_turn = (
            [torch.optim.AdamW(randlora.trainable_parameters(each, name)) for name in named]
            for each, named in ((model, names), (single, names[:1]), (in_turn, names))
        )
        runs |= {
            f"{kind}, together": partial(step, model, of_rows, ids, optimizers),
            f"{kind}, one after another": partial(one_after_another, in_turn, names, ids, of_turn),
            f"{kind}, one adapter": partial(alone, single, ids, of_one),
        }
    return Row(f"{count} tenants of {ROWS_EACH} rows", interleaved(runs, device=device, repeats=repeats))


def run(settings: Settings) -> Sequence[Row]:
    """Measure 16 tenants, or in full 1 to 64."""
    counts = (QUICK_TENANTS,) if settings.is_quick else TENANTS
    return [row(count, settings.device, QUICK_REPEATS if settings.is_quick else FULL_REPEATS) for count in counts]


if __name__ == "__main__":
    main(("tenants", run))

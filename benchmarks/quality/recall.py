"""What is stored of facts that nothing but their storing is learned from: each key has a value drawn at random.

What is stored of a value are the log2(values) bits that it takes to name one, less the cross-entropy.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.task import Prepared, Size, Targets, Task

QUICK_BATCHES = 10


def recall(
    model: nn.Module,
    target: str,
    logits: Callable[[Tensor], Tensor],
    values: Tensor,
    count: int,
    generator: torch.Generator,
    *,
    size: Size,
    batch_size: int,
    epochs: int,
    drift: Callable[[], float],
) -> Prepared:
    """Return what is trained to recall values.

    Args:
        model: The model.
        target: Its layer that adapters change.
        logits: Returns logits of the values, ``(keys, values)``, given numbers of keys.
        values: The value of each key, ``(keys,)``.
        count: The number of values.
        generator: Shuffles the keys of each epoch.
        size: Whether to train for some batches alone.
        batch_size: Keys of a batch.
        epochs: How often each key is seen.
        drift: Returns the task's drift.
    """
    everything = torch.arange(len(values))

    def measure() -> dict[str, float]:
        found = logits(everything)
        bits = len(values) * (math.log(count) - float(F.cross_entropy(found, values))) / math.log(2)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        recalled = float((found.argmax(1) == values).float().mean())
        return {"bits": bits, "bits per parameter": bits / max(1, trained), "recalled": recalled, "drift": drift()}

    shuffled = [torch.randperm(len(values), generator=generator).split(batch_size) for _ in range(epochs)]
    batches = [batch for epoch in shuffled for batch in epoch]
    return Prepared(
        model,
        None,
        Targets([target], [target], [target]),
        batches[:QUICK_BATCHES] if size == "quick" else batches,
        lambda keys: F.cross_entropy(logits(keys), values[keys]),
        measure,
    )


def recall_task(name: str, drift: str, rates: tuple[float, ...], prepare: Callable[[int, Size], Prepared]) -> Task:
    """Make a task, given the learning rates of all."""
    return Task(
        name,
        metric="bits",
        is_better_if_larger=True,
        drift=drift,
        rates={"frozen": (0.0,), "full": rates, "adapter": rates, "small adapter": rates},
        head_rate=0.0,
        prepare=prepare,
        decimals=0,
    )

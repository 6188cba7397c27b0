"""Facts to be memorized: random keys, each with one of as many values as a matrix has rows, drawn at random.

There is nothing to generalize, and no direction is better than another: what can be stored is a question of size and
form alone. The matrix is zero at first, which knows nothing. What is stored of a value are the log2(values) bits that
it takes to name one, less the cross-entropy. There are more keys than any contestant can hold.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.task import Prepared, Size, Targets, Task

WIDTH = 128
KEYS = 8192
BATCH_SIZE = 1024
EPOCHS = 100
NAMES = ("0",)


def prepare(seed: int, size: Size) -> Prepared:
    """Draw the matrix, the keys and their values."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    nn.init.zeros_(layer.weight)
    model = nn.Sequential(layer)
    keys = torch.randn(KEYS, WIDTH, generator=generator)
    values = torch.randint(WIDTH, (KEYS,), generator=generator)

    def nats(chosen: Tensor) -> Tensor:
        return F.cross_entropy(model(keys[chosen]), values[chosen])

    def measure() -> dict[str, float]:
        surprise = float(nats(torch.arange(KEYS))) / math.log(2)
        bits = KEYS * (math.log2(WIDTH) - surprise)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return {
            "bits": bits,
            "bits per parameter": bits / max(1, trained),
            "recalled": float((model(keys).argmax(1) == values).float().mean()),
            "drift": float(model(torch.eye(WIDTH)).norm()) / math.sqrt(WIDTH),
        }

    epochs = [torch.randperm(KEYS, generator=generator).split(BATCH_SIZE) for _ in range(EPOCHS)]
    batches = [batch for epoch in epochs for batch in epoch]
    targets = Targets(NAMES, NAMES, NAMES)
    return Prepared(model, None, targets, batches[:10] if size == "quick" else batches, nats, measure)


RATES = (1e-3, 3e-3, 1e-2, 3e-2)
FACTS_TASK = Task(
    "facts",
    metric="bits",
    is_better_if_larger=True,
    drift="norm of the update, over that of the identity",
    rates={"frozen": (0.0,), "full": RATES, "adapter": RATES, "small adapter": RATES},
    head_rate=0.0,
    prepare=prepare,
    decimals=0,
)

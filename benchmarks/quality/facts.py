"""Facts to be memorized: random keys, each with one of as many values as a matrix has rows, drawn at random.

There is nothing to generalize, and no direction is better than another: what can be stored is a question of size and
form alone. The matrix is zero at first, which knows nothing. There are more keys than any contestant can hold.
"""

import math

import torch
from torch import nn

from benchmarks.quality.recall import recall, recall_task
from benchmarks.quality.task import Prepared, Size

WIDTH = 128
KEYS = 8192
BATCH_SIZE = 1024
EPOCHS = 100


def prepare(seed: int, size: Size) -> Prepared:
    """Draw the matrix, the keys and their values."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    nn.init.zeros_(layer.weight)
    model = nn.Sequential(layer)
    keys = torch.randn(KEYS, WIDTH, generator=generator)
    return recall(
        model,
        "0",
        lambda chosen: model(keys[chosen]),
        torch.randint(WIDTH, (KEYS,), generator=generator),
        WIDTH,
        generator,
        size=size,
        batch_size=BATCH_SIZE,
        epochs=EPOCHS,
        drift=lambda: float(model(torch.eye(WIDTH)).norm()) / math.sqrt(WIDTH),
    )


FACTS_TASK = recall_task("facts", "norm of the update, over that of the identity", (1e-3, 3e-3, 1e-2, 3e-2), prepare)

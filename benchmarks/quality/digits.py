"""Digits turned and inverted, for a small vision transformer that has seen upright ones.

The images are scikit-learn's: 1,797 of 8 x 8 pixels. The model is trained anew for each seed on upright digits, and
then learns others of them, turned by 90° and dark on bright, of which it knows next to nothing. Its head stays as it
is, so that the layers below have to learn everything. Forgetting is what it loses on upright digits it has never seen.
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from benchmarks.quality.task import Prepared, Size, Targets, Task

SIDE, PATCH, WIDTH, DEPTH, HEADS, CLASSES = 8, 2, 128, 2, 4, 10
KNOWN, TRAINING, VALIDATION = 900, 300, 200  # images; the others are for tests
PRETRAINING_EPOCHS, EPOCHS, BATCH_SIZE = 20, 5, 32
PRETRAINING_LR = 1e-3
upright = nn.Identity()
LAYERS = r"vit\.layers\..*\.(q_proj|k_proj|v_proj|o_proj|fc1|fc2)"


@cache
def read_digits() -> tuple[Tensor, Tensor]:
    """Return all images, ``(images, 1, 8, 8)`` from -1 to 1, and their labels."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  (which takes two seconds to import)

    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, torch.tensor(digits.target)


def loss_of(model: Any, turn: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Return the loss of some images after they are turned, or not."""
    images, labels = read_digits()
    return F.cross_entropy(model(turn(images[rows])).logits, labels[rows])


@torch.no_grad()
def accuracy(model: Any, turn: Callable[[Tensor], Tensor], rows: Tensor) -> float:
    """Return the share of images whose digit is found after they are turned, or not."""
    images, labels = read_digits()
    return float((model.eval()(turn(images[rows])).logits.argmax(1) == labels[rows]).float().mean())


def turned(images: Tensor) -> Tensor:
    """Turn images by 90° and invert them."""
    return -images.rot90(dims=(2, 3))


@cache
def pretrained(seed: int, size: Size) -> tuple[Any, Tensor]:
    """Return a model trained on upright digits, and the numbers of the others in random order."""
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        image_size=SIDE,
        patch_size=PATCH,
        num_channels=1,
        num_labels=CLASSES,
    )
    model = transformers.ViTForImageClassification(config)
    generator = torch.Generator().manual_seed(seed)
    known, others = torch.randperm(len(read_digits()[1]), generator=generator).tensor_split([KNOWN])
    epochs = 1 if size == "quick" else PRETRAINING_EPOCHS
    batches = [rows for _ in range(epochs) for rows in known[torch.randperm(KNOWN, generator=generator)].split(50)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=len(batches))
    for rows in batches:
        optimizer.zero_grad()
        loss_of(model.train(), upright, rows).backward()
        optimizer.step()
        schedule.step()
    return model, others


def prepare(seed: int, size: Size) -> Prepared:
    """Copy the model, and draw what to learn."""
    loaded, others = pretrained(seed, size)
    model = copy.deepcopy(loaded)
    training, validation, test = others.tensor_split([TRAINING, TRAINING + VALIDATION])
    before = accuracy(model, upright, test)
    generator = torch.Generator().manual_seed(seed)
    epochs = 1 if size == "quick" else EPOCHS
    shuffled = [training[torch.randperm(TRAINING, generator=generator)].split(BATCH_SIZE) for _ in range(epochs)]

    def measure() -> dict[str, float]:
        return {
            "accuracy": accuracy(model, turned, test),
            "validation": accuracy(model, turned, validation),
            "drift": before - accuracy(model, upright, test),
        }

    return Prepared(
        model,
        None,
        Targets(LAYERS, LAYERS, LAYERS),
        [batch for epoch in shuffled for batch in epoch],
        lambda rows: loss_of(model, turned, rows),
        measure,
    )


DIGITS_TASK = Task(
    "digits",
    metric="accuracy",
    is_better_if_larger=True,
    drift="accuracy lost on upright digits",
    rates={
        "frozen": (0.0,),
        "full": (3e-4, 1e-3, 3e-3),
        "adapter": (1e-3, 3e-3, 1e-2),
        "small adapter": (3e-3, 1e-2, 3e-2),
    },
    head_rate=0.0,
    prepare=prepare,
    width=WIDTH,
    in_percent=True,
    decimals=1,
)

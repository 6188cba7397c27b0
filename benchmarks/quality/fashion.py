"""New classes for a small vision transformer: trained on clothes of five classes, it learns five others.

The images are Fashion-MNIST's, from Debian's package: 28 x 28 pixels, ten classes. The model is trained anew for each
seed on the classes 0 to 4 (tops, trousers, coats), and then gets a new head for 5 to 9 (shoes, shirts, bags).
Forgetting is what it loses on the first five with its first head.
"""

import copy
import gzip
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.task import Prepared, Size, Targets, Task

DIRECTORY = Path("build/data/fashion-mnist")
CLASSES = 5
PATCH = 4
WIDTH = 96
HEADS = 4
DEPTH = 4
BATCH_SIZE = 50
PRETRAINING_BATCH = 100
PRETRAINING_LR = 1e-3
LINEAR = r"blocks\.\d+\.(up|down)"
LORA = r"blocks\.\d+\.(up|down|attention)"
OURS = r"blocks\.\d+\.(up|down|attention\.in_proj_weight|attention\.out_proj)"


@dataclass(frozen=True)
class Images:
    """Images, ``(images, 28, 28)``, and their labels."""

    pixels: Tensor
    labels: Tensor

    def __getitem__(self, rows: Tensor) -> "Images":
        """Choose some images."""
        return Images(self.pixels[rows], self.labels[rows])


@cache
def read_images(part: str) -> tuple[Images, Images]:
    """Read the classes 0 to 4, and 5 to 9, each with labels from 0, of ``"train"`` or ``"t10k"``.

    All pixels together have mean 0 and standard deviation 1.

    Raises:
        FileNotFoundError: Where the files are not there.
    """
    files = [DIRECTORY / f"{part}-{what}-ubyte.gz" for what in ("images-idx3", "labels-idx1")]
    if missing := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(f"there is no {missing[0]}: `make build/data/fashion-mnist` unpacks Debian's package")
    pixels, labels = (np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8) for file in files)
    values = torch.from_numpy(pixels[16:].reshape(-1, 28, 28).copy()).float() / 255
    values = (values - 0.286) / 0.353
    classes = torch.from_numpy(labels[8:].copy()).long()
    halves = [classes < CLASSES, classes >= CLASSES]
    first, second = (Images(values[half], classes[half] % CLASSES) for half in halves)
    return first, second


class Block(nn.Module):
    """A layer of a transformer, with attention that reads its weights, as torch's does."""

    def __init__(self) -> None:
        """Make one with random weights."""
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(images, patches, WIDTH)`` to the same shape."""
        normed = self.attention_norm(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        output: Tensor = x + self.down(F.gelu(self.up(self.mlp_norm(x))))
        return output


class VisionTransformer(nn.Module):
    """A transformer over patches, with a linear head on the mean of its tokens."""

    def __init__(self) -> None:
        """Make one with random weights."""
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, WIDTH)
        self.position = nn.Parameter(torch.randn((28 // PATCH) ** 2, WIDTH) * 0.1)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def features(self, pixels: Tensor) -> Tensor:
        """Return the mean of the tokens, ``(images, WIDTH)``."""
        patches = F.unfold(pixels.unsqueeze(1), PATCH, stride=PATCH).transpose(1, 2)
        mean: Tensor = self.norm(self.blocks(self.embed(patches) + self.position)).mean(1)
        return mean

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits, ``(images, classes)``."""
        logits: Tensor = self.head(self.features(pixels))
        return logits


@torch.no_grad()
def accuracy(model: VisionTransformer, head: nn.Module, images: Images) -> float:
    """Return the share of images whose class a head finds."""
    model.eval()
    right = [
        (head(model.features(images.pixels[rows])).argmax(1) == images.labels[rows]).sum()
        for rows in torch.arange(len(images.labels)).split(500)
    ]
    return int(sum(right)) / len(images.labels)


def pretrained(seed: int, size: Size) -> VisionTransformer:
    """Return a model trained on the first five classes, where all contestants start; it is kept in a file."""
    file = DIRECTORY / f"pretrained_{seed}.pt"
    model = VisionTransformer()
    if size == "full" and file.is_file():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model
    images = read_images("train")[0]
    count, epochs = (2000, 1) if size == "quick" else (10000, 3)
    generator = torch.Generator().manual_seed(seed)
    batches = [
        rows for _ in range(epochs) for rows in torch.randperm(count, generator=generator).split(PRETRAINING_BATCH)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=len(batches))
    model.train()
    for rows in batches:
        batch = images[rows]
        optimizer.zero_grad()
        F.cross_entropy(model(batch.pixels), batch.labels).backward()
        optimizer.step()
        schedule.step()
    if size == "full":
        torch.save(model.state_dict(), file)
    return model


def prepare(seed: int, size: Size, *, times: int = 1) -> Prepared:
    """Train the model on five classes, and give it a new head for five others; ``times`` multiplies the steps."""
    train_size, test_size, epochs = (200, 200, 2) if size == "quick" else (600, 1000, 4)
    model = pretrained(seed, size)
    old_head = copy.deepcopy(model.head).requires_grad_(requires_grad=False)
    torch.manual_seed(seed)
    model.head.reset_parameters()
    known, new = read_images("t10k")
    generator = torch.Generator().manual_seed(seed)
    training = read_images("train")[1]
    training = training[torch.randperm(len(training.labels), generator=generator)[:train_size]]
    drawn = [images[torch.randperm(len(images.labels), generator=generator)[:test_size]] for images in (known, new)]
    before = accuracy(model, old_head, drawn[0])

    def measure() -> dict[str, float]:
        return {
            "accuracy": accuracy(model, model.head, drawn[1]),
            "drift": before - accuracy(model, old_head, drawn[0]),
        }

    return Prepared(
        model,
        model.head,
        Targets(OURS, LORA, LINEAR),
        [
            training[rows]
            for _ in range(times * epochs)
            for rows in torch.randperm(train_size, generator=generator).split(BATCH_SIZE)
        ],
        lambda batch: F.cross_entropy(model(batch.pixels), batch.labels),
        measure,
    )


CLOTHES_TASK = Task(
    "clothes",
    metric="accuracy",
    is_better_if_larger=True,
    drift="accuracy lost on the five classes that the model knew",
    rates={
        "frozen": (0.0,),
        "full": (3e-4, 1e-3, 3e-3),
        "adapter": (1e-3, 3e-3, 1e-2),
        "small adapter": (3e-3, 1e-2, 3e-2),
    },
    head_rate=1e-2,
    prepare=prepare,
    width=WIDTH,
    in_percent=True,
    decimals=1,
)

"""A matrix to be learned whose spectrum is known: a linear map W is to become W + Δ, with white inputs.

All singular values of Δ are equal, or the k-th is proportional to 1/k; the Frobenius norm is a fifth of that of W in
both. Δ is zero on a quarter of the directions of the inputs, and the inputs have none of these: a method that knew
would leave W as it is there, and whatever its update does to them is drift.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.quality.task import Prepared, Size, Targets, Task

SHARE = 0.2
SEEN = 0.75
BATCH_SIZE = 128
NAMES = ("0",)
SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {"flat": torch.ones_like, "steep": torch.reciprocal}
"""By name, the singular values in proportion, of their numbers from 1."""


def prepare(spectrum: str, width: int, steps: int, seed: int, size: Size) -> Prepared:
    """Draw W, Δ and the inputs."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(width, width, bias=False)
    start = torch.randn(width, width, generator=generator) / math.sqrt(width)
    layer.weight.data.copy_(start)
    model = nn.Sequential(layer)
    left, right = (nn.init.orthogonal_(torch.empty(width, width), generator=generator) for _ in range(2))
    seen, unseen = right.split([round(SEEN * width), width - round(SEEN * width)], dim=1)
    values = SPECTRA[spectrum](torch.arange(1.0, seen.shape[1] + 1))
    norm = SHARE * math.sqrt(width)
    wanted = left[:, : len(values)] * (values * norm / values.norm()) @ seen.T
    count = 10 if size == "quick" else steps
    batches = [torch.randn(BATCH_SIZE, seen.shape[1], generator=generator) @ seen.T for _ in range(count)]

    def loss(inputs: Tensor) -> Tensor:
        """Return the square of the residual, as these inputs show it."""
        error: Tensor = model(inputs) - inputs @ (start + wanted).T
        return error.square().sum(1).mean() / norm**2

    def measure() -> dict[str, float]:
        update = model(torch.eye(width)).T - start
        largest = float(torch.linalg.matrix_norm(update, 2))
        return {
            "residual": float(((wanted - update) @ seen).norm()) / norm,
            "drift": float((update @ unseen).norm()) / norm,
            "stable rank": float(update.norm()) ** 2 / largest**2 if largest else 0.0,
            "spectral norm": largest / norm,
        }

    return Prepared(model, None, Targets(NAMES, NAMES, NAMES), batches, loss, measure)


def spectrum_task(
    name: str, spectrum: str, width: int, steps: int, full: tuple[float, ...], adapter: tuple[float, ...]
) -> Task:
    """Make a task, given the learning rates of full fine-tuning and of adapters."""
    return Task(
        name,
        metric="residual",
        is_better_if_larger=False,
        drift="norm of the update on inputs never seen, over that of the wanted one",
        rates={"frozen": (0.0,), "full": full, "adapter": adapter, "small adapter": adapter},
        head_rate=0.0,
        prepare=partial(prepare, spectrum, width, steps),
    )


RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SPECTRUM_TASKS = [
    spectrum_task(f"{spectrum} spectrum", spectrum, 128, 200, RATES[:-1], RATES[1:]) for spectrum in SPECTRA
]
WIDTH_TASKS = [
    spectrum_task(f"{spectrum} spectrum {width}", spectrum, width, 50, RATES, tuple(2.5e-4 * 2**k for k in range(9)))
    for spectrum in SPECTRA
    for width in (64, 256, 512, 1024, 2048)
]
"""The same at other widths, with a quarter of the steps, so that rates matter: does one do for all widths?"""

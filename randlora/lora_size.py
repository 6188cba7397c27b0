"""Sizes beside LoRA's: which r has the parameters of a LoRA on the same weights, and which LoRA those of an r."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from randlora.bases.spec import Shape, count_trainable
from randlora.config import RandLoRAConfig


def lora_parameters(shapes: Iterable[Shape]) -> int:
    """Return the number of parameters of a LoRA of rank 1: ``in + out`` for each matrix of a weight."""
    return sum(math.prod(shape[:-2]) * sum(shape[-2:]) for shape in shapes)


BLOCK_STEP = 8
"""Of which r is a multiple for ``block`` bases where the size allows: their blocks divide r, so few divide a prime."""


def r_like_lora(shapes: Mapping[str, Shape], lora_r: int, config: RandLoRAConfig) -> int:
    """Return the r whose number of parameters is nearest to that of a LoRA on the same weights.

    Above the smaller side of all weights, a larger r trains more parameters and adds no rank, so none is tried. Blocks
    that are given divide r.

    Args:
        shapes: The shapes of the updates, by FQN.
        lora_r: The rank of the LoRA.
        config: The other options.
    """
    wanted = lora_r * lora_parameters(shapes.values())
    counts: dict[Shape, int] = {}
    for shape in shapes.values():
        counts[shape] = counts.get(shape, 0) + 1

    def distance(r: int) -> int:
        return abs(sum(count * count_trainable(shape, r) for shape, count in counts.items()) - wanted)

    largest = max(min(shape[-2:]) for shape in counts)
    step = math.lcm(*config.blocks or (1,))
    found = min(range(step, max(step, largest) + 1, step), key=distance)
    if config.basis != "block" or config.blocks is not None or found < BLOCK_STEP:
        return found
    return min(range(BLOCK_STEP, largest + 1, BLOCK_STEP), key=distance)

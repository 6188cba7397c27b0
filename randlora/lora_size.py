"""Sizes beside LoRA's: which r has the parameters of a LoRA on the same weights, and which LoRA those of an r."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from randlora.bases.spec import Shape, count_trainable


def lora_parameters(shapes: Iterable[Shape]) -> int:
    """Return the number of parameters of a LoRA of rank 1: ``in + out`` for each matrix of a weight."""
    return sum(math.prod(shape[:-2]) * sum(shape[-2:]) for shape in shapes)


def r_like_lora(shapes: Mapping[str, Shape], lora_r: int) -> int:
    """Return the r whose number of parameters is nearest to that of a LoRA on the same weights.

    Above the smaller side of all weights, a larger r trains more parameters and adds no rank, so none is tried.

    Args:
        shapes: The shapes of the updates, by FQN.
        lora_r: The rank of the LoRA.
    """
    wanted = lora_r * lora_parameters(shapes.values())
    counts: dict[Shape, int] = {}
    for shape in shapes.values():
        counts[shape] = counts.get(shape, 0) + 1

    def distance(r: int) -> int:
        return abs(sum(count * count_trainable(shape, r) for shape, count in counts.items()) - wanted)

    return min(range(1, max(min(shape[-2:]) for shape in counts) + 1), key=distance)

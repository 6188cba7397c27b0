"""Sizes beside LoRA's: which r has the parameters of a LoRA on the same weights, and which LoRA those of an r."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable

from randlora.bases.spec import count_trainable
from randlora.config import RandLoRAConfig
from randlora.errors import ConfigError, spelled
from randlora.targets.site import Site

BLOCK_STEP = 8
"""Of which r is a multiple for ``block`` bases where the size allows: their blocks divide r, so few divide a prime."""

NEAR = 0.1
"""By which share of the wanted number of parameters such a multiple may miss it."""

OUT_OF_REACH = 1.5
"""The factor by which the nearest number of parameters may differ from the wanted one."""


def lora_parameters(sites: Iterable[Site]) -> int:
    """Return the number of parameters of a LoRA of rank 1: ``in + out`` for each matrix of a weight."""
    return sum(math.prod(site.shape[:-2]) * sum(site.shape[-2:]) for site in sites)


def r_like_lora(sites: Collection[Site], lora_r: int, config: RandLoRAConfig) -> int:
    """Return the r whose number of parameters is nearest to that of a LoRA on the same weights.

    Above the smaller side of all weights, a larger r trains more parameters and adds no rank, so none is tried. Blocks
    that are given divide r. Where none are given, ``block`` bases get a multiple of 8 if one is within a tenth.

    Args:
        sites: The weights.
        lora_r: The rank of the LoRA.
        config: The other options.

    Raises:
        ConfigError: If no r has nearly as many parameters.
    """
    of_rank_one = lora_parameters(sites)
    wanted = lora_r * of_rank_one
    shapes = Counter(site.shape_with(config) for site in sites)

    def size(r: int) -> int:
        return sum(count * count_trainable(shape, r) for shape, count in shapes.items())

    def distance(r: int) -> int:
        return abs(size(r) - wanted)

    largest = max(min(shape[-2:]) for shape in shapes)
    step = math.lcm(*config.blocks or (1,))
    tried = range(step, max(step, largest) + 1, step)
    found = min(tried, key=distance)
    if not 1 / OUT_OF_REACH <= size(found) / wanted <= OUT_OF_REACH:
        most, least = (size(r) / of_rank_one for r in (tried[0], tried[-1]))
        raise ConfigError(
            f"{spelled('like_lora', lora_r)} is out of reach: on these layers RandLoRA has as many parameters as a "
            f"LoRA of rank {least:.2g} to {most:.2g}, with r from {tried[-1]} down to {tried[0]}"
        )
    if config.basis == "block" and config.blocks is None and largest >= BLOCK_STEP:
        multiple = min(range(BLOCK_STEP, largest + 1, BLOCK_STEP), key=distance)
        return multiple if distance(multiple) <= NEAR * wanted else found
    return found

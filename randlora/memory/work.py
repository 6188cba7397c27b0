"""The work of a step in the adapted layers, in multiples of LoRA's: what a step costs in time, without a clock.

Counted in multiply-adds, and passes over memory by `pass_over`, as the choice of how a layer computes is. A product
with a frozen weight takes at least as long as a pass over it. LoRA's rank is 32, which our benchmarks compare with.
Another, as one of equal parameters, would change little: all but a few percent of LoRA's work are products with frozen
weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from randlora.bases.basis import Basis
from randlora.bases.spec import Shape, sliced_dims, spec_for
from randlora.errors import spelled
from randlora.functional import Pair
from randlora.functional.cost import Sizes, pass_over, step_cost
from randlora.layer_options import by_rank
from randlora.memory.pieces import Piece
from randlora.memory.temporary import pair_of
from randlora.state import Adapter

LORA_RANK = 32
WORTH_SAYING = 1.05
"""The work with the bases given, in multiples of that with `block` bases, above which the latter are named."""


@dataclass(frozen=True)
class Work:
    """The work of a step in the adapted layers, in multiples of that of LoRA with rank 32.

    Attributes:
        own: With the bases given.
        block: With ``basis="block"``.
    """

    own: float
    block: float

    def __str__(self) -> str:
        """Return a line of a report."""
        line = f"work of a step in the adapted layers: {self.own:.1f} times that of LoRA of rank {LORA_RANK}"
        return (
            f"{line}, {self.block:.1f} times with {spelled('basis', 'block')}"
            if self.own > WORTH_SAYING * self.block
            else line
        )


def block_bases(adapter: Adapter, shapes: Mapping[str, Shape]) -> dict[int, Basis]:
    """Return the `block` bases that an adapter of these layers would have by default, not drawn, by r."""
    config, bases = replace(adapter.config, basis="block", stream=None, blocks=None), {}
    for r, own in by_rank(shapes, adapter.options).items():
        bases[r] = Basis(spec_for(config, r, own))
        bases[r].extend(*sliced_dims(own))
    return bases


def frozen_cost(piece: Piece, entry: float, *, forwards: int) -> float:
    """Return the multiply-adds of a step of a frozen layer: some forwards, and the gradient of its input."""
    return (forwards + 1) * max(piece.tokens, entry) * math.prod(piece.shape)


def lora_cost(piece: Piece, entry: float, *, forwards: int) -> float:
    """Return those of a layer with LoRA."""
    thin = piece.tokens * LORA_RANK * sum(piece.shape)
    return frozen_cost(piece, entry, forwards=forwards) + (forwards + 2) * thin


def own_cost(piece: Piece, pair: Pair, entry: float, *, forwards: int) -> float:
    """Return those of an adapted layer, in the cheapest way."""
    sizes = Sizes(piece.tokens, *pair.shape[:5], piece.is_wide, has_weight=True, entry=entry)
    return frozen_cost(piece, entry, forwards=forwards) + step_cost(sizes, forwards=forwards)


def work_of(
    matrices: Counter[Piece],
    own: Mapping[int, Basis],
    block: Mapping[int, Basis],
    dtype: torch.dtype,
    device_type: str,
    *,
    forwards: int,
) -> Work | None:
    """Return the work of a step, or ``None`` if no weight is multiplied by tokens.

    Args:
        matrices: The matrices of updates, whole, with how many there are of each.
        own: The bases by r, on the meta device.
        block: `block` bases by r, on the meta device.
        dtype: The dtype that is computed in.
        device_type: The type of the device.
        forwards: How often a step runs the forward of a layer: twice with activation checkpointing.
    """
    entry = pass_over(device_type, dtype).multiply_adds
    lora = sum(count * lora_cost(piece, entry, forwards=forwards) for piece, count in matrices.items())
    if not lora:
        return None
    ours, blocks = (
        sum(
            count * own_cost(piece, pair_of(piece, bases[piece.r], dtype), entry, forwards=forwards)
            for piece, count in matrices.items()
        )
        for bases in (own, block)
    )
    return Work(ours / lora, blocks / lora)

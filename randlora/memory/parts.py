"""What part of each parameter a device has: all of it, a shard of the first dimension, a part of a layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from randlora.bases.spec import Shape
from randlora.functional.region import Span

LAYER_NUMBER = re.compile(r"\.\d+(?=\.|$)")
SPLIT_DIMS = {
    "colwise": -2,
    "colwise_rep": -2,
    "colwise_gather_output": -2,
    "packed_colwise": -2,
    "rowwise": -1,
    "rowwise_rep": -1,
    "rowwise_split_input": -1,
    "packed_rowwise": -1,
    "embedding_rowwise": 0,
    "embedding_colwise": 1,
}
"""The dimension of a weight that transformers' styles of tensor parallelism split, from the end where it is negative.

The other styles split none.
"""
SHARED_INPUT = "colwise"
"""The style of layers that are given the whole input of their module: those of one module share it."""


class Part(NamedTuple):
    """A parameter of the model or of the adapter.

    Attributes:
        fqn: Its name, or "" for Λ and Γ, which no plan splits.
        shape: Its shape.
        itemsize: Bytes of an entry.
        group: The block that is gathered with it, or ``""`` if it is in none.
        is_registered: Whether the model has it as a parameter, so that FSDP2 sees it.
    """

    fqn: str
    shape: Shape
    itemsize: float
    group: str = ""
    is_registered: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of the whole parameter."""
        return round(math.prod(self.shape) * self.itemsize)

    def shard_bytes(self, devices: int) -> int:
        """Return the bytes of a shard of FSDP2: rows of the first dimension, padded to equally many on all devices."""
        if not self.shape:
            return self.nbytes
        return round(math.ceil(self.shape[0] / devices) * math.prod(self.shape[1:]) * self.itemsize)

    def split_bytes(self, devices: int, style: str | None) -> int:
        """Return the bytes of the largest part under a style of tensor parallelism."""
        dim = SPLIT_DIMS.get(style or "")
        if dim is None or (len(self.shape) == 1 and dim == -1):  # the bias of a row-wise layer is whole
            return self.nbytes
        dim = max(dim + len(self.shape), 0) if dim < 0 else dim
        sides = [part_of(side, devices, 0)[1] if at == dim else side for at, side in enumerate(self.shape)]
        return round(math.prod(sides) * self.itemsize)


def part_of(size: int, devices: int, index: int) -> Span:
    """Return the range of a dimension that a device has: equally long ones but for the last, as torch splits it."""
    step = math.ceil(size / devices)
    return min(size, index * step), min(size, (index + 1) * step)


def style_of(fqn: str, tp_plan: Mapping[str, str]) -> str | None:
    """Return the style that a plan of tensor parallelism, as transformers writes it, has for a layer or a parameter."""
    name = LAYER_NUMBER.sub(".*", fqn)
    return tp_plan.get(name) or tp_plan.get(name.rpartition(".")[0])

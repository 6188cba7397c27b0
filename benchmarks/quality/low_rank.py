"""LoRA on any weight, once each, as PEFT starts and scales it.

PEFT's layer for `nn.MultiheadAttention` adds the update of the output projection twice, and no option of it leaves that
out. So where a model has such a layer, this takes its place.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """Adds the update to a weight."""

    def __init__(self, shape: Sequence[int], rank: int, scaling: float) -> None:
        """Start with an update of zero for a weight of this shape."""
        super().__init__()
        self.down, self.up = nn.Parameter(torch.empty(rank, shape[1])), nn.Parameter(torch.zeros(shape[0], rank))
        nn.init.kaiming_uniform_(self.down, math.sqrt(5))
        self.scaling = scaling

    def forward(self, weight: Tensor) -> Tensor:
        """Return the sum of a weight and its update, both ``(out_features, in_features)``."""
        return weight + self.scaling * self.up @ self.down

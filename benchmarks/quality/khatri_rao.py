"""KRAdapter (Albert et al., ICCV 2025): an update that is the Khatri-Rao product of two trained thin factors.

Row i of the update, of the smaller side, is the outer product of row i of both factors, flattened, and cut to the
length of the larger side. With about √min_dim columns each the factors have about 2·min_dim·√max_dim entries, and there
is no rank to choose. As in its authors' code the first factor starts at zero, and the update is multiplied by 2.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class KhatriRao(nn.Module):
    """Adds the update to a weight."""

    def __init__(self, shape: Sequence[int], scaling: float = 2.0) -> None:
        """Start with an update of zero for a weight of this shape."""
        super().__init__()
        self.shape, self.scaling = shape, scaling
        min_dim, max_dim = min(shape), max(shape)
        columns = math.isqrt(min_dim)
        self.first = nn.Parameter(torch.zeros(min_dim, columns))
        self.second = nn.Parameter(torch.empty(min_dim, math.ceil(max_dim / columns)))
        nn.init.kaiming_uniform_(self.second, a=5)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the sum of a weight and its update, both ``(out_features, in_features)``."""
        rows = (self.second.unsqueeze(2) * self.first.unsqueeze(1)).flatten(1)[:, : max(self.shape)]
        return weight + self.scaling * (rows if self.shape[0] <= self.shape[1] else rows.T)

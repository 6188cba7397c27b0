"""RandLoRA of which Λ alone is trained, with as many bases as make it as large as a LoRA.

Γ keeps its first value, 1 / min_dim, so the update is linear in what is trained, and sums and means of adapters are
exact. A is square, for a full rank. As all terms share A and Γ, the columns of B are summed up first, each times its
scaling, and multiplied by A once: ``update = s / min_dim · (Σ_j B_j Λ_j) A``.
"""

import math
from functools import cache

import torch
from torch import Tensor, nn


@cache
def draw_bases(max_dim: int, min_dim: int, num_bases: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw A, ``(min_dim, min_dim)``, and B, ``(min_dim, max_dim, num_bases)``, with a mean square of 1."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (min_dim, min_dim), (min_dim, max_dim, num_bases)
    basis_A, basis_B = ((2 * torch.rand(shape, generator=generator) - 1) * math.sqrt(3) for shape in shapes)
    return basis_A, basis_B


class LambdaAlone(nn.Module):
    """Adds the update to a weight."""

    basis_A: Tensor
    basis_B: Tensor

    def __init__(self, weight: Tensor, rank: int, seed: int, scaling: float = 20.0) -> None:
        """Start with an update of zero, with about as many numbers to train as a LoRA of some rank."""
        super().__init__()
        max_dim, min_dim = max(weight.shape), min(weight.shape)
        num_bases = max(1, round(rank * (max_dim + min_dim) / min_dim))
        for name, basis in zip(("basis_A", "basis_B"), draw_bases(max_dim, min_dim, num_bases, seed), strict=True):
            self.register_buffer(name, basis.to(weight.dtype), persistent=False)
        self.lam = nn.Parameter(torch.zeros(min_dim, num_bases))
        self.scaling, self.is_wide = scaling / min_dim, weight.shape[0] < weight.shape[1]

    def forward(self, weight: Tensor) -> Tensor:
        """Return the sum of a weight and its update, both ``(out_features, in_features)``."""
        columns = torch.bmm(self.basis_B, self.lam.unsqueeze(2).to(weight.dtype)).squeeze(2)  # (min_dim, max_dim)
        delta = self.scaling * columns.T @ self.basis_A
        return weight + (delta.T if self.is_wide else delta)

r"""Λ and Γ: scaling the small basis by them, and the gradients that come back.

A is held in blocks, ``(c, r/c, width)`` with ``width = ceil(min_dim / c)``: block t has the rows ``k ≡ t (mod c)`` and
the columns ``≡ t (mod c)``, outside of which A is zero. A dense A is one block, and nothing here copies for it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.functional import scratch


class Diagonals(NamedTuple):
    """The trained scalings of one adapter in one layer.

    Attributes:
        lam: Λ, ``(r, num_bases)``.
        gamma: Γ, ``(num_bases, min_dim)``.
        scaling: Factor of the update, ``alpha / r``.
    """

    lam: Tensor
    gamma: Tensor
    scaling: float

    def beside(self, basis_A: Tensor) -> tuple[Tensor, Tensor]:
        """Lay ``scaling · Λ``, ``(c, r/c, num_bases, 1)``, and Γ, ``(c, 1, num_bases, width)``, out as the blocks of A.

        Both come at least as wide as A, so that their product with it is rounded once.
        """
        blocks = len(basis_A)
        lam = self.lam.to(torch.promote_types(self.lam.dtype, basis_A.dtype)) * self.scaling
        gamma = self.gamma.to(torch.promote_types(self.gamma.dtype, basis_A.dtype))
        return lam.unflatten(0, (-1, blocks)).transpose(0, 1).unsqueeze(-1), split(gamma, blocks).unsqueeze(1)


def split(matrix: Tensor, blocks: int) -> Tensor:
    """Deal the columns of a matrix out to blocks, ``(rows, n)`` to ``(blocks, rows, ceil(n / blocks))``; 0 fills up."""
    if blocks == 1:
        return matrix.unsqueeze(0)
    if missing := -matrix.shape[1] % blocks:
        matrix = F.pad(matrix, (0, missing))
    dealt: Tensor = matrix.unflatten(1, (-1, blocks))
    return dealt.permute(2, 0, 1)


def join(parts: Tensor, columns: int) -> Tensor:
    """Undo `split`: ``(blocks, rows, width)`` back to ``(rows, columns)``."""
    if len(parts) == 1:
        return parts[0]
    return parts.permute(1, 2, 0).flatten(start_dim=1)[:, :columns]


def scaled_basis(basis_A: Tensor, diagonals: Diagonals, dtype: torch.dtype) -> Tensor:
    """Compute ``scaling · UA``, block by block.

    Args:
        basis_A: ``(c, r/c, width)``.
        diagonals: Λ and Γ.
        dtype: Of the result; the product is made in the widest dtype of its parts and rounded once.

    Returns:
        ``(c, r/c·num_bases, width)``; row ``u·num_bases + j`` of block t is row ``p = (u·c + t)·num_bases + j`` of UA.
    """
    lam, gamma = diagonals.beside(basis_A)
    return scratch.times(lam * gamma, basis_A.unsqueeze(2)).flatten(1, 2).to(dtype)


def diagonal_gradients(grad_A: Tensor, basis_A: Tensor, diagonals: Diagonals) -> tuple[Tensor, Tensor]:
    """Lead the gradient of ``scaling · UA`` on to Λ and Γ.

    Args:
        grad_A: As `scaled_basis` returns; its memory is used up.
        basis_A: ``(c, r/c, width)``.
        diagonals: Λ and Γ.

    Returns:
        The gradients of Λ and of Γ, in their shapes and dtypes.
    """
    lam, gamma = diagonals.beside(basis_A)
    product = scratch.times(grad_A.unflatten(1, lam.shape[1:3]), basis_A.unsqueeze(2))  # (c, r/c, num_bases, width)
    grad_lam = (product * gamma).sum(-1).transpose(0, 1).flatten(end_dim=1) * diagonals.scaling
    grad_gamma = join(scratch.times(product, lam).sum(1), diagonals.gamma.shape[1])
    return grad_lam.to(diagonals.lam.dtype), grad_gamma.to(diagonals.gamma.dtype)

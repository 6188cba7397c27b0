"""The nearest matrices of low rank, and how far away they are.

A given rank of a large matrix is found by a randomized singular value decomposition (Halko et al. 2011), everything
else by an exact one. The error is measured with the resulting factors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EXACT_UP_TO = 1024  # the smaller dim up to which the exact decomposition takes half a second
WORTHWHILE = 4  # a randomized one is faster only for ranks below 1 / 4 of the smaller dim
OVERSAMPLING = 16
POWER_ITERATIONS = 4
SEED = 0


class LowRank(NamedTuple):
    """A matrix as the product of two thin ones, ``(rows, rank)`` and ``(rank, columns)``.

    Each singular value is distributed over both factors by its root. ``relative_error`` is
    ``‖matrix - left @ right‖ / ‖matrix‖``, in Frobenius norms.
    """

    left: Tensor
    right: Tensor
    relative_error: float

    @property
    def rank(self) -> int:
        """Columns of ``left``, rows of ``right``."""
        return self.left.shape[1]


def of_rank(matrix: Tensor, rank: int) -> LowRank:
    """Return the nearest matrix of a given rank, padded with zeros if the matrix has a lower one."""
    smaller, wanted = min(matrix.shape), rank + OVERSAMPLING
    is_exact = smaller <= EXACT_UP_TO or wanted * WORTHWHILE > smaller
    return _truncated(matrix, *(_exact(matrix) if is_exact else _randomized(matrix, wanted)), rank)


def within(matrix: Tensor, tolerance: float) -> LowRank:
    """Return the matrix of the smallest rank whose relative error is within a tolerance.

    If rounding keeps even the full rank from the tolerance, the full rank is returned.
    """
    left, values, right = _exact(matrix)
    # the squared error of each rank from 1: the sum of the squares after it, which is not a difference of large numbers
    squares = values.double().square().flip(0).cumsum(0).flip(0)
    errors = torch.cat([squares[1:], squares.new_zeros(1)])
    rank = int((errors <= (tolerance * frobenius_norm(matrix)) ** 2).nonzero()[0]) + 1
    found = _truncated(matrix, left, values, right, rank)
    while found.relative_error > tolerance and rank < len(values):  # the singular values are rounded too
        rank += 1
        found = _truncated(matrix, left, values, right, rank)
    return found


def frobenius_norm(matrix: Tensor) -> float:
    """Return the root of the sum of squares, summed in float64."""
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def spectral_norm(matrix: Tensor) -> float:
    """Return the largest singular value; for a large matrix, a lower bound within a few percent."""
    if min(matrix.shape) <= EXACT_UP_TO:
        return float(torch.linalg.svdvals(matrix)[0])
    return float(_randomized(matrix, OVERSAMPLING)[1][0])


def _exact(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def _randomized(matrix: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first singular vectors and values, without using the global random generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        left, values, right = torch.svd_lowrank(matrix, q=wanted, niter=POWER_ITERATIONS)
    return left, values, right.T


def _truncated(matrix: Tensor, left: Tensor, values: Tensor, right: Tensor, rank: int) -> LowRank:
    kept = min(rank, len(values))
    roots = values[:kept].sqrt()
    thin_left = matrix.new_zeros(len(matrix), rank)
    thin_right = matrix.new_zeros(rank, matrix.shape[1])
    thin_left[:, :kept] = left[:, :kept] * roots
    thin_right[:kept] = roots.unsqueeze(1) * right[:kept]
    norm = frobenius_norm(matrix)
    distance = frobenius_norm(torch.addmm(matrix, thin_left, thin_right, alpha=-1))
    return LowRank(thin_left, thin_right, distance / norm if norm else 0.0)

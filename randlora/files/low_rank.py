"""The nearest matrices of low rank, and how far away they are.

By an exact singular value decomposition where that is cheap, else by a randomized one (Halko et al. 2011), whose
factors are nearly the best ones. The distance reported is measured on the factors themselves, whichever made them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EXACT_UP_TO = 1024  # the smaller side, below which the exact decomposition takes half a second
WORTHWHILE = 4  # a randomized one is cheaper only for ranks below so many times less than the smaller side
FIRST_GUESS = 64
OVERSAMPLING = 16
POWER_ITERATIONS = 4
SEED = 0


@dataclass(frozen=True, eq=False)
class LowRank:
    """A matrix as the product of two thin ones.

    Attributes:
        left: ``(rows, rank)``; each singular value is shared out between both factors by its root.
        right: ``(rank, columns)``.
        relative_error: ``‖matrix - left @ right‖ / ‖matrix‖``, Frobenius norms.
    """

    left: Tensor
    right: Tensor
    relative_error: float

    @property
    def rank(self) -> int:
        """Columns of ``left``, rows of ``right``."""
        return self.left.shape[1]


def of_rank(matrix: Tensor, rank: int) -> LowRank:
    """Approximate a matrix by one of a given rank; a larger rank than the matrix can have is filled up with zeros.

    Args:
        matrix: ``(rows, columns)``, float32 or float64, any values but NaN and infinity.
        rank: At least 1.
    """
    return _truncated(matrix, *_decomposed(matrix, rank), rank)


def within(matrix: Tensor, tolerance: float) -> LowRank:
    """Approximate a matrix by one of the smallest rank whose relative error is within a tolerance.

    Where the decomposition is a randomized one, the rank is the smallest that its factors allow. Where rounding keeps
    even the full rank from a tolerance, the full rank is returned.

    Args:
        matrix: ``(rows, columns)``, float32 or float64, any values but NaN and infinity.
        tolerance: At least 0.
    """
    full, guess = min(matrix.shape), FIRST_GUESS
    norm = frobenius_norm(matrix)
    while True:
        factors = _decomposed(matrix, guess)
        known = len(factors[1])
        rank = _smallest_rank(factors[1], norm, tolerance, is_exact=known == full)
        while rank is not None:
            found = _truncated(matrix, *factors, rank)
            if found.relative_error <= tolerance or rank == full:
                return found
            rank = rank + 1 if rank < known else None  # the singular values are rounded too
        guess *= 4


def frobenius_norm(matrix: Tensor) -> float:
    """Return the root of the sum of squares, summed in float64."""
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def spectral_norm(matrix: Tensor) -> float:
    """Return the largest singular value; of a large matrix a lower bound that is within a few percent of it."""
    if min(matrix.shape) <= EXACT_UP_TO:
        return float(torch.linalg.svdvals(matrix)[0])
    return float(_randomized(matrix, OVERSAMPLING)[1][0])


def _decomposed(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return at least ``rank`` left singular vectors, singular values and right singular vectors, where there are any.

    All of them, by the exact decomposition, where a randomized one would be no cheaper.
    """
    smaller = min(matrix.shape)
    wanted = rank + OVERSAMPLING
    if smaller <= EXACT_UP_TO or wanted * WORTHWHILE > smaller:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, values, right
    return _randomized(matrix, wanted)


def _randomized(matrix: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose with random vectors of our own: the global generator is neither read nor advanced."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        left, values, right = torch.svd_lowrank(matrix, q=wanted, niter=POWER_ITERATIONS)
    return left, values, right.T


def _smallest_rank(values: Tensor, norm: float, tolerance: float, *, is_exact: bool) -> int | None:
    """Find how many singular values must be kept, at least one; ``None`` where those known are too few.

    What is cut off is the sum of the smaller squares, where all are known: no difference of large numbers.
    """
    squares = values.double().square()
    if is_exact:
        cut = squares.flip(0).cumsum(0).flip(0)[1:]
        cut = torch.cat([cut, cut.new_zeros(1)])
    else:
        cut = (norm**2 - squares.cumsum(0)).clamp(min=0)[: len(values) - OVERSAMPLING]
    enough = (cut <= (tolerance * norm) ** 2).nonzero()
    return int(enough[0]) + 1 if len(enough) else None


def _truncated(matrix: Tensor, left: Tensor, values: Tensor, right: Tensor, rank: int) -> LowRank:
    """Cut the factors to a rank and measure how far their product is from the matrix."""
    kept = min(rank, len(values))
    roots = values[:kept].sqrt()
    thin_left = matrix.new_zeros(len(matrix), rank)
    thin_right = matrix.new_zeros(rank, matrix.shape[1])
    thin_left[:, :kept] = left[:, :kept] * roots
    thin_right[:kept] = roots.unsqueeze(1) * right[:kept]
    norm = frobenius_norm(matrix)
    distance = frobenius_norm(torch.addmm(matrix, thin_left, thin_right, alpha=-1))
    return LowRank(thin_left, thin_right, distance / norm if norm else 0.0)

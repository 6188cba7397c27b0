"""The updates of an adapter as products of two thin matrices, those of a LoRA, and how far away they are.

A given rank of a large matrix is found by a randomized singular value decomposition (Halko et al. 2011), everything
else by an exact one. The error is measured with the resulting factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from randlora.checkpoint.tensors import METADATA
from randlora.disk.tensor_file import Entry, Planned, read_shard, write_tensor_file
from randlora.errors import ConfigError, spelled
from randlora.files.adapter import OpenAdapter
from randlora.hints import shortly
from randlora.report import Progress

EXACT_UP_TO = 1024  # the smaller dim up to which the exact decomposition takes half a second
WORTHWHILE = 4  # a randomized one is faster only for ranks below 1 / 4 of the smaller dim
OVERSAMPLING = 16
POWER_ITERATIONS = 4
SEED = 0

DEFAULT_TOLERANCE = 0.05
LISTED = 5
LARGEST_SERVED = 512  # the largest rank that servers have; a higher one than a layer's sides adds zeros


@dataclass(frozen=True)
class LoraLayer:
    """How one layer was converted.

    Attributes:
        fqn: Its FQN.
        out_features: Output width.
        in_features: Input width.
        rank: Rank of its LoRA.
        relative_error: ``‖ΔW - lora_B @ lora_A‖ / ‖ΔW‖``, Frobenius norms.
        norm: ``‖ΔW‖``.
    """

    fqn: str
    out_features: int
    in_features: int
    rank: int
    relative_error: float
    norm: float


@dataclass(frozen=True, eq=False)
class StoredFactors:
    """The factors of one layer's update in a file: ``lora_A``, ``(rank, in)``, and ``lora_B``, ``(out, rank)``."""

    layer: LoraLayer
    lora_A: Entry
    lora_B: Entry


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


def low_rank_factors(
    adapter: OpenAdapter, rank: int | None, tolerance: float | None, scratch: Path, progress: Progress
) -> tuple[StoredFactors, ...]:
    """Approximate every update of an adapter by one of low rank, layer by layer.

    Without a rank, each layer gets the smallest whose relative error is within the tolerance, 0.05 if ``None``. A
    larger error of any layer is a `ConfigError`. ``scratch`` is a directory for the factors, which together may be as
    large as the model.
    """
    shapes = adapter.require_shapes()
    highest = max(LARGEST_SERVED, *map(min, shapes.values()))
    if rank is not None and rank > highest:
        raise ConfigError(f"cannot convert to a LoRA: rank must be at most {highest}, got {shortly(rank)}")
    accepted = DEFAULT_TOLERANCE if tolerance is None else tolerance
    factors: list[StoredFactors] = []
    for done, (fqn, (out_features, in_features)) in enumerate(shapes.items()):
        progress(done, len(shapes), fqn)
        (update,) = adapter.delta_weights(fqn)
        update = update.float()
        found = within(update, accepted) if rank is None else of_rank(update, rank)
        layer = LoraLayer(fqn, out_features, in_features, found.rank, found.relative_error, frobenius_norm(update))
        named, path = {"lora_A": found.right, "lora_B": found.left}, scratch / f"{done}.safetensors"
        write_tensor_file(path, [Planned.whole(*factor) for factor in named.items()], METADATA)
        factors.append(StoredFactors(layer, **{entry.name: entry for entry in read_shard(path).entries}))
        del update, found, named  # before the next ones are computed
    progress(len(shapes), len(shapes), "done")
    _refuse_loss([each.layer for each in factors], rank, accepted)
    return tuple(factors)


def _refuse_loss(layers: Sequence[LoraLayer], rank: int | None, tolerance: float) -> None:
    lossy = sorted((each for each in layers if each.relative_error > tolerance), key=lambda each: -each.relative_error)
    if not lossy:
        return
    listed = ", ".join(f"{layer.fqn} {layer.relative_error:.3g}" for layer in lossy[:LISTED])
    more = f" and {len(lossy) - LISTED} more" if len(lossy) > LISTED else ""
    choice = "the full rank" if rank is None else spelled("rank", rank)
    remedy = "" if rank is None else "a larger rank, no rank for the smallest within the tolerance, or "
    raise ConfigError(
        f"cannot convert to LoRA: with {choice}, {len(lossy)} of {len(layers)} layers have a relative error above "
        f"{spelled('tolerance', tolerance)} ({listed}{more}); the largest is {lossy[0].relative_error:.4g}: "
        f"give {remedy}a larger tolerance"
    )


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
    thin_left, thin_right = matrix.new_zeros(len(matrix), rank), matrix.new_zeros(rank, matrix.shape[1])
    thin_left[:, :kept] = left[:, :kept] * roots
    thin_right[:kept] = roots.unsqueeze(1) * right[:kept]
    norm = frobenius_norm(matrix)
    distance = frobenius_norm(torch.addmm(matrix, thin_left, thin_right, alpha=-1))
    return LowRank(thin_left, thin_right, distance / norm if norm else 0.0)

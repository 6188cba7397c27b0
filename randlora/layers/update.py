"""Updates of one weight, their sum, and the options and results of merging them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from randlora.bases.basis import Basis
from randlora.bases.spec import Shape
from randlora.functional import Diagonals, Pair, delta_weight, update_norm
from randlora.functional.region import Region, take_spans
from randlora.functional.scratch import without_autocast

Quantized = Literal["requantize", "dequantize"]


class Update(NamedTuple):
    """One adapter's update of one weight as factors: whole Λ and Γ, or stacks of them, and the shape of all of it."""

    basis: Basis
    lam: Tensor
    gamma: Tensor
    scaling: float  # times the adapter's weight
    shape: Shape
    region: Region | None = None  # the part that is computed

    def parts(self, device: torch.device, dtype: torch.dtype) -> tuple[Pair, Diagonals]:
        """Return the arguments of `randlora.functional`: for a part of the weight, slices of the bases and of Γ."""
        matrix, gamma, sides = self.shape[-2:], self.gamma, None
        if self.region is not None:
            sides = self.region.sides(is_wide=self.is_wide)
            gamma = take_spans(gamma, sides.small, -1)
        pair = self.basis.pair(max(matrix), min(matrix), device=device, dtype=dtype, sides=sides)
        lam = self.lam if self.lam.device == device else self.lam.to(device)
        return pair, Diagonals(lam, gamma if gamma.device == device else gamma.to(device), self.scaling)

    def diagonals(self, device: torch.device) -> Diagonals:
        """Return Λ and Γ of the whole update, with the scaling."""
        return Diagonals(self.lam.to(device), self.gamma.to(device), self.scaling)

    def norm(self, device: torch.device) -> Tensor:
        """Return the approximate norm of the whole update. Gradients flow through it; see `update_norm`."""
        matrix, diagonals = self.shape[-2:], self.diagonals(device)
        dtype = torch.promote_types(diagonals.lam.dtype, torch.float32)
        squares = self.basis.squares(max(matrix), min(matrix), device=device, dtype=dtype)
        with without_autocast(device.type):
            return update_norm(*squares, diagonals)

    @property
    def is_wide(self) -> bool:
        """Whether the input of the whole layer has ``min_dim`` features, which includes square layers."""
        return self.shape[-1] == min(self.shape[-2:])

    def within(self, region: Region) -> Update:
        """Return the part of the update for a part of the weight."""
        if region.matrices is None or len(self.shape) == 2:
            return self._replace(region=region)
        lam, gamma = (take_spans(diagonal, region.matrices, 0) for diagonal in (self.lam, self.gamma))
        return self._replace(lam=lam, gamma=gamma, shape=(len(lam), *self.shape[1:]), region=region)


def sum_updates(
    updates: Iterable[Update],
    shape: Shape,
    *,
    device: torch.device,
    dtype: torch.dtype,
    as_one_matrix: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the sum of some updates of one weight, added in their order, in a shape or one that is broadcast to it."""
    total = torch.zeros(shape, dtype=dtype, device=device)
    with without_autocast(device.type):
        for update in updates:
            delta = delta_weight(*update.parts(device, dtype), is_wide=update.is_wide)
            total = total + (delta if as_one_matrix is None else as_one_matrix(delta))
    return total


def rounded_sum(weight: Tensor, delta: Tensor) -> Tensor:
    """Return ``weight + delta``, added in the wider dtype and rounded once, in the weight's dtype and memory format.

    ``delta`` has the shape of the weight, a shape that broadcasts to it, or the shape of the weight viewed as a matrix.
    """
    if delta.numel() == weight.numel():
        delta = delta.reshape(weight.shape)
    total = (weight.to(delta.dtype) + delta).to(weight.dtype)
    return total if total.stride() == weight.stride() else total.contiguous()


class Into(NamedTuple):
    """What a merge turns quantized layers into: layers of their kind, or plain ones in a dtype or the layer's own."""

    quantized: Quantized = "requantize"
    dtype: torch.dtype | None = None


class RoundingLoss(NamedTuple):
    """The rounding error of quantizing a merged weight.

    Attributes:
        largest: The largest absolute error of an entry.
        step: The widest gap between two neighboring levels of the new codes, at the layer's largest scale.
        relative: The norm of the error as a share of the norm of the merged update.
    """

    largest: float
    step: float
    relative: float


class Merged(NamedTuple):
    """A merged weight, or this process's part of it, before any quantization."""

    weight: Tensor
    held: Any = None  # what replaces the codes of a quantized layer, for its `write_merged`
    rounding: RoundingLoss | None = None

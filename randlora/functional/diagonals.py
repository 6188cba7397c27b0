"""Λ and Γ, the trained scalings of one adapter in one layer."""

from typing import NamedTuple

from torch import Tensor


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

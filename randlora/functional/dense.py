"""Products with dense bases."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from randlora.functional import scratch


class DensePair(NamedTuple):
    """A pair of bases without structure.

    Every pair of bases offers the same products, between vectors of the layer's small side (``min_dim`` long), of its
    large side (``max_dim``) and the hidden ones between the two factors (``r·num_bases``, in the order of p).
    ``scaled_A`` is what `scaled_basis` makes of ``A``.

    Attributes:
        A: ``(1, r, min_dim)``.
        B: ``(max_dim, r·num_bases)``; its dtype is the one computed in.
    """

    A: Tensor
    B: Tensor

    @property
    def min_dim(self) -> int:
        """The layer's small side."""
        return self.A.shape[2]

    @property
    def max_dim(self) -> int:
        """The layer's large side."""
        return self.B.shape[0]

    @property
    def shares(self) -> tuple[float, float, float]:
        """Arithmetic of a product with UA, with UB and of both, as shares of what dense ones take."""
        return 1.0, 1.0, 1.0

    def small_to_hidden(self, small: Tensor, scaled_A: Tensor) -> Tensor:
        """Multiply ``(tokens, min_dim)`` by ``UA.T``."""
        return small @ scaled_A[0].T

    def hidden_to_small(self, hidden: Tensor, scaled_A: Tensor, onto: Tensor | None = None) -> Tensor:
        """Multiply ``(tokens, r·num_bases)`` by ``UA``, added to ``onto``, whose memory is used up."""
        return hidden @ scaled_A[0] if onto is None else scratch.plus_product(onto, hidden, scaled_A[0])

    def large_to_hidden(self, large: Tensor) -> Tensor:
        """Multiply ``(tokens, max_dim)`` by ``UB``."""
        return large @ self.B

    def hidden_to_large(self, hidden: Tensor, onto: Tensor | None = None) -> Tensor:
        """Multiply ``(tokens, r·num_bases)`` by ``UB.T``, added to ``onto``, whose memory is used up."""
        return hidden @ self.B.T if onto is None else scratch.plus_product(onto, hidden, self.B.T)

    def grad_from_tokens(self, hidden: Tensor, small: Tensor) -> Tensor:
        """Return the gradient of ``UA``, ``hidden.T @ small``, in the shape of ``scaled_A``."""
        return (hidden.T @ small).unsqueeze(0)

    def grad_from_update(self, grad: Tensor) -> Tensor:
        """Lead the gradient of the update, ``(max_dim, min_dim)``, on to ``UA``: ``UB.T @ grad``."""
        return (self.B.T @ grad).unsqueeze(0)

    def update(self, scaled_A: Tensor, onto: Tensor | None = None) -> Tensor:
        """Compute ``UB @ UA``, ``(max_dim, min_dim)``, added to ``onto`` inside the product's accumulation.

        The result is laid out in memory as ``onto`` is, which is left as it is.
        """
        if onto is None:
            return self.B @ scaled_A[0]
        if onto.stride(-1) == 1:
            return torch.addmm(onto, self.B, scaled_A[0])
        return torch.addmm(onto.T, scaled_A[0].T, self.B.T).T

"""Products with dense bases."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from randlora.functional import scratch


class DensePair(NamedTuple):
    """A pair of bases without structure.

    Every pair of bases offers the same products, between vectors of the layer's small side (``min_dim`` long), of its
    large side (``max_dim``) and the hidden ones between the two factors, which lie as the rows of ``scaled_A`` do:
    ``(c, tokens, r/c·num_bases)``, here with one block. ``scaled_A`` is what `scaled_basis` makes of ``A``.

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
        """Multiply ``(tokens, min_dim)`` by ``UA.T``: ``(1, tokens, r·num_bases)``."""
        return (small @ scaled_A[0].T).unsqueeze(0)

    def hidden_to_small(self, hidden: Tensor, scaled_A: Tensor, onto: Tensor | None = None) -> Tensor:
        """Multiply hidden vectors by ``UA``, added to ``onto``, ``(tokens, min_dim)``, whose memory is used up."""
        return hidden[0] @ scaled_A[0] if onto is None else scratch.plus_product(onto, hidden[0], scaled_A[0])

    def large_to_hidden(self, large: Tensor) -> Tensor:
        """Multiply ``(tokens, max_dim)`` by ``UB``: ``(1, tokens, r·num_bases)``."""
        return (large @ self.B).unsqueeze(0)

    def hidden_to_large(self, hidden: Tensor, onto: Tensor | None = None) -> Tensor:
        """Multiply hidden vectors by ``UB.T``, added to ``onto``, ``(tokens, max_dim)``, whose memory is used up."""
        return hidden[0] @ self.B.T if onto is None else scratch.plus_product(onto, hidden[0], self.B.T)

    def grad_from_tokens(self, hidden: Tensor, small: Tensor) -> Tensor:
        """Return the gradient of ``UA``, ``hidden.T @ small``, in the shape of ``scaled_A``."""
        return (hidden[0].T @ small).unsqueeze(0)

    def grad_from_update(self, grad: Tensor) -> Tensor:
        """Lead the gradient of the update, ``(max_dim, min_dim)``, on to ``UA``: ``UB.T @ grad``."""
        return (self.B.T @ grad).unsqueeze(0)

    def update(self, scaled_A: Tensor, onto: Tensor | None = None, *, uses_up: bool = False) -> Tensor:
        """Compute ``UB @ UA``, ``(max_dim, min_dim)``, added to ``onto`` inside the product's accumulation.

        The result is laid out in memory as ``onto`` is, which is left as it is unless its memory may be used up.
        """
        if onto is None:
            return self.B @ scaled_A[0]
        plus_product = scratch.plus_product if uses_up else torch.addmm
        if onto.stride(-1) == 1:
            return plus_product(onto, self.B, scaled_A[0])
        return plus_product(onto.T, scaled_A[0].T, self.B.T).T

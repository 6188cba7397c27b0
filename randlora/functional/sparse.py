"""Products with a B that is nearly all zeros, held in compressed rows (CSR), on a CPU.

torch multiplies a CSR matrix by a dense one from the left only, so every product here is turned that way round, with B
or its transpose; tokens go through as columns.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from randlora.functional import scratch

LARGEST_DENSITY = 1 / 8
"""Denser than this, a product with dense storage is faster: measured on a CPU, it is even at about 1/6."""


def serves(density: float, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products with this form are faster than dense ones: where MKL makes them, with few enough entries."""
    is_fast = device.type == "cpu" and torch.backends.mkl.is_available()
    return is_fast and dtype in (torch.float32, torch.float64) and density <= LARGEST_DENSITY


def csr(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Put a small-integer matrix into compressed rows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return matrix.to(dtype).to_sparse_csr()


class SparsePair(NamedTuple):
    """A pair of bases with a sparse B; the products are those of `DensePair`.

    Attributes:
        A: ``(1, r, min_dim)``.
        B: ``(max_dim, r·num_bases)``, CSR; its dtype is the one computed in.
        B_transposed: ``(r·num_bases, max_dim)``, CSR.
        density: Share of B that is not zero.
    """

    A: Tensor
    B: Tensor
    B_transposed: Tensor
    density: float

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
        share = self.density / LARGEST_DENSITY  # a sparse multiply-add takes so much longer
        return 1.0, share, share

    def small_to_hidden(self, small: Tensor, scaled_A: Tensor) -> Tensor:
        """Multiply ``(tokens, min_dim)`` by ``UA.T``: ``(1, tokens, r·num_bases)``."""
        return (scaled_A[0] @ small.T).T.unsqueeze(0)  # a column a token, as the product with B wants them

    def hidden_to_small(self, hidden: Tensor, scaled_A: Tensor, onto: Tensor | None = None) -> Tensor:
        """Multiply hidden vectors by ``UA``, added to ``onto``, ``(tokens, min_dim)``, whose memory is used up."""
        return hidden[0] @ scaled_A[0] if onto is None else scratch.plus_product(onto, hidden[0], scaled_A[0])

    def large_to_hidden(self, large: Tensor) -> Tensor:
        """Multiply ``(tokens, max_dim)`` by ``UB``: ``(1, tokens, r·num_bases)``."""
        return (self.B_transposed @ large.T).T.unsqueeze(0)

    def hidden_to_large(self, hidden: Tensor, onto: Tensor | None = None) -> Tensor:
        """Multiply hidden vectors by ``UB.T``, added to ``onto``, ``(tokens, max_dim)``, whose memory is used up."""
        large = (self.B @ hidden[0].T).T
        return large if onto is None else scratch.plus(onto, large)

    def grad_from_tokens(self, hidden: Tensor, small: Tensor) -> Tensor:
        """Return the gradient of ``UA``, ``hidden.T @ small``, in the shape of ``scaled_A``."""
        return (hidden[0].T @ small).unsqueeze(0)

    def grad_from_update(self, grad: Tensor) -> Tensor:
        """Lead the gradient of the update, ``(max_dim, min_dim)``, on to ``UA``: ``UB.T @ grad``."""
        return (self.B_transposed @ grad).unsqueeze(0)

    def update(self, scaled_A: Tensor, onto: Tensor | None = None, *, uses_up: bool = False) -> Tensor:  # noqa: ARG002
        """Compute ``UB @ UA``, ``(max_dim, min_dim)``, added to ``onto``.

        The result is laid out in memory as ``onto`` is, which is left as it is.
        """
        update = self.B @ scaled_A[0]
        if onto is None:
            return update
        if onto.stride(-1) == 1:
            return scratch.plus(update, onto)
        return scratch.plus(update.T.contiguous(), onto.T).T

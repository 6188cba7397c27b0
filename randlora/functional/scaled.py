"""The scaled basis UA = Λ·A·Γ, and the gradients of Λ and Γ from its gradient: passes over memory, no products.

UA has about ``min_dim²`` entries, and where products are fast these passes decide how long a layer takes. So they are
made strip by strip: some rows of A at a time, whose results stay in the cache until the last pass over them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from randlora.functional import scratch
from randlora.functional.scratch import in_dtype

ENTRIES_PER_THREAD = 2**17
"""Entries of a strip for each thread. Measured on a CPU: fewer cost more operators than they save memory."""


def _rows_at_once(A: Tensor, lam: Tensor) -> int:
    """Return how many rows of A a strip has; all of them if strips would not pay, or cannot be written."""
    rows, entries = A.size(-3), A.numel() * lam.size(-2)
    if entries <= ENTRIES_PER_THREAD or not scratch.may_be_in_strips(A):
        return rows
    strip = ENTRIES_PER_THREAD * torch.get_num_threads()  # which a compiler does not trace
    return min(rows, max(1, strip * rows // entries))


def scaled_basis(A: Tensor, lam: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``A·gamma·lam`` in a dtype, rounded once from the widest dtype of its factors.

    Args:
        A: ``(..., rows, 1, columns)``.
        lam: ``(..., rows, num_bases, 1)``.
        gamma: ``(num_bases, columns)``, or such matrices that broadcast.
        dtype: The dtype of the result, ``(..., rows, num_bases, columns)``.
    """
    # without rounding there are two passes, and strips save nothing
    at_once = A.size(-3) if dtype.itemsize >= A.itemsize else _rows_at_once(A, lam)
    if at_once == A.size(-3):
        return in_dtype(scratch.times(A * gamma, lam), dtype)
    scaled = torch.empty(torch.broadcast_shapes(A.shape, lam.shape), dtype=dtype, device=A.device)
    for rows, lambdas, strip in zip(*(tensor.split(at_once, dim=-3) for tensor in (A, lam, scaled)), strict=True):
        strip.copy_(scratch.times(rows * gamma, lambdas))
    return scaled


def diagonal_gradients(grad: Tensor, A: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of Λ and Γ from that of `scaled_basis` with the same A, Λ and Γ, which is overwritten."""
    if (at_once := _rows_at_once(A, lam)) == A.size(-3):
        return _diagonal_gradients(grad, A, lam, gamma)
    of_lam, of_gamma = [], None
    for part, rows, lambdas in zip(*(tensor.split(at_once, dim=-3) for tensor in (grad, A, lam)), strict=True):
        one, more = _diagonal_gradients(part, rows, lambdas, gamma)
        of_lam.append(one)
        of_gamma = more if of_gamma is None else of_gamma.add_(more)
    assert of_gamma is not None, "A has rows"
    return torch.cat(of_lam, dim=-2), of_gamma


def _diagonal_gradients(grad: Tensor, A: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    product = scratch.times(grad, A)
    return (product * gamma).sum(-1), scratch.times(product, lam).sum(-3)

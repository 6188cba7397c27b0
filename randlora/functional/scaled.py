"""The scaled basis UA = Λ·A·Γ, and the gradients of Λ and Γ from its gradient: passes over memory, no products.

UA has about ``min_dim²`` entries. Where products are fast, such as in bfloat16 on a processor with matrix units, these
passes decide how long a layer takes. So they are made strip by strip: some rows of A at a time, whose results stay in
the cache until the last pass over them. A row of A, ``(..., rows, 1, columns)``, makes ``num_bases`` rows of UA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from randlora.functional import scratch
from randlora.functional.scratch import in_dtype

STRIP = 2**17
"""Entries of a strip for each thread. Measured on a CPU: fewer cost more operators than they save memory."""


def _rows_at_once(A: Tensor, lam: Tensor) -> int:
    """Return how many rows of A a strip has; all of them if strips would not pay, or cannot be written."""
    rows, entries = A.size(-3), A.numel() * lam.size(-2)
    if entries <= STRIP or not scratch.may_be_in_strips(A):
        return rows
    return min(rows, max(1, STRIP * torch.get_num_threads() * rows // entries))  # which a compiler does not trace


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
    for rows, own, strip in zip(*(each.split(at_once, dim=-3) for each in (A, lam, scaled)), strict=True):
        strip.copy_(scratch.times(rows * gamma, own))
    return scaled


def diagonal_gradients(grad: Tensor, A: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of Λ, ``(..., rows, num_bases)``, and of Γ, ``(..., num_bases, columns)``.

    Args:
        grad: The gradient of `scaled_basis`, ``(..., rows, num_bases, columns)``, which is overwritten.
        A: As there.
        lam: As there.
        gamma: As there.
    """
    if (at_once := _rows_at_once(A, lam)) == A.size(-3):
        return _diagonal_gradients(grad, A, lam, gamma)
    of_lam, of_gamma = [], None
    for part, rows, own in zip(*(each.split(at_once, dim=-3) for each in (grad, A, lam)), strict=True):
        one, more = _diagonal_gradients(part, rows, own, gamma)
        of_lam.append(one)
        of_gamma = more if of_gamma is None else of_gamma.add_(more)
    assert of_gamma is not None, "A has rows"
    return torch.cat(of_lam, dim=-2), of_gamma


def _diagonal_gradients(grad: Tensor, A: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    product = scratch.times(grad, A)
    return (product * gamma).sum(-1), scratch.times(product, lam).sum(-3)

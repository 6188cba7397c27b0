"""Λ and Γ whose update is a sum of updates: exactly where there are such, else the nearest by least squares.

Basis j multiplies column ``p = k·num_bases + j`` of B and row k of A by ``coefficients[j][k, c] = lam[k, j] · gamma[j,
c]``, a matrix of rank one. A sum of updates on the same bases has the sums of these matrices, so it is itself an update
if each sum has rank one again: above all if the Γ of a basis are multiples of one another, or its Λ are. Other sums are
no update, because the number of bases of a layer, ``ceil(min_dim / r)``, leaves no room for a second matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 100
"""How often each of Λ and Γ is solved for at most."""
PROGRESS = 1e-4
"""The fit ends when a step makes the error smaller by less than this share of it."""
RIDGE = 1e-10
"""What is added to the diagonals of least squares, relative to them: a ternary A or B may have columns of zeros."""
CHUNK = 2**24
"""Entries of the normal matrices of Γ that are formed at once."""


class Factors(NamedTuple):
    """Λ and Γ, or their sum.

    Attributes:
        lam: ``(r, num_bases)``.
        gamma: ``(num_bases, min_dim)``.
    """

    lam: Tensor
    gamma: Tensor


class DenseBases(NamedTuple):
    """The bases of one layer, written out in the dtype to compute in.

    Attributes:
        A: ``(r, min_dim)``.
        B: ``(max_dim, num_bases·r)``.
    """

    A: Tensor
    B: Tensor

    def update(self, lam: Tensor, gamma: Tensor) -> Tensor:
        """Return ``UB @ UA`` without scaling, ``(max_dim, min_dim)``."""
        return self.B @ self._rows(lam, gamma)

    def _rows(self, lam: Tensor, gamma: Tensor) -> Tensor:
        return (lam[..., None] * self.A[:, None] * gamma).flatten(end_dim=1)


def summed(terms: Sequence[Factors]) -> tuple[Factors, float]:
    """Return Λ and Γ of a sum of updates on the same bases, as exact as they can be basis by basis.

    A basis keeps the Γ of the largest term if all are multiples of it, or its Λ likewise; else both are those of the
    nearest matrix of rank one.

    Args:
        terms: Λ, which the factors of the sum are multiplied into, and Γ, in float64.

    Returns:
        Λ and Γ, and what is left of the coefficients, as a share of those of the terms: a few roundings of the values
        if the sum is exact.
    """
    lam, gamma = (torch.stack(parts) for parts in zip(*terms, strict=True))  # (terms, r, n), (terms, n, m)
    sizes = lam.norm(dim=1) * gamma.norm(dim=2)
    total = sizes.square().sum()
    largest, every = sizes.argmax(0), torch.arange(gamma.shape[1], device=gamma.device)
    one_lam, one_gamma = lam[largest, :, every].T, gamma[largest, every]

    by_gamma = _shares((gamma * one_gamma).sum(2), one_gamma.square().sum(1))
    by_lam = _shares((lam * one_lam).sum(1), one_lam.square().sum(0))
    left_by_gamma = (lam.norm(dim=1) * (gamma - by_gamma[..., None] * one_gamma).norm(dim=2)).sum(0)
    left_by_lam = ((lam - by_lam[:, None] * one_lam).norm(dim=1) * gamma.norm(dim=2)).sum(0)
    keeps_gamma = left_by_gamma <= left_by_lam
    new_lam = torch.where(keeps_gamma, (lam * by_gamma[:, None]).sum(0), one_lam)
    new_gamma = torch.where(keeps_gamma[:, None], one_gamma, (gamma * by_lam[..., None]).sum(0))
    left = torch.minimum(left_by_gamma, left_by_lam)

    rough = (left > 1e-14 * sizes.sum(0)).nonzero().flatten()
    if len(rough):
        coefficients = torch.einsum("ikj,ijc->jkc", lam[:, :, rough], gamma[:, rough])
        U, S, V = torch.linalg.svd(coefficients, full_matrices=False)
        nearest = S[:, 1:].norm(dim=1)
        is_nearer = nearest < left[rough]
        size = one_gamma[rough].norm(dim=1)
        new_lam[:, rough] = torch.where(is_nearer, U[:, :, 0].T * (S[:, 0] / size), new_lam[:, rough])
        new_gamma[rough] = torch.where(is_nearer[:, None], V[:, 0] * size[:, None], new_gamma[rough])
        left[rough] = torch.minimum(nearest, left[rough])
    return Factors(new_lam, new_gamma), float(left.norm() / total.sqrt()) if total > 0 else 0.0


def fitted(bases: DenseBases, target: Tensor, gamma: Tensor) -> Factors:
    """Return Λ and Γ whose update is near a matrix, by alternating least squares: each is linear given the other.

    The result is a local optimum, which depends on the Γ to begin with, ``(num_bases, min_dim)``.

    Args:
        bases: The bases.
        target: The matrix without scaling, ``(max_dim, min_dim)``.
        gamma: Γ to begin with. Those of the result have their sizes.
    """
    sizes, squared, last = gamma.norm(dim=1, keepdim=True), target.square().sum(), float("inf")
    gram, onto = bases.B.T @ bases.B, bases.B.T @ target
    for _ in range(STEPS):
        lam, _ = _solved_for_lam(bases.A, gram, onto, gamma)
        gamma, explained = _solved_for_gamma(bases.A, gram, onto, lam)
        error = (squared - explained).clamp(min=0).sqrt().item()
        if error > (1 - PROGRESS) * last:
            break
        last = error
    now = gamma.norm(dim=1, keepdim=True)
    scale = torch.where((now > 0) & (sizes > 0), sizes / now, 1.0)
    return Factors(lam / scale.T, gamma * scale)


def _shares(products: Tensor, squares: Tensor) -> Tensor:
    """Divide, with 0 for what is divided by 0."""
    return torch.where(squares > 0, products / squares, 0.0)


def _solved_for_lam(A: Tensor, gram: Tensor, onto: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best Λ given Γ, and the part of the squared norm of the target that it explains."""
    rows = (A[:, None] * gamma).flatten(end_dim=1)
    wanted = (onto * rows).sum(1)
    found = _solved(gram * (rows @ rows.T), wanted)
    return found.view(len(A), len(gamma)), (found * wanted).sum()


def _solved_for_gamma(A: Tensor, gram: Tensor, onto: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best Γ given Λ, column by column, and the part of the squared norm of the target that it explains."""
    (r, n), flat = lam.shape, lam.flatten()
    products = (flat[:, None] * gram * flat).view(r, n, r, n).permute(0, 2, 1, 3).reshape(r * r, n * n)
    wanted = torch.einsum("kj,kc,kjc->cj", lam, A, onto.view(r, n, -1))
    found = torch.empty_like(wanted)
    for part in torch.arange(len(wanted), device=A.device).split(max(1, CHUNK // max(n * n, r * r))):
        columns = A[:, part]
        normal = (columns[:, None] * columns).flatten(end_dim=1).T @ products
        found[part] = _solved(normal.view(-1, n, n), wanted[part])
    return found.T.contiguous(), (found * wanted).sum()


def _solved(normal: Tensor, wanted: Tensor) -> Tensor:
    """Solve normal equations; an unknown that nothing depends on is 0."""
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    largest = diagonal.amax(-1, keepdim=True)
    ridge = RIDGE * diagonal + torch.where(diagonal > 1e-20 * largest, 0.0, torch.where(largest > 0, largest, 1.0))
    found: Tensor = torch.linalg.solve(normal + torch.diag_embed(ridge), wanted.unsqueeze(-1)).squeeze(-1)
    return found

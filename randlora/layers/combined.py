"""Λ and Γ of one weight whose update is the sum of some updates of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from randlora.bases.basis import Basis
from randlora.bases.spec import Shape
from randlora.functional.combined import DenseBases, Factors, fitted, summed
from randlora.layers.diagonals import diagonal_shapes
from randlora.layers.update import Update
from randlora.state import SiteAdapter

Method = Literal["exact", "fit"]

ROUNDINGS = 16
"""How many roundings of its Λ and Γ a sum may be off to be exact."""


class Combined(NamedTuple):
    """Λ and Γ of a sum.

    Attributes:
        lam: Λ, or a stack of them.
        gamma: Γ, or a stack of them.
        error: The distance of the update from the sum, as a share of the norm of the sum: 0 if it is exact up to the
            rounding of Λ and Γ, infinite if it is not and no other was asked for.
    """

    lam: Tensor
    gamma: Tensor
    error: float


def combined(part: SiteAdapter, updates: Sequence[Update], method: Method, device: torch.device) -> Combined:
    """Return Λ and Γ of an adapter of one weight, so that its update is the sum of others.

    Args:
        part: The adapter at this weight, with its bases and scaling.
        updates: The updates, of the same shape.
        method: Whether to fit what is not exact.
        device: Where Λ and Γ go. They are computed there in float64, or on the CPU if it has no float64.

    Returns:
        Λ and Γ in the widest dtype of those of the updates, at least float32.
    """
    at = torch.device("cpu") if device.type == "mps" else device
    dtype = torch.float32
    for update in updates:
        dtype = torch.promote_types(dtype, update.lam.dtype)
    indices = [()] if len(part.shape) == 2 else [(index,) for index in range(part.shape[0])]
    found = []
    for index in indices:
        terms = [
            _Term(
                update.basis,
                _wide(update.lam[index], at) * (update.scaling / (part.scaling or 1.0)),
                _wide(update.gamma[index], at),
            )
            for update in updates
        ]
        found.append(_one_matrix(part, terms, method, dtype))
    stack = part.shape[:-2]
    lam, gamma = (
        torch.stack([getattr(each.factors, name) for each in found]).unflatten(0, stack or (1,)).to(device)
        for name in Factors._fields
    )
    wrong, size = math.hypot(*(each.wrong for each in found)), math.hypot(*(each.size for each in found))
    error = (wrong / size if size else math.inf) if wrong else 0.0
    return Combined(lam if stack else lam[0], gamma if stack else gamma[0], error)


class _Term(NamedTuple):
    """One update of one matrix, with its factor and both scalings in Λ, in float64."""

    basis: Basis
    lam: Tensor
    gamma: Tensor


class _Found(NamedTuple):
    """Λ and Γ of one matrix, the norm of their error, and that of the sum if there is one."""

    factors: Factors
    wrong: float
    size: float


def _one_matrix(part: SiteAdapter, terms: Sequence[_Term], method: Method, dtype: torch.dtype) -> _Found:
    """Return Λ and Γ of one matrix in a dtype."""
    identity, at = part.basis.identity, terms[0].lam.device
    terms = [term for term in terms if bool(term.gamma.any())]  # others have no update, and no Γ to begin with
    if not part.scaling and any(bool(term.lam.any()) for term in terms):
        lam, gamma = (
            torch.zeros(size, dtype=dtype, device=at) for size in diagonal_shapes(part.shape[-2:], part.options.r)
        )
        return _Found(Factors(lam, gamma), math.inf, 1.0)  # with alpha=0 there is no update
    own = [Factors(term.lam, term.gamma) for term in terms if term.basis.identity == identity]
    has_others = any(bool(term.lam.any()) for term in terms if term.basis.identity != identity)
    if own:
        factors, left = summed(own)
    else:
        of_lam, of_gamma = diagonal_shapes(part.shape[-2:], part.options.r)
        lam = torch.zeros(of_lam, dtype=torch.float64, device=at)
        factors, left = Factors(lam, torch.full(of_gamma, 1 / max(of_gamma), dtype=lam.dtype, device=at)), 0.0
    is_exact = not has_others and left <= ROUNDINGS * torch.finfo(dtype).eps
    if is_exact or method == "exact":
        return _Found(_rounded(factors, dtype), 0.0 if is_exact else math.inf, 1.0)
    bases = _dense(part.basis, part.shape, at)
    target = torch.zeros(max(part.shape[-2:]), min(part.shape[-2:]), dtype=torch.float64, device=at)
    for term in terms:
        target += _dense(term.basis, part.shape, at).update(term.lam, term.gamma)
    factors = _rounded(fitted(bases, target, factors.gamma), dtype)
    wrong = bases.update(factors.lam.double(), factors.gamma.double()) - target
    return _Found(factors, float(wrong.norm()), float(target.norm()))


def _rounded(factors: Factors, dtype: torch.dtype) -> Factors:
    return Factors(factors.lam.to(dtype), factors.gamma.to(dtype))


def _dense(basis: Basis, shape: Shape, device: torch.device) -> DenseBases:
    """Return the bases of a layer written out, without keeping them."""
    A, B = basis.slices(max(shape[-2:]), min(shape[-2:]), device=device, dtype=torch.float64)
    return DenseBases(A[:, 0], B.flatten(start_dim=1))


def _wide(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device=device, dtype=torch.float64)

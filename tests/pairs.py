"""Bases of every form that `functional` computes with, made at random and written out for the oracle."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from randlora.functional import BlockPair, DensePair, Diagonals, Pair

FORMS = {"dense": None, "block(2,4)": (2, 4), "block(3,1)": (3, 1), "block(1,2)": (1, 2)}
"""By form the most blocks of A and of B: as many are made as divide r."""

every_form = pytest.mark.parametrize("form", FORMS)


@dataclass(frozen=True)
class Case:
    """A pair, and what it means written out, A ``(r, 1, min_dim)`` and B ``(max_dim, num_bases, r)``, in float64."""

    pair: Pair
    basis_A: Tensor
    basis_B: Tensor
    diagonals: Diagonals


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def case(form: str, out_features: int, in_features: int, r: int) -> Case:
    """Make one layer's bases of one of `FORMS`, with Λ, Γ and a scaling of 0.7."""
    max_dim, min_dim = max(out_features, in_features), min(out_features, in_features)
    num_bases = -(-min_dim // r)
    basis_A, basis_B = _random(r, min_dim), _random(max_dim, r * num_bases)
    pair: Pair = DensePair(basis_A.unsqueeze(0), basis_B)
    if (most := FORMS[form]) is not None:
        c, b = (max(size for size in range(1, count + 1) if r % size == 0) for count in most)
        values = _random(r, -(-min_dim // c)), _random(-(-max_dim // b) * b, r * num_bases // b)
        for basis, held, stride in zip((basis_A, basis_B), values, (c, b), strict=True):  # entry by entry
            basis.zero_()
            for i in range(basis.shape[0]):
                for j in range(i % stride, basis.shape[1], stride):
                    basis[i, j] = held[i, j // stride]
        A, B = (held.unflatten(0, (-1, size)).transpose(0, 1) for held, size in zip(values, (c, b), strict=True))
        pair = BlockPair(A, B, num_bases, max_dim, min_dim, (c, b, r // c))
    diagonals = Diagonals(_random(r, num_bases), _random(num_bases, min_dim), 0.7)
    return Case(pair, basis_A.unsqueeze(1), basis_B.unflatten(1, (num_bases, r)), diagonals)

"""Bases of every form that `functional` computes with, made at random and written out for the oracle."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from randlora.functional import BlockPair, DensePair, Diagonals, Pair


@dataclass(frozen=True)
class Case:
    """A pair, and what it means written out, A ``(r, 1, min_dim)`` and B ``(max_dim, num_bases, r)``, in float64."""

    pair: Pair
    basis_A: Tensor
    basis_B: Tensor
    diagonals: Diagonals


def dense(max_dim: int, min_dim: int, r: int, num_bases: int) -> tuple[Pair, Tensor, Tensor]:
    """Make dense bases; return the pair, A, ``(r, min_dim)``, and B, ``(max_dim, r·num_bases)``."""
    basis_A, basis_B = _random(r, min_dim), _random(max_dim, r * num_bases)
    return DensePair(basis_A.unsqueeze(0), basis_B), basis_A, basis_B


def block(max_dim: int, min_dim: int, r: int, num_bases: int, c: int, b: int) -> tuple[Pair, Tensor, Tensor]:
    """Make block bases, and write them out entry by entry as the definition says."""
    rows_B, width = -(-max_dim // b) * b, -(-min_dim // c)
    values_A, values_B = _random(r, width), _random(rows_B, r * num_bases // b)
    basis_A, basis_B = _random(r, min_dim).zero_(), _random(max_dim, r * num_bases).zero_()
    for basis, values, stride in ((basis_A, values_A, c), (basis_B, values_B, b)):
        for i in range(basis.shape[0]):
            for j in range(i % stride, basis.shape[1], stride):
                basis[i, j] = values[i, j // stride]
    blocks_A = values_A.unflatten(0, (-1, c)).transpose(0, 1)
    blocks_B = values_B.unflatten(0, (-1, b)).transpose(0, 1)
    return BlockPair(blocks_A, blocks_B, num_bases, max_dim, min_dim), basis_A, basis_B


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def case(kind: str, out_features: int, in_features: int, r: int) -> Case:
    """Make one layer's bases of one of `FORMS`, with Λ, Γ and a scaling of 0.7."""
    max_dim, min_dim = max(out_features, in_features), min(out_features, in_features)
    num_bases = -(-min_dim // r)
    pair, basis_A, basis_B = FORMS[kind](max_dim, min_dim, r, num_bases)
    diagonals = Diagonals(_random(r, num_bases), _random(num_bases, min_dim), 0.7)
    return Case(pair, basis_A.unsqueeze(1), basis_B.unflatten(1, (num_bases, r)), diagonals)


def _blocks(c: int, b: int) -> Callable[[int, int, int, int], tuple[Pair, Tensor, Tensor]]:
    """Make as many blocks as divide r."""

    def make(max_dim: int, min_dim: int, r: int, num_bases: int) -> tuple[Pair, Tensor, Tensor]:
        fitting_c, fitting_b = (max(size for size in range(1, most + 1) if r % size == 0) for most in (c, b))
        return block(max_dim, min_dim, r, num_bases, fitting_c, fitting_b)

    return make


FORMS: dict[str, Callable[[int, int, int, int], tuple[Pair, Tensor, Tensor]]] = {
    "dense": dense,
    "block(2,4)": _blocks(2, 4),
    "block(3,1)": _blocks(3, 1),
    "block(1,2)": _blocks(1, 2),
}

every_form = pytest.mark.parametrize("form", FORMS)

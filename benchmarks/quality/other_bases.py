"""RandLoRA on bases that the library has not: orthogonal ones, and ones made of the pretrained weight.

They are parametrizations of plain torch. Each computes the whole weight anew whenever it is read, so that what reads it
does not matter. Formula and start are those of the library, and so is the mean square of the entries of the bases,
which is 1: with equal scaling all take first steps of equal size.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import randlora
from benchmarks.quality.task import Prepared

Made = tuple[Tensor, Tensor]
"""Bases of one weight: A is ``(r, num_bases, min_dim)``, or ``(r, 1, min_dim)`` where all terms share it, and B is
``(max_dim, num_bases * r)``. Row ``(k, j)`` of A goes with column ``k * num_bases + j`` of B."""

Make = Callable[[Tensor, int, int], Made]
"""Makes bases of a weight ``(max_dim, min_dim)``, given r and a seed."""


class Update(nn.Module):
    """Adds the update to a weight. Only Λ and Γ are parameters."""

    basis_A: Tensor
    basis_B: Tensor

    def __init__(self, basis_A: Tensor, basis_B: Tensor, scaling: float, *, is_wide: bool) -> None:
        """Start with an update of zero; a wide weight has more columns than rows."""
        super().__init__()
        (r, _, min_dim), num_bases = basis_A.shape, basis_B.shape[1] // len(basis_A)
        self.register_buffer("basis_A", basis_A)
        self.register_buffer("basis_B", basis_B)
        self.lam = nn.Parameter(torch.zeros(r, num_bases))
        self.gamma = nn.Parameter(torch.full((num_bases, min_dim), 1 / min_dim))
        self.scaling, self.is_wide = scaling, is_wide

    def forward(self, weight: Tensor) -> Tensor:
        """Return the sum of a weight and its update, both ``(out_features, in_features)``."""
        scaled_A = (self.lam.unsqueeze(2) * self.basis_A * self.gamma).flatten(0, 1)
        delta = self.scaling * self.basis_B @ scaled_A
        return weight + (delta.T if self.is_wide else delta)


def orthogonal(weight: Tensor, r: int, seed: int) -> Made:
    """Draw an A and a B with orthogonal rows or columns, whichever are fewer; weights of one shape share them."""
    max_dim, min_dim = weight.shape
    generator = torch.Generator().manual_seed(seed)
    basis_A, basis_B = (
        nn.init.orthogonal_(torch.empty(shape), math.sqrt(max(shape)), generator)
        for shape in ((r, min_dim), (max_dim, math.ceil(min_dim / r) * r))
    )
    return basis_A.unsqueeze(1), basis_B


def from_weight(weight: Tensor, r: int, _seed: int, *, is_A_shared: bool) -> Made:
    """Take the singular vectors of the weight, r of them for each term, the largest first.

    Each term has its own part of A. If all are to share one, as in the library, it is that of the first term.
    """
    max_dim, min_dim = weight.shape
    num_bases = math.ceil(min_dim / r)
    missing = num_bases * r - min_dim
    left, _, right = torch.linalg.svd(weight.float(), full_matrices=False)
    left, right = F.pad(left, (0, missing)), F.pad(right, (0, 0, 0, missing))
    basis_A = right.unflatten(0, (num_bases, r)).transpose(0, 1) * math.sqrt(min_dim)
    basis_B = left.unflatten(1, (num_bases, r)).transpose(1, 2).flatten(1) * math.sqrt(max_dim)
    return (basis_A[:, :1] if is_A_shared else basis_A), basis_B


OTHER_BASES: dict[str, Make] = {
    "orthogonal": orthogonal,
    "from the weight": partial(from_weight, is_A_shared=False),
    "from the weight, one A": partial(from_weight, is_A_shared=True),
}


def parametrize_targets(prepared: Prepared, r: int, make: Callable[[Tensor], nn.Module]) -> None:
    """Parametrize the weights that the library would adapt, by what is made for each, and freeze all else."""
    model = prepared.model.requires_grad_(requires_grad=False)
    for fqn in randlora.plan(model, r=r, targets=prepared.targets.ours).targets:
        owner_name, _, name = fqn.rpartition(".")
        owner = model.get_submodule(owner_name)
        if isinstance(getattr(owner, name), nn.Module):
            owner, name = getattr(owner, name), "weight"
        parametrize.register_parametrization(owner, name, make(getattr(owner, name).detach()))


def add_updates(prepared: Prepared, seed: int, *, make: Make, r: int, scaling: float = 20.0) -> None:
    """Add an update on other bases to each weight that the library would adapt, and freeze all else."""

    def update(weight: Tensor) -> Update:
        is_wide = weight.shape[0] < weight.shape[1]
        return Update(*make(weight.T if is_wide else weight, r, seed), scaling, is_wide=is_wide)

    parametrize_targets(prepared, r, update)

"""The size of an update, from Λ, Γ and the squares of the bases, without forming the update.

An update is a sum of ``r·num_bases`` matrices of rank one, a column of UB times a row of UA. The columns of UB are
random, so these matrices are nearly orthogonal, and the square of the norm of their sum is nearly the sum of the
squares of theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from randlora.functional.operation import Diagonals


def update_norm(squared_A: Tensor, squared_B: Tensor, diagonals: Diagonals) -> Tensor:
    """Compute the norm that an update would have if its terms were orthogonal.

    Where it is 0 its gradient is 0, as that of `torch.linalg.vector_norm` is.

    Args:
        squared_A: The squares of A, ``(r, min_dim)``.
        squared_B: The sums of the squares of the columns of UB, ``(r, num_bases)``.
        diagonals: Λ and Γ, or stacks of them, whose matrices are taken together.

    Returns:
        A tensor of no dimensions in the dtype of the squares, or in a wider one of Λ and Γ.
    """
    lam, gamma, scaling = diagonals
    dtype = torch.promote_types(torch.promote_types(lam.dtype, gamma.dtype), squared_A.dtype)
    of_rows = squared_A.to(dtype) @ gamma.to(dtype).square().mT
    squared = (lam.to(dtype).square() * squared_B * of_rows).sum()
    is_zero = squared == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, squared).sqrt()) * abs(scaling)

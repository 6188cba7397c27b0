"""The oracle: the method of Albert et al. (2025) as PEFT pairs its indices, in Python loops over float64 numbers.

It is slow and obviously correct, and shares no code with the library.
"""

import math

import torch
from torch import Tensor


def delta_weight(
    basis_A: Tensor, basis_B: Tensor, lam: Tensor, gamma: Tensor, scaling: float, *, in_features: int
) -> Tensor:
    """Sum one product at a time; shapes as in `randlora.functional`, the result is ``(out, in)`` in float64."""
    r, num_bases = lam.shape
    max_dim, min_dim = basis_B.shape[0], basis_A.shape[2]
    flat_B = [[basis_B[i, j, k].item() for j in range(num_bases) for k in range(r)] for i in range(max_dim)]
    scaled_A = [
        [lam[k, j].item() * basis_A[k, 0, c].item() * gamma[j, c].item() for c in range(min_dim)]
        for k in range(r)
        for j in range(num_bases)
    ]
    update = torch.zeros(max_dim, min_dim, dtype=torch.float64)
    for i in range(max_dim):
        for c in range(min_dim):
            update[i, c] = scaling * math.fsum(flat_B[i][p] * scaled_A[p][c] for p in range(r * num_bases))
    return update if in_features == min_dim else update.T


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``x @ weight.T + bias`` entry by entry; ``x`` is ``(tokens, in)``, ``weight`` is ``(out, in)``."""
    output = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for t, row in enumerate(x.double().tolist()):
        for o, column in enumerate(weight.double().tolist()):
            output[t, o] = math.fsum(a * b for a, b in zip(row, column, strict=True))
            output[t, o] += 0.0 if bias is None else bias[o].item()
    return output

r"""The formula, and nothing else: what an adapter adds to a frozen linear layer.

RandLoRA (Albert et al., ICLR 2025, arXiv 2502.00987, eq. 4) writes the update of a frozen weight as a sum of
``num_bases`` products of random frozen bases and trained diagonal scalings, ``Σ_j B_j Λ_j A Γ_j``, with A shared by
all terms and A, B shared by all layers.

With ``max_dim = max(out, in)``, ``min_dim = min(out, in)``, ``num_bases = ceil(min_dim / r)`` the tensors are

| name | shape | meaning |
|---|---|---|
| ``basis_A`` | ``(r, 1, min_dim)`` | the small basis |
| ``basis_B`` | ``(max_dim, num_bases, r)`` | the large basis |
| ``lam`` | ``(r, num_bases)`` | Λ, trained, starts at 0 |
| ``gamma`` | ``(num_bases, min_dim)`` | Γ, trained, starts at ``1 / max(num_bases, min_dim)`` |

and the update is ``scaling · UB @ UA``, oriented as the weight, where row ``p = k·num_bases + j`` of
``UA`` is ``lam[k, j] · basis_A[k, 0] · gamma[j]`` and ``UB = basis_B.reshape(max_dim, num_bases·r)``. The pairing by
the flat index p is the one of PEFT 0.15 to 0.21 and of the authors' code; a checkpoint is only right under it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def scaled_basis(basis_A: Tensor, lam: Tensor, gamma: Tensor, scaling: float) -> Tensor:
    """Scale the small basis by the trained diagonals: ``scaling · UA`` of the module's docstring.

    Args:
        basis_A: ``(r, 1, min_dim)``.
        lam: Λ, ``(r, num_bases)``.
        gamma: Γ, ``(num_bases, min_dim)``.
        scaling: Factor of the update, ``alpha / r``.

    Returns:
        ``(r·num_bases, min_dim)`` in the widest of the three dtypes.
    """
    lam = lam.to(torch.promote_types(lam.dtype, basis_A.dtype)) * scaling  # the smallest of them, so scaled here
    return (lam[:, :, None] * basis_A * gamma).flatten(end_dim=1)


def delta_weight(
    basis_A: Tensor, basis_B: Tensor, lam: Tensor, gamma: Tensor, scaling: float, *, in_features: int
) -> Tensor:
    """Compute the update of one layer's weight.

    Args:
        basis_A: ``(r, 1, min_dim)``.
        basis_B: ``(max_dim, num_bases, r)``.
        lam: Λ, ``(r, num_bases)``.
        gamma: Γ, ``(num_bases, min_dim)``.
        scaling: Factor of the update, ``alpha / r``.
        in_features: The layer's input width, ``min_dim`` or ``max_dim``; it fixes the orientation.

    Returns:
        ``(out_features, in_features)`` in the dtype of ``basis_B``.
    """
    scaled_A = scaled_basis(basis_A, lam, gamma, scaling).to(basis_B.dtype)  # (r·num_bases, min_dim)
    delta = basis_B.flatten(start_dim=1) @ scaled_A  # (max_dim, min_dim)
    return delta if in_features == delta.shape[1] else delta.T


def adapter_output(x: Tensor, basis_A: Tensor, basis_B: Tensor, lam: Tensor, gamma: Tensor, scaling: float) -> Tensor:
    """Compute what an adapter adds to its layer's output, ``x @ delta_weight.T``, without forming the update.

    Args:
        x: ``(..., in_features)``.
        basis_A: ``(r, 1, min_dim)``.
        basis_B: ``(max_dim, num_bases, r)``; its dtype is the one computed in.
        lam: Λ, ``(r, num_bases)``.
        gamma: Γ, ``(num_bases, min_dim)``.
        scaling: Factor of the update, ``alpha / r``.

    Returns:
        ``(..., out_features)`` in the dtype of ``basis_B``.
    """
    scaled_A = scaled_basis(basis_A, lam, gamma, scaling).to(basis_B.dtype)  # (r·num_bases, min_dim)
    flat_B = basis_B.flatten(start_dim=1)  # (max_dim, num_bases·r)
    x = x.to(basis_B.dtype)
    if x.size(-1) == scaled_A.shape[1]:  # a nested tensor has sizes and no shape
        return F.linear(F.linear(x, scaled_A), flat_B)
    return F.linear(F.linear(x, flat_B.T), scaled_A.T)

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

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    scaled_A, flat_B = _factors(basis_A, basis_B, lam, gamma, scaling)
    delta = flat_B @ scaled_A  # (max_dim, min_dim)
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
    x = x.to(basis_B.dtype)
    output: Tensor = _AdapterOutput.apply(x, basis_A, basis_B, lam, gamma, scaling)  # type: ignore[no-untyped-call]
    return output


class _AdapterOutput(torch.autograd.Function):
    """`adapter_output` with a backward that keeps x, Λ and Γ alone, and builds ``UA`` again when needed.

    Plain autograd would keep ``UA`` and what it is made of, ``2·min_dim²`` numbers a layer, until backward.
    """

    @staticmethod
    def forward(x: Tensor, basis_A: Tensor, basis_B: Tensor, lam: Tensor, gamma: Tensor, scaling: float) -> Tensor:
        scaled_A, flat_B = _factors(basis_A, basis_B, lam, gamma, scaling)
        if x.size(-1) == scaled_A.shape[1]:  # a nested tensor has sizes and no shape
            return F.linear(F.linear(x, scaled_A), flat_B)
        return F.linear(F.linear(x, flat_B.T), scaled_A.T)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        *tensors, ctx.scaling = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, basis_A, basis_B, lam, gamma = ctx.saved_tensors
        scaled_A, flat_B = _factors(basis_A, basis_B, lam, gamma, ctx.scaling)
        is_wide = x.shape[-1] == scaled_A.shape[1]
        first, second = (scaled_A, flat_B) if is_wide else (flat_B.T, scaled_A.T)
        needs_x, _, _, needs_lam, needs_gamma, _ = ctx.needs_input_grad
        grad_hidden: Any = grad @ second if needs_x or is_wide else None  # (..., r·num_bases), or nobody asks for it
        grad_x = grad_hidden @ first if needs_x else None
        if not (needs_lam or needs_gamma):
            return grad_x, None, None, None, None, None
        left, right = (grad_hidden, x) if is_wide else (F.linear(x, first), grad)
        grad_A = left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])  # (r·num_bases, min_dim)
        grad_lam, grad_gamma = _diagonal_gradients(grad_A, basis_A, lam, gamma, ctx.scaling)
        return grad_x, None, None, grad_lam, grad_gamma, None


def _factors(basis_A: Tensor, basis_B: Tensor, lam: Tensor, gamma: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return ``scaling · UA``, ``(r·num_bases, min_dim)``, and ``UB``, ``(max_dim, num_bases·r)``, in B's dtype."""
    return scaled_basis(basis_A, lam, gamma, scaling).to(basis_B.dtype), basis_B.flatten(start_dim=1)


def _diagonal_gradients(
    grad_A: Tensor, basis_A: Tensor, lam: Tensor, gamma: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Lead the gradient of ``scaling · UA``, ``(r·num_bases, min_dim)``, on to Λ and Γ."""
    product = grad_A.unflatten(0, lam.shape) * (basis_A * scaling)  # (r, num_bases, min_dim)
    return (product * gamma).sum(-1).to(lam.dtype), (product * lam[:, :, None]).sum(0).to(gamma.dtype)

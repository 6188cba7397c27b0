"""The update of a weight, some of its rows, and its norm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.functional.operation import AdaptedWeight, Diagonals, adapted, adapted_linear
from randlora.functional.pairs import Pair
from randlora.functional.scratch import in_dtype, is_transformed, without_autocast


def delta_weight(pair: Pair, diagonals: Diagonals, *, is_wide: bool) -> Tensor:
    """Compute the update of a weight, or of the part that the pair and Γ are slices for, in the dtype of B.

    Stacks of Λ and Γ give a stack. ``is_wide`` says whether the input of the whole weight has ``min_dim`` features.
    Only Λ, Γ and a reference to the bases are saved for backward.
    """
    return _update(None, diagonals, pair, is_wide=is_wide)


def _update(ids: Tensor | None, diagonals: Diagonals, pair: Pair, *, is_wide: bool) -> Tensor:
    """Compute an update, or rows of it with these indices, which backward computes again."""
    lam, gamma, _ = diagonals
    if torch.is_grad_enabled() and (lam.requires_grad or gamma.requires_grad) and not is_transformed():
        update: Tensor = _FormUpdate.apply(*diagonals, ids, pair, is_wide)  # type: ignore[no-untyped-call]
        return update
    return _form_update(*diagonals, ids, pair, is_wide)


def _form_update(lam: Tensor, gamma: Tensor, scaling: float, ids: Tensor | None, pair: Pair, is_wide: bool) -> Tensor:  # noqa: FBT001
    """Compute one update after the other: a batch of them would need as many times the memory in between."""
    if ids is not None:
        return _update_alone(lam, gamma, scaling, pair, is_wide).rows(ids)
    if lam.dim() == 2:
        return _update_alone(lam, gamma, scaling, pair, is_wide).total()
    if is_transformed():  # one set of operators, however many matrices there are
        total = torch.vmap(lambda lam, gamma: _update_alone(lam, gamma, scaling, pair, is_wide).total())
        return total(lam, gamma)
    return torch.stack([_update_alone(*each, scaling, pair, is_wide).total() for each in zip(lam, gamma, strict=True)])


def _update_alone(lam: Tensor, gamma: Tensor, scaling: float, pair: Pair, is_wide: bool) -> AdaptedWeight:  # noqa: FBT001
    return adapted(None, pair, lam, gamma, scaling, is_wide=is_wide)


class _FormUpdate(torch.autograd.Function):
    """`_form_update`. Plain autograd would keep rows of UB, and ``2·min_dim²`` numbers a matrix for UA."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        lam, gamma, scaling, ids, pair, is_wide = inputs
        ctx.constants = scaling, pair, is_wide
        ctx.save_for_backward(lam, gamma, ids)
        return _form_update(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lam, gamma, ids = ctx.saved_tensors
        with without_autocast(grad.device.type):  # it may be on in backward alone
            if ids is not None:
                grad_lam, grad_gamma = _update_alone(lam, gamma, *ctx.constants).gradients_from_rows(ids, grad)
            elif lam.dim() == 2:
                grad_lam, grad_gamma = _update_alone(lam, gamma, *ctx.constants).gradients_from_update(grad)
            else:
                stacks = zip(lam, gamma, grad, strict=True)
                of_matrices = [
                    _update_alone(*own, *ctx.constants).gradients_from_update(upstream) for *own, upstream in stacks
                ]
                grad_lam, grad_gamma = (torch.stack(grads) for grads in zip(*of_matrices, strict=True))
            return in_dtype(grad_lam, lam.dtype), in_dtype(grad_gamma, gamma.dtype), None, None, None, None


def update_norm(squared_A: Tensor, squared_B: Tensor, diagonals: Diagonals) -> Tensor:
    """Compute the norm that an update would have if its terms were orthogonal, without forming the update.

    They nearly are, because the columns of UB are random. The squares are those of A, ``(r, min_dim)``, and the sums of
    those of the columns of UB, ``(r, num_bases)``. A norm of 0 has the gradient 0, as in `torch.linalg.vector_norm`.
    """
    lam, gamma, scaling = diagonals
    dtype = torch.promote_types(torch.promote_types(lam.dtype, gamma.dtype), squared_A.dtype)
    of_rows = squared_A.to(dtype) @ gamma.to(dtype).square().mT
    squared = (lam.to(dtype).square() * squared_B * of_rows).sum()
    is_zero = squared == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, squared).sqrt()) * abs(scaling)


def update_rows(ids: Tensor, pair: Pair, diagonals: Diagonals, *, num_rows: int, is_wide: bool) -> Tensor:
    """Compute the rows of an update with some indices, ``(*ids.shape, columns)``, in the dtype of B.

    The indices are integers of any shape, less than ``num_rows``; ``is_wide`` is as for `delta_weight`. Only Λ, Γ, the
    indices and a reference to the bases are saved for backward, and for a table with fewer rows than columns a matrix
    with one row of the table's width for each index.
    """
    device = ids.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # the dtype of B is the one to compute in
        with torch.autocast(device, enabled=False):
            return update_rows(ids, pair, diagonals, num_rows=num_rows, is_wide=is_wide)
    flat = ids.reshape(-1)
    if flat.size(0) >= num_rows:  # the whole update is not larger than the result
        return F.embedding(ids, delta_weight(pair, diagonals, is_wide=is_wide))
    rows: Tensor
    if not is_wide:
        columns = torch.arange(num_rows, device=ids.device)
        chosen = (flat.unsqueeze(1) == columns).to(pair.B.dtype)
        rows = adapted_linear(chosen, pair, diagonals, is_wide=True)
    elif device == "cpu" and not is_transformed():
        different, places = flat.unique(return_inverse=True)
        rows = F.embedding(places, _update(different, diagonals, pair, is_wide=True))
    else:  # elsewhere the program would wait for the number of different indices
        rows = _update(flat, diagonals, pair, is_wide=True)
    return rows.view(*ids.shape, rows.shape[1])

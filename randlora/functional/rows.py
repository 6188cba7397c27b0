"""Rows of the update of a table, such as in an embedding, without computing the update of the whole table."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.functional.adapted import Pair, adapted
from randlora.functional.operation import Diagonals, adapted_linear
from randlora.functional.scratch import in_dtype, is_transformed, without_autocast
from randlora.functional.update import delta_weight
from randlora.modes import are_bases_fake


def update_rows(ids: Tensor, pair: Pair, diagonals: Diagonals, *, num_rows: int, is_wide: bool) -> Tensor:
    """Compute the rows of an update with some indices, in the dtype of B.

    Only Λ, Γ, the indices and a reference to the bases are saved for backward. For a table with fewer rows than
    columns, a matrix with one row of the table's width for each index is saved too.

    Args:
        ids: Indices of rows, integers of any shape, at least 0 and less than ``num_rows``.
        pair: The bases of the table.
        diagonals: Λ and Γ.
        num_rows: The number of rows of the table.
        is_wide: Whether a row of the whole table has ``min_dim`` entries, as for `delta_weight`.

    Returns:
        ``(*ids.shape, columns)``.
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
    elif is_transformed():
        rows = _rows(flat, *diagonals, pair)
    elif (
        device == "cpu" and not are_bases_fake()
    ):  # elsewhere the program would wait for the number of different indices
        different, places = flat.unique(return_inverse=True)
        rows = F.embedding(places, _recomputed(different, diagonals, pair))
    else:
        rows = _recomputed(flat, diagonals, pair)
    return rows.view(*ids.shape, rows.shape[1])


def _recomputed(ids: Tensor, diagonals: Diagonals, pair: Pair) -> Tensor:
    """Compute the same as `_rows`, which backward computes again."""
    lam, gamma, scaling = diagonals
    if torch.is_grad_enabled() and (lam.requires_grad or gamma.requires_grad):
        rows: Tensor = _Rows.apply(ids, lam, gamma, scaling, pair)  # type: ignore[no-untyped-call]
        return rows
    return _rows(ids, lam, gamma, scaling, pair)


def _rows(ids: Tensor, lam: Tensor, gamma: Tensor, scaling: float, pair: Pair) -> Tensor:
    """Compute rows of ``UB @ UA``, ``(ids, row_size)``: the table has no fewer rows than columns."""
    return adapted(None, pair, lam, gamma, scaling, is_wide=True).rows(ids)


class _Rows(torch.autograd.Function):
    """`_rows`. Plain autograd would keep rows of UB, and UA with its factors."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, lam: Tensor, gamma: Tensor, scaling: float, pair: Pair) -> Tensor:
        ctx.save_for_backward(ids, lam, gamma)
        ctx.rest = scaling, pair
        return _rows(ids, lam, gamma, scaling, pair)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, lam, gamma = ctx.saved_tensors
        scaling, pair = ctx.rest
        with without_autocast(grad.device.type):  # it may be on in backward alone
            table = adapted(None, pair, lam, gamma, scaling, is_wide=True)
            grad_lam, grad_gamma = table.gradients_from_rows(ids, grad)
        return None, in_dtype(grad_lam, lam.dtype), in_dtype(grad_gamma, gamma.dtype), None, None

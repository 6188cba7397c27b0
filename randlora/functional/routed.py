"""The updates of several adapters on the same bases, each multiplied by tokens of its own: together, or in turn.

Together, as in `randlora.functional.stacked`, where no gradient is needed. One adapter after the other, as for single
adapters, where one is, where each has so many tokens that forming its update pays, in transformed code,
and under dispatch modes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from randlora.functional import scratch
from randlora.functional.adapted import Pair
from randlora.functional.cost import Compute, chosen_forward
from randlora.functional.operation import Diagonals, adapted_linear
from randlora.modes import may_be_kept


def goes_together(
    x: Tensor, diagonals: Iterable[Tensor], pair: Pair, counts: Sequence[int], *, is_wide: bool, compute: Compute
) -> bool:
    """Whether to multiply the tokens of several updates by `stacked_update`, and not by `one_by_one`.

    Args:
        x: ``(tokens, in_features)``.
        diagonals: Every Λ and Γ.
        pair: The bases that the updates share.
        counts: The number of tokens of each.
        is_wide: Whether the input has ``min_dim`` features.
        compute: How to compute; see `randlora.functional.cost`.
    """
    if len(counts) == 1 or scratch.is_transformed() or may_be_kept():
        return False
    if torch.is_grad_enabled() and (x.requires_grad or any(part.requires_grad for part in diagonals)):
        return False
    way = chosen_forward(max(counts), pair, is_wide=is_wide, has_weight=False, compute=compute)
    return way != "materialized"


def one_by_one(
    x: Tensor,
    pair: Pair,
    diagonals: Sequence[Diagonals],
    counts: Sequence[int],
    *,
    is_wide: bool,
    compute: Compute = "auto",
) -> Tensor:
    """Compute the product of each token with the update that it belongs to, with the gradients of single adapters.

    Args:
        x: ``(tokens, in_features)`` in the dtype of B, sorted by update.
        pair: The bases that the updates share.
        diagonals: Λ, Γ and the scaling of each update.
        counts: The number of tokens of each, at least 1.
        is_wide: Whether the input has ``min_dim`` features.
        compute: How to compute; see `randlora.functional.cost`.

    Returns:
        ``(tokens, out_features)`` in the dtype of B.
    """
    each = zip(x.split(list(counts)), diagonals, strict=True)
    return torch.cat([adapted_linear(part, pair, one, compute=compute, is_wide=is_wide) for part, one in each])

"""The updates of several adapters on the same bases, each multiplied by tokens of its own.

The products with B, which the adapters share, are computed for all tokens at once. Those with A, Λ and Γ are computed
for one adapter after the other, or all at once if there are few tokens of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from randlora.functional import scratch
from randlora.functional.adapted import Adapted, Pair, adapted
from randlora.functional.cost import Compute, chosen_all_at_once, chosen_forward, chosen_terms
from randlora.functional.grouped import grouped_update
from randlora.functional.operation import Diagonals, adapted_linear, form_for


def routed_update(
    x: Tensor,
    pair: Pair,
    diagonals: Sequence[Diagonals],
    counts: Sequence[int],
    *,
    is_wide: bool,
    compute: Compute = "auto",
) -> Tensor:
    """Compute the product of each token with the update that it belongs to.

    If a gradient is needed, the updates are computed one after the other, as for single adapters.

    Args:
        x: ``(tokens, in_features)`` in the dtype of B, sorted by update.
        pair: The bases that the updates share.
        diagonals: Λ, Γ and the scaling of each update, all of one shape.
        counts: The number of tokens of each, at least 1.
        is_wide: Whether the input has ``min_dim`` features.
        compute: How to compute; see `randlora.functional.cost`.

    Returns:
        ``(tokens, out_features)`` in the dtype of B.
    """
    most = max(counts)
    has_update_formed = chosen_forward(most, pair, is_wide=is_wide, has_weight=False, compute=compute) == "materialized"
    if len(counts) == 1 or has_update_formed or _needs_gradient(x, diagonals):
        each = zip(x.split(list(counts)), diagonals, strict=True)
        return torch.cat([adapted_linear(part, pair, one, compute=compute, is_wide=is_wide) for part, one in each])
    with scratch.without_autocast(x.device.type):
        if x.device.type != "cpu" and chosen_all_at_once(counts, pair, is_wide=is_wide, compute=compute):
            return all_at_once(x, pair, diagonals, counts, is_wide=is_wide)
        pair = form_for(pair, most, compute)
        updates = [adapted(None, pair, *one, is_wide=is_wide) for one in diagonals]
        if compute == "auto" and chosen_terms(most, pair, is_wide=is_wide):
            return _term_by_term(x, pair, updates, counts)
        return _factored(x, pair, updates, counts)


def all_at_once(
    x: Tensor, pair: Pair, diagonals: Sequence[Diagonals], counts: Sequence[int], *, is_wide: bool
) -> Tensor:
    """Compute the same with a number of operators that does not depend on that of the adapters.

    Λ and Γ are copied for each token, which on a CPU takes longer than the operators.
    """
    lam = torch.stack([one.lam * one.scaling for one in diagonals])
    gamma = torch.stack([one.gamma for one in diagonals])
    return grouped_update(x, pair, Diagonals(lam, gamma, 1.0), counts, is_wide=is_wide)


def _term_by_term(x: Tensor, pair: Pair, updates: Sequence[Adapted], counts: Sequence[int]) -> Tensor:
    """Compute the products without building any UA, which is larger than the few tokens repeated for each term."""
    lam = torch.stack([one.lam for one in updates])
    lam.mul_(lam.new_tensor([one.factor for one in updates]).view(-1, 1, 1))
    lam = lam.repeat_interleave(torch.tensor(counts, device=lam.device), 0, output_size=len(x))
    if updates[0].is_wide:
        each = zip(x.split(list(counts)), updates, strict=True)
        terms = torch.cat([pair.small_to_terms(part, one.gamma) for part, one in each])
        return pair.flat_to_large(scratch.in_dtype((terms * lam).flatten(1), x.dtype), None, 1.0)
    terms = pair.large_to_flat(x).view(lam.shape) * lam
    each = zip(terms.split(list(counts)), updates, strict=True)
    small = torch.cat([(pair.terms_to_small(part) * one.gamma).sum(1) for part, one in each])
    return scratch.in_dtype(small, x.dtype)


def _factored(x: Tensor, pair: Pair, updates: Sequence[Adapted], counts: Sequence[int]) -> Tensor:
    """Compute the products with one UA after the other. Hidden vectors have the tokens in the dimension before last."""
    scaled_As = (pair.scaled_A(one.lam, one.gamma) for one in updates)
    if updates[0].is_wide:
        each = zip(x.split(list(counts)), updates, scaled_As, strict=True)
        parts = [scratch.scaled(pair.small_to_hidden(part, scaled_A), one.factor) for part, one, scaled_A in each]
        return pair.hidden_to_large(torch.cat(parts, -2), None, 1.0)
    each = zip(pair.large_to_hidden(x).split(list(counts), -2), updates, scaled_As, strict=True)
    return torch.cat([pair.hidden_to_small(part, scaled_A, None, one.factor) for part, one, scaled_A in each])


def _needs_gradient(x: Tensor, diagonals: Sequence[Diagonals]) -> bool:
    trained = (part.requires_grad for one in diagonals for part in (one.lam, one.gamma))
    return torch.is_grad_enabled() and (x.requires_grad or any(trained))

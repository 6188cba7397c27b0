"""Products with ``UA`` for a few tokens, without building it: the tokens are scaled instead of the basis.

``UA`` has ``min_dim²`` entries, which is most of the work where there is one token to generate from. Here each token is
laid out once a basis, scaled by Γ on one side of A and by Λ on the other: ``num_bases·min_dim`` numbers a token.
"""

import torch
from torch import Tensor

from randlora.functional import scratch
from randlora.functional.diagonals import Diagonals, join, split


def small_to_hidden(small: Tensor, basis_A: Tensor, diagonals: Diagonals) -> Tensor:
    """Multiply ``(tokens, min_dim)`` by ``scaling · UA.T``; ``basis_A`` is ``(c, r/c, width)``.

    Returns:
        ``(c, tokens, r/c·num_bases)`` in the dtype of ``small``.
    """
    lam, gamma = diagonals.beside(basis_A)
    laid_out = split(small, len(basis_A)).unsqueeze(2) * gamma  # (c, tokens, num_bases, width)
    hidden = torch.bmm(laid_out.flatten(1, 2), basis_A.mT.to(laid_out.dtype)).unflatten(1, laid_out.shape[1:3])
    return scratch.times(hidden, lam.transpose(1, 3)).transpose(2, 3).flatten(start_dim=2).to(small.dtype)


def hidden_to_small(hidden: Tensor, basis_A: Tensor, diagonals: Diagonals) -> Tensor:
    """Multiply ``(c, tokens, r/c·num_bases)`` by ``scaling · UA``; ``basis_A`` is ``(c, r/c, width)``.

    Returns:
        ``(tokens, min_dim)`` in the dtype of ``hidden``.
    """
    lam, gamma = diagonals.beside(basis_A)
    laid_out = hidden.unflatten(2, (basis_A.shape[1], -1)).transpose(2, 3) * lam.transpose(1, 3)
    small = torch.bmm(laid_out.flatten(1, 2), basis_A.to(laid_out.dtype)).unflatten(1, laid_out.shape[1:3])
    return join(scratch.times(small, gamma).sum(2), diagonals.gamma.shape[1]).to(hidden.dtype)

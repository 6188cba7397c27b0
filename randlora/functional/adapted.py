"""A layer's weight together with the update of one adapter: the products of a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.functional import scratch
from randlora.functional.cost import Way
from randlora.functional.pairs import Pair

WIDE = (torch.float32, torch.float64)

WriteOut = Callable[[torch.dtype], Tensor]
"""A function that dequantizes a weight, ``(out_features, in_features)``, to the dtype it is given.

Every call returns a new tensor, which may be overwritten.
"""


class Adapted(NamedTuple):
    """``weight + update`` of one layer, ``(out, in)``, as an operand of products.

    Attributes:
        weight: The base layer's weight, ``(out, in)``, in the dtype of B; ``None`` for the update alone.
        pair: The bases.
        lam: Λ, in a dtype at least as wide as A; multiplied by the scaling if B has 16 bits. Products with few tokens
            also take one Λ and one Γ for each token.
        gamma: Γ, in a dtype at least as wide as A.
        factor: The scaling if Λ is not multiplied by it, else 1.
        scaling: The scaling.
        is_wide: Whether the input has ``min_dim`` features, which includes square layers. For a part of a weight, the
            input of the whole weight decides.
        owns_weight: Whether the weight is referenced nowhere else and may be overwritten.
    """

    weight: Tensor | None
    pair: Pair
    lam: Tensor
    gamma: Tensor
    factor: float
    scaling: float
    is_wide: bool
    owns_weight: bool = False

    def without_weight(self) -> Adapted:
        """Return the update alone. torch.compile does not support `_replace` before 2.9."""
        return Adapted(None, self.pair, self.lam, self.gamma, self.factor, self.scaling, self.is_wide)

    def total(self) -> Tensor:
        """Return weight + update, ``(out, in)``, in the memory layout of the weight, which is overwritten if owned."""
        onto = self.weight if self.weight is None or self.is_wide else self.weight.T
        total = self.pair.update(self.pair.scaled_A(self.lam, self.gamma), onto, self.factor, uses_up=self.owns_weight)
        return total if self.is_wide else total.T

    def output(self, rows: Tensor, bias: Tensor | None, way: Way) -> Tensor:
        """Compute the output, ``(tokens, out)``, for ``rows``, ``(tokens, in)``."""
        if way == "materialized":
            return F.linear(rows, self.total(), bias)
        onto = None if self.weight is None else F.linear(rows, self.weight, bias)
        pair = self.pair
        if way == "few_tokens":
            if self.is_wide:
                return self._terms_to_large(pair.small_to_terms(rows, self.gamma), onto)
            return self._by_term_to_small(pair.terms_to_small(self._terms(rows) * self.lam), onto)
        scaled_A = pair.scaled_A(self.lam, self.gamma)
        if self.is_wide:
            return pair.hidden_to_large(pair.small_to_hidden(rows, scaled_A), onto, self.factor)
        return pair.hidden_to_small(pair.large_to_hidden(rows), scaled_A, onto, self.factor)

    def input_gradient(self, grad: Tensor, way: Way) -> tuple[Tensor, Tensor | None]:
        """Compute the gradient of the input, ``(tokens, in)``, from the gradient of the output, ``(tokens, out)``.

        Also return the hidden vectors that `gradients_from_tokens` can reuse, if there are any.
        """
        if way == "materialized":
            return grad @ self.total(), None
        onto, pair = None if self.weight is None else grad @ self.weight, self.pair
        scaled_A = pair.scaled_A(self.lam, self.gamma)
        if not self.is_wide:
            return pair.hidden_to_large(pair.small_to_hidden(grad, scaled_A), onto, self.factor), None
        hidden = pair.large_to_hidden(grad)
        return pair.hidden_to_small(hidden, scaled_A, onto, self.factor), hidden

    def gradients_from_tokens(self, tokens: Tensor, grad: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute the gradients of Λ and Γ through both factors, with the hidden vectors of `input_gradient`."""
        large, small = (grad, tokens) if self.is_wide else (tokens, grad)
        if hidden is None:
            return self._of_diagonals(self.pair.grad_from_sides(large, small))
        return self._of_diagonals(self.pair.grad_from_tokens(hidden, small))

    def gradients_from_update(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of Λ and Γ from the gradient of the update, ``(out, in)``."""
        return self._of_diagonals(self.pair.grad_from_update(grad, across=not self.is_wide))

    def rows(self, ids: Tensor) -> Tensor:
        """Compute rows of the update, ``(ids, in)``; ``is_wide`` must hold."""
        scaled_A = self.pair.scaled_A(self.lam, self.gamma)
        return self.pair.hidden_to_small(self.pair.rows_of_B(ids), scaled_A, None, self.factor)

    def gradients_from_rows(self, ids: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of Λ and Γ from the gradient of `rows`."""
        return self._of_diagonals(self.pair.grad_from_tokens(self.pair.rows_of_B(ids), grad))

    def gradients_of_few_tokens(
        self, tokens: Tensor | None, grad: Tensor, *, needs_input: bool, sums: bool = True
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Compute the gradients of the input, of Λ and of Γ without building UA; see `cost`.

        Without ``tokens`` there are none of Λ and Γ; without ``sums`` they are of each token.
        """
        small, large = (tokens, grad) if self.is_wide else (grad, tokens)
        before = None if small is None else self.pair.small_to_terms(small, self.gamma)
        after = None if large is None else self._terms(large)
        by_term = None if after is None else self.pair.terms_to_small(after * self.lam)
        grad_x = None
        if needs_input:
            onto = None if self.weight is None else grad @ self.weight
            to_input = self._by_term_to_small if self.is_wide else self._terms_to_large
            of_gradient = by_term if self.is_wide else before
            assert of_gradient is not None, "it is computed from the gradient"
            grad_x = to_input(of_gradient, onto)
        if small is None or before is None or after is None or by_term is None:
            return grad_x, None, None
        grad_lam, grad_gamma = before * after, by_term * small.unsqueeze(1)
        if sums:
            is_one = grad.size(0) == 1
            grad_lam, grad_gamma = (grad_lam[0], grad_gamma[0]) if is_one else (grad_lam.sum(0), grad_gamma.sum(0))
        return grad_x, *self._times_scaling(grad_lam, grad_gamma)

    def _of_diagonals(self, grad_A: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of Λ and Γ from the gradient of UA without the scaling."""
        return self._times_scaling(*self.pair.diagonal_gradients(grad_A, self.lam, self.gamma))

    def _times_scaling(self, grad_lam: Tensor, grad_gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply gradients by the scaling. The gradient of Γ already contains it if Λ does."""
        return scratch.scaled(grad_lam, self.scaling), scratch.scaled(grad_gamma, self.factor)

    def _terms(self, large: Tensor) -> Tensor:
        """Multiply ``(tokens, max_dim)`` by UB and view the result as ``(tokens, r, num_bases)``."""
        return self.pair.large_to_flat(large).view(-1, *self.lam.shape[-2:])

    def _terms_to_large(self, terms: Tensor, onto: Tensor | None) -> Tensor:
        """Multiply ``(tokens, r, num_bases)`` by Λ, the factor and ``UB.T``, and add ``onto``."""
        flat = (self.lam * terms).flatten(1)
        return self.pair.flat_to_large(scratch.in_dtype(flat, self.pair.B.dtype), onto, self.factor)

    def _by_term_to_small(self, by_term: Tensor, onto: Tensor | None) -> Tensor:
        """Multiply ``(tokens, num_bases, min_dim)`` by Γ and the factor, sum over the terms, and add ``onto``."""
        total = scratch.plus(onto, (by_term * self.gamma).sum(1), self.factor)
        return scratch.in_dtype(total, self.pair.B.dtype)


def adapted(
    weight: Tensor | WriteOut | None, pair: Pair, lam: Tensor, gamma: Tensor, scaling: float, *, is_wide: bool
) -> Adapted:
    """Build the operand of one layer (see `Adapted`), casting Λ and Γ to at least the dtype of A.

    It owns the weight if the weight had to be dequantized or converted to the dtype of B.
    """
    wide, dtype = pair.A.dtype, pair.B.dtype
    if lam.dtype != wide:
        lam = lam.to(torch.promote_types(lam.dtype, wide))
    if gamma.dtype != wide:
        gamma = gamma.to(torch.promote_types(gamma.dtype, wide))
    factor = scaling
    if dtype not in WIDE and scaling != 1:
        lam, factor = lam * scaling, 1.0
    if weight is None or (isinstance(weight, Tensor) and weight.dtype == dtype):
        return Adapted(weight, pair, lam, gamma, factor, scaling, is_wide)
    own = weight.to(dtype) if isinstance(weight, Tensor) else weight(dtype)
    return Adapted(own, pair, lam, gamma, factor, scaling, is_wide, owns_weight=True)

"""A layer's weight together with the update of one adapter: the products that a training step makes with both."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from randlora.functional import few_tokens
from randlora.functional.block import BlockPair
from randlora.functional.cost import Sizes, Way
from randlora.functional.dense import DensePair
from randlora.functional.diagonals import Diagonals, diagonal_gradients, scaled_basis
from randlora.functional.sparse import SparsePair

Pair = DensePair | BlockPair | SparsePair


class Adapted(NamedTuple):
    """``weight + update`` of one layer, ``(out, in)``, as something to multiply by.

    Attributes:
        weight: The base layer's, ``(out, in)``, in the dtype of B; ``None`` where only the update is meant.
        pair: The bases.
        diagonals: Λ and Γ.
        in_features: The layer's input width; it is ``min_dim`` or ``max_dim``, and fixes the orientation.
        owns_weight: Whether nobody else holds the weight, so that forming the sum may use its memory up.
    """

    weight: Tensor | None
    pair: Pair
    diagonals: Diagonals
    in_features: int
    owns_weight: bool = False

    @property
    def is_wide(self) -> bool:
        """Whether the input is on the small side, as in square layers too."""
        return self.in_features == self.pair.min_dim

    @property
    def out_features(self) -> int:
        """The layer's output width."""
        return self.pair.max_dim if self.is_wide else self.pair.min_dim

    def sizes(self, tokens: int) -> Sizes:
        """Name what the cost of a step depends on."""
        r, num_bases = self.diagonals.lam.shape
        sides = self.pair.max_dim, self.pair.min_dim
        has_weight = self.weight is not None
        return Sizes(tokens, *sides, r * num_bases, num_bases, self.pair.shares, self.is_wide, has_weight)

    def oriented(self, matrix: Tensor) -> Tensor:
        """Turn ``(out, in)`` into ``(max_dim, min_dim)``, or back."""
        return matrix if self.is_wide else matrix.T

    def scaled_A(self) -> Tensor:
        """Build ``scaling · UA`` in the dtype of B."""
        return scaled_basis(self.pair.A, self.diagonals, self.pair.B.dtype)

    def total(self) -> Tensor:
        """Form the sum of weight and update, ``(out, in)``, laid out as the weight is, which is gone if it is owned."""
        onto = None if self.weight is None else self.oriented(self.weight)
        return self.oriented(self.pair.update(self.scaled_A(), onto, uses_up=self.owns_weight))

    def output(self, rows: Tensor, way: Way, onto: Tensor | None) -> Tensor:
        """Take tokens through both factors of the update: ``(tokens, in)`` to ``(tokens, out)``, added to ``onto``."""
        pair = self.pair
        if way == "few_tokens" and self.is_wide:
            return pair.hidden_to_large(few_tokens.small_to_hidden(rows, pair.A, self.diagonals), onto)
        if way == "few_tokens":
            small = few_tokens.hidden_to_small(pair.large_to_hidden(rows), pair.A, self.diagonals)
            return small if onto is None else onto + small
        if self.is_wide:
            return pair.hidden_to_large(pair.small_to_hidden(rows, self.scaled_A()), onto)
        return pair.hidden_to_small(pair.large_to_hidden(rows), self.scaled_A(), onto)

    def input_gradient(self, grad: Tensor, way: Way) -> tuple[Tensor, Tensor | None]:
        """Compute the gradient of the input, ``(tokens, in)``, and what `gradients_from_tokens` can use again.

        Args:
            grad: Gradient of the output, ``(tokens, out)``.
            way: Factored or materialized.
        """
        if way == "materialized":
            return grad @ self.total(), None
        onto = None if self.weight is None else grad @ self.weight
        if not self.is_wide:
            return self.pair.hidden_to_large(self.pair.small_to_hidden(grad, self.scaled_A()), onto), None
        hidden = self.pair.large_to_hidden(grad)
        return self.pair.hidden_to_small(hidden, self.scaled_A(), onto), hidden

    def gradients_from_tokens(self, tokens: Tensor, grad: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute the gradients of Λ and Γ through both factors.

        Args:
            tokens: The input, ``(tokens, in)``.
            grad: Gradient of the output, ``(tokens, out)``.
            hidden: What `input_gradient` had of the same work.
        """
        large, small = (grad, tokens) if self.is_wide else (tokens, grad)
        hidden = self.pair.large_to_hidden(large) if hidden is None else hidden
        return diagonal_gradients(self.pair.grad_from_tokens(hidden, small), self.pair.A, self.diagonals)

    def gradients_from_update(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of Λ and Γ from that of the update, ``(out, in)``."""
        return diagonal_gradients(self.pair.grad_from_update(self.oriented(grad)), self.pair.A, self.diagonals)

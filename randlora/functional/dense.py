"""Products with dense bases."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from randlora.functional import scratch
from randlora.functional.cost import Shape, pass_over
from randlora.functional.scratch import in_dtype


class DensePair:
    """A pair of bases without structure.

    Every pair of bases has the same products, between *small* vectors (of ``min_dim`` entries), *large* ones
    (``max_dim``) and the *hidden* ones between the two factors (``r·num_bases``). Hidden vectors are *flat*, in the
    order of p, or in the order of the rows of ``scaled_A``; for dense bases both are the same. A pair is made once per
    layer shape, device and dtype, so the views that its products need are made beforehand.

    Attributes:
        A: ``(1, r, min_dim)``.
        B: ``(max_dim, r·num_bases)``, in the dtype to compute in.
        rest: The arguments besides A and B that rebuild the pair from other tensors.
        written: ``None``: these bases are dense already.
    """

    written: None = None

    def __init__(self, A: Tensor, B: Tensor) -> None:
        """Hold the bases of one layer."""
        self.A, self.B = A, B
        self.rest: tuple[int, ...] = ()
        self._rows_of_A = A.transpose(0, 1)  # (r, 1, min_dim)
        self._A = A.squeeze(0)
        self._A_T, self._B_T = self._A.T, B.T

    @cached_property
    def shape(self) -> Shape:
        """The sizes that the cost depends on, with the shares of the dense work of products with UA, UB and both."""
        entry = pass_over(self.B.device.type, self.B.dtype).multiply_adds
        (_, r, min_dim), (max_dim, hidden) = self.A.shape, self.B.shape
        return Shape(max_dim, min_dim, hidden, hidden // r, (1.0, 1.0, 1.0), entry)

    def scaled_A(self, lam: Tensor, gamma: Tensor) -> Tensor:
        """Compute UA, ``(r·num_bases, min_dim)``, in the dtype of B, rounded once from the widest of its factors."""
        product = scratch.times(self._rows_of_A * gamma, lam.unsqueeze(2))
        return in_dtype(product.reshape(-1, gamma.size(1)), self.B.dtype)

    def diagonal_gradients(self, grad_A: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of Λ and Γ from the gradient of UA, which is overwritten."""
        product = scratch.times(grad_A.reshape(lam.size(0), lam.size(1), -1), self._rows_of_A)
        return (product * gamma).sum(2), scratch.times(product, lam.unsqueeze(2)).sum(0)

    def small_to_hidden(self, small: Tensor, scaled_A: Tensor) -> Tensor:
        """Multiply ``(tokens, min_dim)`` by ``UA.T``: hidden vectors in the order of the rows of ``scaled_A``."""
        return small @ scaled_A.T

    def hidden_to_small(self, hidden: Tensor, scaled_A: Tensor, onto: Tensor | None, factor: float) -> Tensor:
        """Multiply such vectors by ``factor·UA`` and add ``onto``, ``(tokens, min_dim)``, which is overwritten."""
        if onto is None:
            return scratch.scaled(hidden @ scaled_A, factor)
        return scratch.plus_product(onto, hidden, scaled_A, factor)

    def large_to_hidden(self, large: Tensor) -> Tensor:
        """Multiply ``(tokens, max_dim)`` by ``UB``: hidden vectors in the order of the rows of ``scaled_A``."""
        return large @ self.B

    def rows_of_B(self, ids: Tensor) -> Tensor:
        """Return rows of ``UB``: hidden vectors in the order of the rows of ``scaled_A``."""
        return self.B.index_select(0, ids)

    def hidden_to_large(self, hidden: Tensor, onto: Tensor | None, factor: float) -> Tensor:
        """Multiply such vectors by ``factor·UB.T`` and add ``onto``, ``(tokens, max_dim)``, which is overwritten."""
        if onto is None:
            return scratch.scaled(hidden @ self._B_T, factor)
        return scratch.plus_product(onto, hidden, self._B_T, factor)

    large_to_flat = large_to_hidden
    flat_to_large = hidden_to_large

    def small_to_terms(self, small: Tensor, gamma: Tensor) -> Tensor:
        """Multiply tokens by Γ and ``A.T``, once per term: ``(tokens, r, num_bases)``, hidden vectors before Λ.

        Γ may also be one for each token, ``(tokens, num_bases, min_dim)``.
        """
        if small.size(0) == 1:  # as in generation, with fewer views
            laid_out = small * gamma.view(gamma.shape[-2:])
            return (in_dtype(self._A, laid_out.dtype) @ laid_out.T).unsqueeze(0)
        laid_out = (small.unsqueeze(1) * gamma).reshape(-1, gamma.size(-1))
        terms = laid_out @ in_dtype(self._A_T, laid_out.dtype)
        return terms.view(-1, gamma.size(-2), terms.size(1)).transpose(1, 2)

    def terms_to_small(self, terms: Tensor) -> Tensor:
        """Multiply ``(tokens, r, num_bases)`` by A, once per term: ``(tokens, num_bases, min_dim)``, before Γ."""
        rows = terms.transpose(1, 2).reshape(-1, terms.size(1))
        product = rows @ in_dtype(self._A, rows.dtype)
        return product.view(-1, terms.size(2), product.size(1))

    def grad_from_tokens(self, hidden: Tensor, small: Tensor) -> Tensor:
        """Compute the gradient of ``UA``, ``hidden.T @ small``, in the shape of ``scaled_A``."""
        return hidden.T @ small

    def grad_from_sides(self, large: Tensor, small: Tensor) -> Tensor:
        """Compute the same with ``hidden = large @ UB``."""
        return self.grad_from_tokens(self.large_to_hidden(large), small)

    def grad_from_update(self, grad: Tensor, *, across: bool) -> Tensor:
        """Compute the gradient of ``UA``, ``UB.T @ grad``, from the update's gradient, or ``across`` its transpose."""
        return self._B_T @ (grad.T if across else grad)

    def update(self, scaled_A: Tensor, onto: Tensor | None, factor: float, *, uses_up: bool = False) -> Tensor:
        """Compute ``onto + factor·UB @ UA``, ``(max_dim, min_dim)``, with the sum inside the product (addmm).

        The result has the memory layout of ``onto``, which is overwritten only if ``uses_up``.
        """
        if onto is None:
            return scratch.scaled(self.B @ scaled_A, factor)
        is_across = onto.stride(-1) != 1
        left, right = (scaled_A.T, self._B_T) if is_across else (self.B, scaled_A)
        onto = onto.T if is_across else onto
        if uses_up:
            total = scratch.plus_product(onto, left, right, factor)
        else:
            total = torch.addmm(onto, left, right, alpha=factor)
        return total.T if is_across else total

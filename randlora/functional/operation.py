"""A frozen linear layer with one adapter, and its update alone: the products of a training step, and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.functional import scratch
from randlora.functional.cost import SMALL_WORK, Compute, Sizes, Way, backward_ways, forward_way
from randlora.functional.pairs import BlockPair, DensePair, Pair
from randlora.functional.scratch import in_dtype

WIDE = (torch.float32, torch.float64)

WriteOut = Callable[[torch.dtype], Tensor]
"""A function that dequantizes a weight, ``(out_features, in_features)``, to a dtype, into a new tensor each time."""


class Diagonals(NamedTuple):
    """The trained scalings of one adapter in one layer."""

    lam: Tensor  # Λ, ``(r, num_bases)``, or for `delta_weight` a stack of them, ``(matrices, r, num_bases)``
    gamma: Tensor  # Γ, ``(num_bases, min_dim)``, or a stack of them
    scaling: float  # of the update, ``alpha / r``


def adapted_linear(
    x: Tensor,
    pair: Pair,
    diagonals: Diagonals,
    *,
    weight: Tensor | WriteOut | None = None,
    bias: Tensor | None = None,
    compute: Compute = "auto",
    is_wide: bool | None = None,
) -> Tensor:
    """Compute ``x @ (weight + update).T + bias``, or ``x @ update.T`` if no weight is given, in the dtype of B.

    x is ``(..., in_features)`` in the dtype of B, and the weight ``(out_features, in_features)`` in any layout and
    dtype, or a function that dequantizes it, for one product at a time. Only x, Λ, Γ, the weight and a reference to the
    bases are saved for backward, which computes the rest again, for the gradients that are needed. If bases and Γ are
    slices for a part of a weight, ``is_wide`` must say whether the whole layer's input has ``min_dim`` features.
    """
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # the dtype of B already follows autocast
        with torch.autocast(device, enabled=False):
            return adapted_linear(x, pair, diagonals, weight=weight, bias=bias, compute=compute, is_wide=is_wide)
    shape = x.shape
    rows = x if len(shape) == 2 else x.reshape(-1, shape[-1])  # here, so that the output is no view
    lam, gamma, scaling = diagonals
    is_wide = shape[-1] == gamma.shape[-1] if is_wide is None else is_wide
    run: Callable[..., Tensor] = _output  # plain operations, which torch differentiates in any nesting of transforms
    # as one object, whose tensors are no arguments, so that saved-tensor hooks such as save_on_cpu see none
    bases: tuple[Any, ...] = pair, None, None, ()
    if scratch.is_in_transform() or scratch.is_forward_mode():
        pass
    elif torch.compiler.is_compiling():  # every tensor must be an argument, and a symbolic scaling multiply one here
        run, lam, scaling = _AdaptedLinear.apply, lam * scaling, 1.0
        bases = None, pair.A, pair.B, pair.other_arguments
    elif (
        torch.is_grad_enabled()
        and (
            lam.requires_grad
            or gamma.requires_grad
            or x.requires_grad
            or any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in (weight, bias))
        )
        and not scratch.is_traced()  # a trace fails where two functions use a tensor that is no argument, as bases are
    ):
        run = _AdaptedLinear.apply
    output = run(rows, weight, bias, lam, gamma, scaling, *bases, compute, is_wide)
    return output if len(shape) == 2 else output.view(*shape[:-1], output.shape[1])


def _output(*inputs: Any) -> Tensor:
    """Compute the output, ``(tokens, out)``, from the arguments of the autograd function."""
    rows, weight, bias, lam, gamma, scaling, pair, basis_A, basis_B, other_arguments, compute, is_wide = inputs
    tokens = rows.shape[0]
    pair = _pair(pair, basis_A, basis_B, other_arguments, tokens, compute)
    way = chosen_forward(tokens, pair, is_wide=is_wide, has_weight=weight is not None, compute=compute)
    if bias is not None and bias.dtype != pair.B.dtype:
        bias = bias.to(pair.B.dtype)
    return adapted(weight, pair, lam, gamma, scaling, is_wide=is_wide).output(rows, bias, way)


def is_known(tokens: int) -> bool:
    """Whether a number of tokens is an integer, not a tracer's symbol, on whose value a choice would be a guard."""
    return type(tokens) is int and not torch.compiler.is_compiling()


def chosen_forward(tokens: int, pair: Pair, *, is_wide: bool, has_weight: bool, compute: Compute) -> Way:
    """Return how to compute the output: the cheapest way, but ``"factored"`` if ``tokens`` is a tracer's symbol."""
    if compute != "auto":
        return compute
    return forward_way(Sizes(tokens, pair.shape, is_wide, has_weight)) if is_known(tokens) else "factored"


def _pair(
    pair: Pair | None, basis_A: Any, basis_B: Any, other_arguments: tuple[Any, ...], tokens: int, compute: Compute
) -> Pair:
    """Return the pair, made again if it was passed as its tensors, or its dense copy if the product is small."""
    if pair is None:
        pair = BlockPair(basis_A, basis_B, *other_arguments) if other_arguments else DensePair(basis_A, basis_B)
    if pair.written is None or compute != "auto" or not is_known(tokens):
        return pair
    return pair.written if tokens * pair.max_dim * pair.min_dim <= SMALL_WORK else pair


class _AdaptedLinear(torch.autograd.Function):
    """`adapted_linear` of a matrix. Plain autograd would keep ``UA`` and its factors, ``2·min_dim²`` numbers."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, lam, gamma, ctx.scaling, *bases, ctx.compute, ctx.is_wide = inputs
        ctx.pair, basis_A, basis_B, ctx.other_arguments = bases
        _, needs_weight, _, needs_lam, needs_gamma, *_ = ctx.needs_input_grad
        ctx.bias_dtype = None if bias is None else bias.dtype
        written, ctx.write_out = (weight, None) if weight is None or isinstance(weight, Tensor) else (None, weight)
        if written is not None and not needs_weight:  # a merge before backward changes the parameter's data
            written = written.detach()
        tokens = x if needs_weight or needs_lam or needs_gamma else None
        ctx.save_for_backward(tokens, written, lam, gamma, basis_A, basis_B)
        return _output(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        device = grad.device.type
        if device != "meta" and torch.is_autocast_enabled(device):  # autocast may be on in backward alone
            with torch.autocast(device, enabled=False):
                return _gradients(ctx, grad)
        return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lam, gamma, basis_A, basis_B = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_lam, needs_gamma, *others = ctx.needs_input_grad
    needs_diagonals, tokens = needs_lam or needs_gamma, grad.shape[0]
    pair = _pair(ctx.pair, basis_A, basis_B, ctx.other_arguments, tokens, ctx.compute)
    x_way: Way = "factored" if ctx.compute == "auto" else ctx.compute
    diagonals_way = x_way
    if ctx.compute == "auto" and is_known(tokens):
        sizes = Sizes(tokens, pair.shape, ctx.is_wide, ctx.write_out is not None or weight is not None)
        x_way, diagonals_way = backward_ways(
            sizes, needs_input=needs_x, needs_diagonals=needs_diagonals, needs_weight=needs_weight
        )
    layer = adapted((ctx.write_out or weight) if needs_x else None, pair, lam, gamma, ctx.scaling, is_wide=ctx.is_wide)
    grad_x = grad_weight = grad_lam = grad_gamma = hidden = None
    if x_way == "few_tokens":
        x_or_none = x if needs_diagonals else None
        grad_x, grad_lam, grad_gamma = layer.gradients_of_few_tokens(x_or_none, grad, needs_input=needs_x)
    elif needs_x:
        grad_x, hidden = layer.input_gradient(grad, x_way)
    if layer.owns_weight:  # free the dequantized weight before the next matrix of its size is made
        layer = adapted(None, pair, lam, gamma, ctx.scaling, is_wide=ctx.is_wide)
    if needs_weight or (needs_diagonals and diagonals_way == "materialized"):
        grad_weight = grad.T @ x
    if grad_weight is not None and needs_diagonals and diagonals_way == "materialized":
        grad_lam, grad_gamma = layer.gradients_from_update(grad_weight)
    elif needs_diagonals and diagonals_way == "factored":
        grad_lam, grad_gamma = layer.gradients_from_tokens(x, grad, hidden)
    return (
        grad_x,
        in_dtype(grad_weight, weight.dtype) if needs_weight and grad_weight is not None else None,
        in_dtype(grad.sum(0), ctx.bias_dtype) if needs_bias else None,
        None if grad_lam is None else in_dtype(grad_lam, lam.dtype),
        None if grad_gamma is None else in_dtype(grad_gamma, gamma.dtype),
        *[None] * len(others),
    )


def adapted(
    weight: Tensor | WriteOut | None, pair: Pair, lam: Tensor, gamma: Tensor, scaling: float, *, is_wide: bool
) -> AdaptedWeight:
    """Return weight and update of one layer, with Λ and Γ in at least the dtype of A, and the weight in that of B."""
    wide, dtype, factor = pair.A.dtype, pair.B.dtype, scaling
    if lam.dtype != wide:
        lam = lam.to(torch.promote_types(lam.dtype, wide))
    if gamma.dtype != wide:
        gamma = gamma.to(torch.promote_types(gamma.dtype, wide))
    if dtype not in WIDE and scaling != 1:
        lam, factor = lam * scaling, 1.0
    if weight is None or (isinstance(weight, Tensor) and weight.dtype == dtype):
        return AdaptedWeight(weight, pair, lam, gamma, factor, scaling, is_wide)
    own = weight.to(dtype) if isinstance(weight, Tensor) else weight(dtype)
    return AdaptedWeight(own, pair, lam, gamma, factor, scaling, is_wide, owns_weight=True)


class AdaptedWeight(NamedTuple):
    """``weight + update`` of one layer, ``(out, in)``, as an operand of products."""

    weight: Tensor | None  # ``None`` for the update alone
    pair: Pair
    lam: Tensor  # multiplied by the scaling if B has 16 bits; with few tokens, Λ and Γ may be one for each token
    gamma: Tensor
    factor: float  # the scaling if Λ is not multiplied by it, else 1
    scaling: float
    is_wide: bool  # whether the input of the whole layer has ``min_dim`` features, which includes square layers
    owns_weight: bool = False  # whether the weight is referenced nowhere else and may be overwritten

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
        """Compute the gradient of the input, ``(tokens, in)``, and the hidden vectors for `gradients_from_tokens`."""
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
        return self._of_diagonals(self.pair.grad_from_update(grad, is_transposed=not self.is_wide))

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
        """Compute the gradients of the input and, given ``tokens``, of Λ and Γ, summed or for each, without UA."""
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
        return self.pair.flat_to_large(in_dtype(flat, self.pair.B.dtype), onto, self.factor)

    def _by_term_to_small(self, by_term: Tensor, onto: Tensor | None) -> Tensor:
        """Multiply ``(tokens, num_bases, min_dim)`` by Γ and the factor, sum over the terms, and add ``onto``."""
        total = scratch.plus(onto, (by_term * self.gamma).sum(1), self.factor)
        return in_dtype(total, self.pair.B.dtype)


def delta_weight(pair: Pair, diagonals: Diagonals, *, is_wide: bool, ids: Tensor | None = None) -> Tensor:
    """Compute the update of a weight, or of the part that the pair and Γ are slices for, in the dtype of B.

    Stacks of Λ and Γ give a stack, and indices, ``(ids,)``, only these rows. ``is_wide`` says whether the input of the
    whole weight has ``min_dim`` features. Only Λ, Γ and a reference to the bases are saved for backward.
    """
    lam, gamma, _ = diagonals
    if torch.is_grad_enabled() and (lam.requires_grad or gamma.requires_grad) and not scratch.is_transformed():
        update: Tensor = _FormUpdate.apply(*diagonals, ids, pair, is_wide)  # type: ignore[no-untyped-call]
        return update
    return _form_update(*diagonals, ids, pair, is_wide)


def _form_update(lam: Tensor, gamma: Tensor, scaling: float, ids: Tensor | None, pair: Pair, is_wide: bool) -> Tensor:  # noqa: FBT001
    """Compute one update after the other: a batch of them would need as many times the memory in between."""

    def alone(lam: Tensor, gamma: Tensor) -> AdaptedWeight:
        return adapted(None, pair, lam, gamma, scaling, is_wide=is_wide)

    if ids is not None:
        return alone(lam, gamma).rows(ids)
    if lam.dim() == 2:
        return alone(lam, gamma).total()
    if scratch.is_transformed():  # one set of operators, however many matrices there are
        return torch.vmap(lambda lam, gamma: alone(lam, gamma).total())(lam, gamma)
    return torch.stack([alone(*each).total() for each in zip(lam, gamma, strict=True)])


class _FormUpdate(torch.autograd.Function):
    """`_form_update`. Plain autograd would keep rows of UB, and ``2·min_dim²`` numbers a matrix for UA."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        lam, gamma, ctx.scaling, ids, ctx.pair, ctx.is_wide = inputs
        ctx.save_for_backward(lam, gamma, ids)
        return _form_update(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lam, gamma, ids = ctx.saved_tensors

        def of(lam: Tensor, gamma: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
            update = adapted(None, ctx.pair, lam, gamma, ctx.scaling, is_wide=ctx.is_wide)
            return update.gradients_from_update(grad) if ids is None else update.gradients_from_rows(ids, grad)

        with scratch.without_autocast(grad.device.type):  # it may be on in backward alone
            if lam.dim() == 2:
                grad_lam, grad_gamma = of(lam, gamma, grad)
            else:
                of_matrices = [of(*each) for each in zip(lam, gamma, grad, strict=True)]
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
    elif device == "cpu" and not scratch.is_transformed():
        different, places = flat.unique(return_inverse=True)
        rows = F.embedding(places, delta_weight(pair, diagonals, is_wide=True, ids=different))
    else:  # elsewhere the program would wait for the number of different indices
        rows = delta_weight(pair, diagonals, is_wide=True, ids=flat)
    return rows.view(*ids.shape, rows.shape[1])

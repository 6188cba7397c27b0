"""Products of tokens with stacks of weights and their updates, and whether to compute those of all matrices at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.functional import Compute, Diagonals, Pair
from randlora.functional.cost import ALWAYS, Shape, Sizes
from randlora.functional.operation import AdaptedWeight, adapted
from randlora.functional.scratch import in_dtype, without_autocast

ENTRIES = 2**22
"""Entries of the tokens repeated for each term that are computed at once, but at least as many as in one weight."""
MATRIX_OPERATORS = 4 * 2**15
"""The cost of the operators for one more matrix in a stage, as entries that a pass reads in the same time."""
GATHERING_PASSES = 7
"""Further passes over the repeated tokens if each has its own Γ, which is gathered and whose gradient is summed.

Both were measured on a CPU: with 128 experts of 128 features, all at once is faster below 32 tokens an expert, with 32
experts of 512 features below 8.
"""


def chosen_all_at_once(counts: Sequence[int], shape: Shape, *, is_wide: bool, compute: Compute) -> bool:
    """Whether matrices of a stack, with these numbers of tokens, are computed together, without building ``UA``."""
    visited = len(counts) - counts.count(0)
    if compute != "auto" or not visited:
        return False
    sizes = Sizes(-(-sum(counts) // visited), shape, is_wide, has_weight=True)
    one_by_one = min(sizes.product(way) for way in ALWAYS) + shape.entry * MATRIX_OPERATORS
    return sizes.through_terms + GATHERING_PASSES * shape.entry * sizes.laid_out + sizes.through_B <= one_by_one


class Groups(NamedTuple):
    """Tokens sorted by the matrix of a stack that each belongs to, and what `grouped_update` is given of the layer."""

    counts: Sequence[int]
    pair: Pair
    scaling: float
    is_wide: bool

    def parts(self, lam: Tensor, gamma: Tensor) -> Iterator[tuple[slice, Tensor, AdaptedWeight]]:
        """Yield slices of the tokens with the matrix of each token, and their updates with a Λ and a Γ for each."""
        shape, tokens = self.pair.shape, sum(self.counts)
        matrices = torch.arange(len(self.counts), device=lam.device)
        matrix_of = matrices.repeat_interleave(torch.tensor(self.counts, device=lam.device), output_size=tokens)
        at_once = max(1, max(ENTRIES, shape.max_dim * shape.min_dim) // (shape.num_bases * shape.min_dim))
        for start in range(0, tokens, at_once):
            part = slice(start, min(start + at_once, tokens))
            which = matrix_of[part]
            yield part, which, adapted(None, self.pair, lam[which], gamma[which], self.scaling, is_wide=self.is_wide)


def grouped_update(x: Tensor, pair: Pair, diagonals: Diagonals, counts: Sequence[int], *, is_wide: bool) -> Tensor:
    """Compute the products of tokens, sorted by matrix, with the updates of the matrices that they belong to.

    The number of operators does not depend on the number of matrices. Only x, stacks of Λ and Γ and a reference to the
    bases are saved for backward. ``counts`` has the number of tokens of each matrix.
    """
    lam, gamma, scaling = diagonals
    with without_autocast(x.device.type):
        output: Tensor = _Grouped.apply(x, lam, gamma, Groups(counts, pair, scaling, is_wide))  # type: ignore[no-untyped-call]
        return output


class _Grouped(torch.autograd.Function):
    """`grouped_update`. Plain autograd would keep a Γ for each token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lam: Tensor, gamma: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(x, lam, gamma)
        ctx.groups = groups
        return torch.cat([updates.output(x[part], None, "few_tokens") for part, _, updates in groups.parts(lam, gamma)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad.device.type):
            return _grouped_gradients(ctx, grad)


def _grouped_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, lam, gamma = ctx.saved_tensors
    needs_x, needs_lam, needs_gamma, _ = ctx.needs_input_grad
    grads_x, grad_lam, grad_gamma = [], *(torch.zeros_like(diagonal) for diagonal in (lam, gamma))
    for part, which, updates in ctx.groups.parts(lam, gamma):
        tokens = x[part] if needs_lam or needs_gamma else None
        of_x, *of_diagonals = updates.gradients_of_few_tokens(tokens, grad[part], needs_input=needs_x, sums=False)
        grads_x.append(of_x)
        for total, of_tokens in zip((grad_lam, grad_gamma), of_diagonals, strict=True):
            if of_tokens is not None:
                total.index_add_(0, which, in_dtype(of_tokens, total.dtype))
    return torch.cat(grads_x) if needs_x else None, grad_lam, grad_gamma, None


def summed_linear(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``x @ (weight + delta).T + bias`` in the dtype of x. The sum is not kept for backward."""
    rows = x.reshape(-1, x.shape[-1])
    with without_autocast(x.device.type):
        output: Tensor = _SummedLinear.apply(rows, weight, delta)  # type: ignore[no-untyped-call]
        output = output if bias is None else output + bias.to(output.dtype)
    return output.view(*x.shape[:-1], output.shape[1])


class _SummedLinear(torch.autograd.Function):
    """`summed_linear` of a matrix. Many weights may have one update, and plain autograd would keep a sum for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, delta: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, delta)
        return F.linear(x, weight.to(x.dtype) + delta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, delta = ctx.saved_tensors
        needs_x, needs_weight, needs_delta = ctx.needs_input_grad
        with without_autocast(grad.device.type):
            grad_x = grad @ (weight.to(x.dtype) + delta) if needs_x else None
            grad_sum = grad.T @ x if needs_weight or needs_delta else None
        grad_weight = grad_sum.to(weight.dtype) if needs_weight and grad_sum is not None else None
        return grad_x, grad_weight, grad_sum if needs_delta else None

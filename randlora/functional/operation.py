"""What autograd sees: a frozen linear layer with one adapter as a single operation, with a lean backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.functional.adapted import Adapted, Pair
from randlora.functional.block import BlockPair
from randlora.functional.cost import Compute, Way, backward_ways, forward_way
from randlora.functional.dense import DensePair
from randlora.functional.diagonals import Diagonals
from randlora.functional.scratch import is_transformed
from randlora.functional.sparse import SparsePair

WriteOut = Callable[[torch.dtype], Tensor]
"""Writes a weight out that is stored in another form, ``(out_features, in_features)`` in the dtype asked for.

Every call returns new memory, which is used up.
"""


def adapted_linear(
    x: Tensor,
    pair: Pair,
    diagonals: Diagonals,
    *,
    weight: Tensor | WriteOut | None = None,
    bias: Tensor | None = None,
    compute: Compute = "auto",
    keep: bool = False,
) -> Tensor:
    """Compute ``x @ (weight + update).T + bias``, or the update's part alone where no weight is given.

    Nothing is kept for backward but x, Λ, Γ, the weight and a reference to the bases; what was built of them is built
    again. A gradient that nobody asks for costs nothing.

    A weight that is stored as codes is written out for as long as one product takes, and gets no gradient.

    Args:
        x: ``(..., in_features)`` in the dtype of B.
        pair: The bases, as the layer slices them; the dtype of B is the one computed in.
        diagonals: Λ and Γ.
        weight: The base layer's weight, ``(out_features, in_features)`` in any layout and dtype, or what writes it out.
        bias: The base layer's bias, ``(out_features,)``.
        compute: How; ``"auto"`` chooses by the sizes, see `randlora.functional.cost`. An exported program, which serves
            any number of tokens, is factored.
        keep: Let a materialized forward keep the sum of weight and update for backward, one number for each of the
            weight, which saves forming it again.

    Returns:
        ``(..., out_features)`` in the dtype of B.
    """
    if compute == "auto" and torch.compiler.is_exporting():
        compute = "factored"  # a choice by the number of tokens would be a condition on it
    arguments = x, weight, bias, *diagonals, *_parts(pair), compute, keep
    result: Tensor | tuple[Tensor, Tensor]
    with _without_autocast(x.device):
        result = _AdaptedLinear.apply(*arguments)  # type: ignore[no-untyped-call]
    return result[0] if isinstance(result, tuple) else result


def delta_weight(pair: Pair, diagonals: Diagonals, *, in_features: int) -> Tensor:
    """Compute the update of one layer's weight.

    Args:
        pair: The bases, as the layer slices them.
        diagonals: Λ and Γ.
        in_features: The layer's input width, ``min_dim`` or ``max_dim``; it fixes the orientation.

    Returns:
        ``(out_features, in_features)`` in the dtype of B.
    """
    return Adapted(None, pair, diagonals, in_features).total()


def _parts(pair: Pair) -> tuple[Tensor | None, Tensor | None, Pair | tuple[int, ...]]:
    """Take a pair apart where a transform must see every tensor, and ``torch.jit.trace`` wants to.

    Otherwise it stays whole, so that hooks on what autograd saves, as that of ``save_on_cpu``, leave the bases alone.
    """
    if not is_transformed() and torch._C._get_tracing_state() is None:
        return None, None, pair
    assert not isinstance(pair, SparsePair), "torch has no transforms of sparse products: ask for dense bases"
    return pair.A, pair.B, pair[2:]


def _pair(basis_A: Tensor | None, basis_B: Tensor | None, rest: Any, /) -> Pair:
    """Put a pair together again."""
    if basis_A is None or basis_B is None:
        whole: Pair = rest
        return whole
    return BlockPair(basis_A, basis_B, *rest) if rest else DensePair(basis_A, basis_B)


class _AdaptedLinear(torch.autograd.Function):
    """`adapted_linear`; where something is kept, that is a second output.

    Plain autograd would keep ``UA`` and what it is made of, ``2·min_dim²`` numbers a layer, until backward.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | WriteOut | None,
        bias: Tensor | None,
        lam: Tensor,
        gamma: Tensor,
        scaling: float,
        basis_A: Tensor | None,
        basis_B: Tensor | None,
        rest: Pair | tuple[int, ...],
        compute: Compute,
        keep: bool,  # noqa: FBT001
    ) -> Tensor | tuple[Tensor, Tensor]:
        pair = _pair(basis_A, basis_B, rest)
        adapted = _adapted(weight, pair, Diagonals(lam, gamma, scaling), x.shape[-1])
        bias = _in_dtype(bias, pair.B.dtype)
        tokens = x.numel() // x.shape[-1]
        way = forward_way(adapted.sizes(tokens), compute)
        if way == "materialized":
            total = adapted.total()
            output = _own(F.linear(x, total, bias), x.shape[:-1])
            return (output, total) if keep else output
        onto = None if adapted.weight is None else F.linear(x, adapted.weight, bias).view(tokens, adapted.out_features)
        return _own(adapted.output(x.reshape(tokens, x.shape[-1]), way, onto), x.shape[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
        x, weight, bias, lam, gamma, ctx.scaling, basis_A, basis_B, ctx.rest, ctx.compute, _ = inputs
        needs_x, needs_weight, _, needs_lam, needs_gamma, *_ = ctx.needs_input_grad
        ctx.in_features, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype
        kept = output[1] if isinstance(output, tuple) else None
        if kept is not None:
            ctx.mark_non_differentiable(kept)
        needs_tokens = needs_weight or needs_lam or needs_gamma
        weight, ctx.write_out = (weight, None) if weight is None or isinstance(weight, Tensor) else (None, weight)
        ctx.save_for_backward(
            x if needs_tokens else None, weight, kept if needs_x else None, lam, gamma, basis_A, basis_B
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        with _without_autocast(grad.device):
            return _backward(ctx, grad)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the dtype of B: autocast, which had its say in choosing that, may be on in backward alone."""
    is_on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if is_on else nullcontext()


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, kept, lam, gamma, basis_A, basis_B = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_lam, needs_gamma, *others = ctx.needs_input_grad
    needs_diagonals = needs_lam or needs_gamma
    if torch.is_grad_enabled():  # to be differentiated again: what was kept is a number, and no function of Λ and Γ
        kept = None
    pair = _pair(basis_A, basis_B, ctx.rest)
    adapted = _adapted(
        (ctx.write_out or weight) if needs_x else None, pair, Diagonals(lam, gamma, ctx.scaling), ctx.in_features
    )
    rows = grad.reshape(grad.numel() // adapted.out_features, adapted.out_features)
    x_way, diagonals_way = backward_ways(
        adapted.sizes(len(rows)),
        needs_input=needs_x,
        needs_weight=needs_weight,
        needs_diagonals=needs_diagonals,
        has_kept=kept is not None,
        compute=ctx.compute,
    )
    grad_x, hidden = _input_gradient(adapted, rows, x_way, kept) if needs_x else (None, None)
    adapted = adapted._replace(weight=None)  # one that was written out goes before another matrix of its size comes
    grad_weight, grad_lam, grad_gamma = None, None, None
    if needs_weight or needs_diagonals:
        tokens = x.reshape(len(rows), ctx.in_features)
        if needs_weight or diagonals_way == "materialized":
            grad_weight = rows.T @ tokens
        if needs_diagonals and grad_weight is not None and diagonals_way == "materialized":
            grad_lam, grad_gamma = adapted.gradients_from_update(grad_weight)
        elif needs_diagonals:
            grad_lam, grad_gamma = adapted.gradients_from_tokens(tokens, rows, hidden)
    return (
        None if grad_x is None else grad_x.view(*grad.shape[:-1], ctx.in_features),
        grad_weight.to(weight.dtype) if needs_weight and grad_weight is not None else None,
        rows.sum(0).to(ctx.bias_dtype) if needs_bias else None,
        grad_lam,
        grad_gamma,
        *[None] * len(others),
    )


def _adapted(weight: Tensor | WriteOut | None, pair: Pair, diagonals: Diagonals, in_features: int) -> Adapted:
    """Put the parts together in the dtype of B; a weight that had to be written out or converted is nobody else's."""
    dtype = pair.B.dtype
    is_new = not isinstance(weight, Tensor) or weight.dtype != dtype
    return Adapted(_in_dtype(weight, dtype), pair, diagonals, in_features, is_new)


def _in_dtype(tensor: Tensor | WriteOut | None, dtype: torch.dtype) -> Tensor | None:
    """Take a tensor in a dtype, written out where it is stored in another form."""
    if tensor is None:
        return None
    return tensor.to(dtype) if isinstance(tensor, Tensor) else tensor(dtype)


def _own(output: Tensor, leading: torch.Size) -> Tensor:
    """Give an output its leading dimensions without being a view, which nobody may change in place.

    ``nn.ReLU(inplace=True)`` after a layer does; torch refuses that for views made inside of a function.
    """
    result: Tensor = torch.ops.aten._unsafe_view(output, (*leading, output.shape[-1]))
    return result


def _input_gradient(adapted: Adapted, rows: Tensor, way: Way, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return adapted.input_gradient(rows, way) if kept is None else (rows @ kept, None)

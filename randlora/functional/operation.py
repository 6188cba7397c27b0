"""The autograd function of a frozen linear layer with one adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from randlora.functional.adapted import WriteOut, adapted
from randlora.functional.cost import Compute, chosen_backward, chosen_forward, is_small
from randlora.functional.pairs import BlockPair, DensePair, Pair
from randlora.functional.scratch import in_dtype, is_forward_mode, is_in_transform, is_traced


class Diagonals(NamedTuple):
    """The trained scalings of one adapter in one layer.

    Attributes:
        lam: Λ, ``(r, num_bases)``, or for `delta_weight` a stack of them, ``(matrices, r, num_bases)``.
        gamma: Γ, ``(num_bases, min_dim)``, or a stack of them.
        scaling: Factor of the update, ``alpha / r``.
    """

    lam: Tensor
    gamma: Tensor
    scaling: float


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
    """Compute ``x @ (weight + update).T + bias``, or ``x @ update.T`` if no weight is given.

    Only x, Λ, Γ, the weight and a reference to the bases are saved for backward, which computes the rest again, for the
    gradients that are needed. A quantized weight is dequantized for one product at a time and gets no gradient.

    Args:
        x: ``(..., in_features)`` in the dtype of B.
        pair: The bases of the layer; the dtype of B is the one computed in.
        diagonals: Λ and Γ.
        weight: The base layer's weight, ``(out_features, in_features)`` in any layout and dtype, or a function that
            dequantizes it.
        bias: The base layer's bias, ``(out_features,)``.
        compute: How to compute; ``"auto"`` chooses by size, see `randlora.functional.cost`. A compiled or exported
            program is factored, because it may be run with any number of tokens.
        is_wide: Whether the whole layer's input has ``min_dim`` features. By default, whether x has as many features as
            Γ has columns, which may be wrong if bases and Γ are slices for a part of a weight.

    Returns:
        ``(..., out_features)`` in the dtype of B.
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
    bases: tuple[Any, ...] = None, None, pair
    is_compiling, is_transforming = torch.compiler.is_compiling(), is_in_transform()
    if is_forward_mode() or (is_compiling and is_transforming):
        pass
    elif is_compiling or is_transforming:  # every tensor must be an argument
        run, bases = _AdaptedLinear.apply if is_compiling else _Transformed.apply, (pair.A, pair.B, pair.rest)
        if is_compiling:  # the scaling may be a symbolic float, so it must multiply a tensor here
            lam, scaling = lam * scaling, 1.0
    elif (
        torch.is_grad_enabled()
        and (
            x.requires_grad
            or lam.requires_grad
            or gamma.requires_grad
            or (bias is not None and bias.requires_grad)
            or (isinstance(weight, Tensor) and weight.requires_grad)
        )
        and not is_traced()  # a trace fails where two functions use a tensor that is no argument, as the bases are
    ):
        run = _AdaptedLinear.apply  # without the bases, which saved-tensor hooks such as save_on_cpu then do not see
    output = run(rows, weight, bias, lam, gamma, scaling, *bases, compute, is_wide)
    return output if len(shape) == 2 else output.view(*shape[:-1], output.shape[1])


def _output(
    rows: Tensor,
    weight: Tensor | WriteOut | None,
    bias: Tensor | None,
    lam: Tensor,
    gamma: Tensor,
    scaling: float,
    basis_A: Tensor | None,
    basis_B: Tensor | None,
    rest: Pair | tuple[int, ...],
    compute: Compute,
    is_wide: bool,  # noqa: FBT001
) -> Tensor:
    """Compute the output, ``(tokens, out)``, from the arguments of the autograd functions."""
    tokens = rows.shape[0]
    pair = _pair(basis_A, basis_B, rest, tokens, compute)
    way = chosen_forward(tokens, pair, is_wide=is_wide, has_weight=weight is not None, compute=compute)
    if bias is not None and bias.dtype != pair.B.dtype:
        bias = bias.to(pair.B.dtype)
    return adapted(weight, pair, lam, gamma, scaling, is_wide=is_wide).output(rows, bias, way)


def _pair(basis_A: Tensor | None, basis_B: Tensor | None, rest: Any, tokens: int, compute: Compute) -> Pair:
    """Return the pair that was passed to an autograd function, or its dense copy if the product is small."""
    pair: Pair = rest if basis_A is None or basis_B is None else pair_like(basis_A, basis_B, rest)
    if compute != "auto" or pair.written is None or not is_small(tokens, pair.max_dim * pair.min_dim):
        return pair
    return pair.written


def pair_like(basis_A: Tensor, basis_B: Tensor, rest: Any, /) -> Pair:
    """Rebuild a pair from its tensors."""
    return BlockPair(basis_A, basis_B, *rest) if rest else DensePair(basis_A, basis_B)


class _AdaptedLinear(torch.autograd.Function):
    """`adapted_linear` of a matrix. Plain autograd would keep ``UA`` and its factors, ``2·min_dim²`` numbers."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, *inputs)
        return _output(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        device = grad.device.type
        if device != "meta" and torch.is_autocast_enabled(device):  # autocast may be on in backward alone
            with torch.autocast(device, enabled=False):
                return _gradients(ctx, grad)
        return _gradients(ctx, grad)


class _Transformed(torch.autograd.Function):
    """The same for `torch.func` transforms: with ``setup_context`` every call runs ``inspect.signature``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _output(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        _save(ctx, *inputs)

    backward = _AdaptedLinear.backward


def _save(
    ctx: Any,
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
    is_wide: bool,  # noqa: FBT001
) -> None:
    """Save what backward needs."""
    _, needs_weight, _, needs_lam, needs_gamma, *_ = ctx.needs_input_grad
    ctx.scaling, ctx.rest, ctx.compute, ctx.is_wide = scaling, rest, compute, is_wide
    ctx.bias_dtype = None if bias is None else bias.dtype
    needs_tokens = needs_weight or needs_lam or needs_gamma
    written, ctx.write_out = (weight, None) if weight is None or isinstance(weight, Tensor) else (None, weight)
    # a merge before backward changes the parameter's data; but a transform around this one may differentiate by it
    if written is not None and not written.requires_grad and not is_in_transform():
        written = written.detach()
    ctx.save_for_backward(x if needs_tokens else None, written, lam, gamma, basis_A, basis_B)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the gradients that are needed."""
    x, weight, lam, gamma, basis_A, basis_B = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_lam, needs_gamma, *others = ctx.needs_input_grad
    needs_diagonals = needs_lam or needs_gamma
    pair = _pair(basis_A, basis_B, ctx.rest, grad.shape[0], ctx.compute)
    has_weight, is_wide = ctx.write_out is not None or weight is not None, ctx.is_wide
    x_way, diagonals_way = chosen_backward(
        grad.shape[0],
        pair,
        is_wide=is_wide,
        has_weight=has_weight,
        needs=(needs_x, needs_weight, needs_diagonals),
        compute=ctx.compute,
    )
    layer = adapted((ctx.write_out or weight) if needs_x else None, pair, lam, gamma, ctx.scaling, is_wide=is_wide)
    grad_x = grad_weight = grad_lam = grad_gamma = hidden = None
    if x_way == "few_tokens":
        tokens = x if needs_diagonals else None
        grad_x, grad_lam, grad_gamma = layer.gradients_of_few_tokens(tokens, grad, needs_input=needs_x)
    elif needs_x:
        grad_x, hidden = layer.input_gradient(grad, x_way)
    if layer.owns_weight:  # free the dequantized weight before the next matrix of its size is made
        layer = layer.without_weight()
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

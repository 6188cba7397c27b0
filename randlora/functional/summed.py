"""The product with the sum of a weight and an update that is formed already."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.functional.scratch import without_autocast


def summed_linear(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``x @ (weight + delta).T + bias``. The sum is not kept for backward.

    Args:
        x: ``(..., in_features)``.
        weight: ``(out_features, in_features)`` in the dtype of x, or in a dtype to be cast to it.
        delta: ``(out_features, in_features)`` in the dtype of x.
        bias: ``(out_features,)``.

    Returns:
        ``(..., out_features)`` in the dtype of x.
    """
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

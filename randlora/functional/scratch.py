"""Arithmetic on tensors that nobody else holds, in their own memory where that is allowed.

Fresh memory is dear: the system clears every page of it first, which can cost more than the arithmetic. Compiled code
manages its own memory; autograd may still want the old values; and torch's function transforms do not let a batch be
written into a single tensor.
"""

import torch
from torch import Tensor


def is_transformed() -> bool:
    """Whether a compiler or one of torch's function transforms runs what is written here, and not Python itself."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _may_overwrite() -> bool:
    return not (is_transformed() or torch.is_grad_enabled())


def times(scratch: Tensor, factor: Tensor) -> Tensor:
    """Return ``scratch * factor``; the memory of ``scratch`` is used up."""
    if scratch.dtype == torch.promote_types(scratch.dtype, factor.dtype) and _may_overwrite():
        return scratch.mul_(factor)
    return scratch * factor


def plus(scratch: Tensor, term: Tensor) -> Tensor:
    """Return ``scratch + term``; the memory of ``scratch`` is used up."""
    return scratch.add_(term) if _may_overwrite() else scratch + term


def plus_product(scratch: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``scratch + left @ right`` of matrices, rounded once; the memory of ``scratch`` is used up."""
    return scratch.addmm_(left, right) if _may_overwrite() else torch.addmm(scratch, left, right)


def plus_products(scratch: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Do what `plus_product` does for a batch of matrices."""
    return scratch.baddbmm_(left, right) if _may_overwrite() else torch.baddbmm(scratch, left, right)

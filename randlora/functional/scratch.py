"""Arithmetic on tensors that nobody else holds, in their own memory where that is allowed.

Fresh memory is dear: the system clears every page of it first, which can cost more than the arithmetic. Compiled code
manages its own memory; autograd may still want the old values; and torch's function transforms do not let a batch be
written into a single tensor.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def _unknown() -> bool:
    return True


is_in_transform: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", _unknown)
"""Whether one of torch's function transforms is active. Where torch does not tell, all is done as if one were."""


def is_transformed() -> bool:
    """Whether a compiler or one of torch's function transforms runs what is written here, and not Python itself."""
    return torch.compiler.is_compiling() or is_in_transform()


def _may_overwrite() -> bool:
    return not (torch.is_grad_enabled() or is_in_transform() or torch.compiler.is_compiling())


STRIP = 2**20
"""Entries of a matrix that are worked on at a time: they stay, with what is made of them, in a core's own cache."""


def strips(*matrices: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Split matrices of as many rows into strips of a few; a GPU wants all at once, and who watches too."""
    if matrices[0].device.type != "cpu" or not _may_overwrite():
        return [matrices]
    rows = max(1, STRIP // max(matrix.size(1) for matrix in matrices))
    return zip(*(matrix.split(rows) for matrix in matrices), strict=True)


def times(scratch: Tensor, factor: Tensor) -> Tensor:
    """Return ``scratch * factor``; the memory of ``scratch`` is used up."""
    if not _may_overwrite():
        return scratch * factor
    dtype = scratch.dtype
    if factor.dtype != dtype and torch.promote_types(dtype, factor.dtype) != dtype:
        return scratch * factor
    return scratch.mul_(factor)


def plus(scratch: Tensor, term: Tensor, factor: float) -> Tensor:
    """Return ``scratch + factor·term``; the memory of ``scratch`` is used up."""
    return scratch.add_(term, alpha=factor) if _may_overwrite() else torch.add(scratch, term, alpha=factor)


def plus_product(scratch: Tensor, left: Tensor, right: Tensor, factor: float) -> Tensor:
    """Return ``scratch + factor·left @ right`` of matrices, rounded once; the memory of ``scratch`` is used up."""
    if _may_overwrite():
        return scratch.addmm_(left, right, alpha=factor)
    return torch.addmm(scratch, left, right, alpha=factor)


def plus_products(scratch: Tensor, left: Tensor, right: Tensor, factor: float) -> Tensor:
    """Do what `plus_product` does for a batch of matrices."""
    if _may_overwrite():
        return scratch.baddbmm_(left, right, alpha=factor)
    return torch.baddbmm(scratch, left, right, alpha=factor)


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """Return ``factor·tensor``; the memory of ``tensor`` is used up."""
    if factor == 1:
        return tensor
    return tensor.mul_(factor) if _may_overwrite() else tensor * factor


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a dtype: itself, without asking torch, where it is in it already."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)

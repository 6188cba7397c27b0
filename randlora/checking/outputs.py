"""The tensors in what a forward returns, how far those of two calls are apart, and inputs that a call may change."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Output = dict[str, Tensor]
"""The floating tensors in what a forward returned, by where they are in it."""

DEPTH = 8
"""How deep in an output tensors are looked for."""

ROUNDING = 64
LEAST_DIGITS = 0.04
"""An output is exact within this many roundings of its norm, and in half precision within this share of it."""


def tensors_in(output: object) -> Output:
    """Return the floating tensors in an output: a tensor, or containers, dataclasses and objects that hold some."""
    found: Output = {}
    seen: set[int] = set()
    for path, value in _walk(output, "", 0, seen):
        dense = _dense(value)
        if dense is not None and dense.numel():
            found[path] = dense
    return found


def distances(first: Output, second: Output) -> dict[str, float]:
    """Return the norm of the difference of the tensors that both outputs have, in the same shape.

    It is infinite where one of them is finite and the other is not; where neither is finite, they are equal.
    """
    return {
        path: _distance(value.detach(), second[path].detach())
        for path, value in first.items()
        if path in second and second[path].shape == value.shape
    }


def roundings(output: Output) -> dict[str, float]:
    """Return for each tensor the norm below which a difference may be nothing but rounding."""
    return {
        path: min(ROUNDING * torch.finfo(value.dtype).eps, LEAST_DIGITS) * _distance(value, torch.zeros_like(value))
        for path, value in output.items()
    }


def _distance(first: Tensor, second: Tensor) -> float:
    wide = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    are_finite = first.isfinite(), second.isfinite()
    if not torch.equal(*are_finite):
        return float("inf")
    difference = (first.to(wide) - second.to(wide)).where(are_finite[0], 0)
    return float(torch.linalg.vector_norm(difference))


def _walk(value: Any, path: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
        return
    if depth > DEPTH or id(value) in seen or isinstance(value, str | bytes | nn.Module | type):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        inside = value.items()
    elif isinstance(value, list | tuple):
        inside = dict(enumerate(value)).items()
    else:  # a dataclass, a cache, a distribution
        inside = getattr(value, "__dict__", {}).items()
    for key, held in inside:
        yield from _walk(held, f"{path}.{key}" if path else str(key), depth + 1, seen)


def _dense(value: Tensor) -> Tensor | None:
    """Return a tensor in one piece of real numbers, or ``None`` if it has no floating values."""
    if value.is_nested:
        value = torch.cat([part.flatten() for part in value.unbind()])
    if value.is_complex():
        value = torch.view_as_real(value)
    if not value.is_floating_point() or value.is_meta:
        return None
    if value.layout != torch.strided:
        value = value.to_dense()
    return value if value.dtype.itemsize > 1 else value.float()


def copied(value: Any, *, is_widened: bool) -> Any:
    """Return an argument for one call, which may change it: tensors as new leaves, other objects as copies.

    If ``is_widened``, tensors in half precision become float32.
    """
    if isinstance(value, Tensor):
        is_half = is_widened and value.dtype in (torch.float16, torch.bfloat16)
        own = value.detach().float() if is_half else value.detach().clone()
        return own.requires_grad_(value.requires_grad)
    if type(value) in (list, tuple):
        return type(value)(copied(held, is_widened=is_widened) for held in value)
    if type(value) is dict:
        return {key: copied(held, is_widened=is_widened) for key, held in value.items()}
    if isinstance(value, nn.Module):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # what cannot be copied is given as it is
        return value

"""The memory that a layer needs during a step, found by running its arithmetic on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from randlora.bases.basis import Basis
from randlora.functional import Diagonals, Pair, adapted_linear
from randlora.functional.cost import pass_over
from randlora.functional.region import take_spans
from randlora.layers.diagonals import diagonal_shapes
from randlora.memory.pieces import Piece
from randlora.modes import Observer

META = torch.device("meta")


class _Counting(Observer):
    """Counts the bytes of what operators allocate, and the most of them at once."""

    def __init__(self, *held: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, key, nbytes)

    def _free(self, key: int, nbytes: int) -> None:
        self._alive.discard(key)
        self.now -= nbytes


def peak_beside(piece: Piece, basis: Basis, dtype: torch.dtype, device_type: str) -> int:
    """Return how much more memory a step of an adapted layer takes at its height than one of the frozen layer.

    Args:
        piece: The update, or the part of it that a device computes.
        basis: Bases of its rank that cover the layer.
        dtype: The dtype that the layer is held and computed in.
        device_type: The type of the device, which the choice of how to compute depends on.
    """
    pair, (height, width) = pair_of(piece, basis, dtype), piece.extent
    for form in (pair, pair.written):
        if form is not None:  # the cached choice of a device that is not the one computed on
            vars(form)["shape"] = form.shape._replace(entry=pass_over(device_type, dtype).multiply_adds)
    shapes = diagonal_shapes(piece.shape, piece.r)
    lam, gamma = (torch.empty(each, dtype=torch.float32, device=META, requires_grad=True) for each in shapes)
    x = torch.empty((piece.tokens, width), dtype=dtype, device=META, requires_grad=True)
    weight = torch.empty((height, width), dtype=dtype, device=META)
    grad = torch.empty((piece.tokens, height), dtype=dtype, device=META)

    def adapted_step() -> None:
        if piece.region is None:
            output = adapted_linear(x, pair, Diagonals(lam, gamma, 1.5), weight=weight)
            torch.autograd.grad(output, [x, lam, gamma], grad)
            return
        columns = piece.region.sides(is_wide=piece.is_wide).small
        own = F.linear(x.detach(), weight)  # then the layer's product is torch's
        output = adapted_linear(x, pair, Diagonals(lam, take_spans(gamma, columns, 1), 1.5), is_wide=piece.is_wide)
        own = own + output
        del own
        grad_x, *_ = torch.autograd.grad(output, [x, lam, gamma], grad)
        grad_x += grad @ weight  # autograd adds in place, but not while operators are watched

    def frozen_step() -> None:
        torch.autograd.grad(F.linear(x, weight), [x], grad)

    held = (x, lam, gamma, weight, grad, *_tensors(pair))
    return _most(adapted_step, *held) - _most(frozen_step, *held)


def pair_of(piece: Piece, basis: Basis, dtype: torch.dtype) -> Pair:
    """Return the bases that a device computes a piece with, without values."""
    sides = None if piece.region is None else piece.region.sides(is_wide=piece.is_wide)
    return basis.pair(max(piece.shape), min(piece.shape), device=META, dtype=dtype, sides=sides)


def _tensors(pair: Pair) -> list[Tensor]:
    forms: list[Pair] = [pair] if pair.written is None else [pair, pair.written]
    return [tensor for form in forms for tensor in (form.A, form.B)]


def _most(step: Callable[[], None], *held: Tensor) -> int:
    counting = _Counting(*held)
    with counting:
        step()
    return counting.most

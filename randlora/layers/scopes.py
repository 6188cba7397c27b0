"""Where a weight that code reads has its updates: in a call of its module, or of a module around it.

Elsewhere the attribute is the parameter itself, as in `state_dict`, for whatever saves, moves, shards, resizes or
initializes a model. Compiled code only computes, so it reads the updates wherever it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from randlora.bases.basis import is_exporting
from randlora.places import loaded_modules

Weights = dict[tuple[int, str, bool], Tensor]
"""What a forward has read and keeps until it ends, by owner's id, attribute, and whether gradients were enabled."""


class Forward(NamedTuple):
    """A forward of a module that has weights that are read."""

    owner: nn.Module
    read: Weights


_here = threading.local()
"""``calls``: the number of running calls of modules around such weights. ``forward``: the innermost `Forward`."""


def begin_call(module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG001  # a hook's signature
    """Begin a call of a module around weights that are read. The compiler traces this, for what it does not compile."""
    if not is_exporting():
        _here.calls = getattr(_here, "calls", 0) + 1


def end_call(module: nn.Module, args: tuple[Any, ...], output: object) -> None:  # noqa: ARG001
    """End such a call, also one that has raised, perhaps before it was begun.

    An interrupt runs no hooks. The thread then reads updates outside of calls, too.
    """
    if not is_exporting():
        _here.calls = max(getattr(_here, "calls", 0) - 1, 0)


@contextmanager
def in_call() -> Iterator[None]:
    """Have the block count as such a call."""
    before = getattr(_here, "calls", 0)
    _here.calls = before + 1
    try:
        yield
    finally:
        _here.calls = before


def is_in_call() -> bool:
    """Whether this thread is in a call of an adapted model, or of a module around weights that are read."""
    return getattr(_here, "calls", 0) > 0


def has_updates(owner: nn.Module) -> bool:
    """Whether reading a weight of a module includes its updates.

    Where accelerate loads a weight for each call of a module, it has them in the forward alone: loading is in the call.
    """
    if torch.compiler.is_compiling():
        return True
    if is_in_call() and not loaded_modules([owner]):
        return True
    forward: Forward | None = getattr(_here, "forward", None)
    return forward is not None and any(each is owner for each in (forward.owner, *forward.owner._modules.values()))


@contextmanager
def forward_of(owner: nn.Module) -> Iterator[Weights]:
    """Have weights of a module, and of those in it, read with updates in the block; yield what it has read so far."""
    outer = getattr(_here, "forward", None)
    _here.forward = forward = Forward(owner, {})
    try:
        yield forward.read
    finally:
        _here.forward = outer


def run_forward(owner: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Return what a forward of a module returns, which reads its weights."""
    if torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    with forward_of(owner):
        return forward(*args, **kwargs)


def read_so_far() -> Weights | None:
    """Return what the innermost forward has read, if one runs."""
    forward: Forward | None = getattr(_here, "forward", None)
    return None if forward is None else forward.read

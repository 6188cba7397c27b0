"""Blocks in which the active adapters of a model do not act, such as `randlora.disabled`, or compiled code does not."""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from randlora.errors import AdapterError

BLOCKS: ContextVar[tuple[object, ...]] = ContextVar("BLOCKS", default=())  # those that this thread or task is in


class ForwardCall(NamedTuple):
    """A call of the forward of an adapted module, its owner."""

    owner: nn.Module
    call: Callable[..., Any]  # the forward without adapters, except that weights that it reads may include them
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BatchRows(NamedTuple):
    """The arguments of a forward, some of which have the rows of the batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    axes: dict[int | str, tuple[int, int]]  # by position or keyword, the dimension of the rows, and entries for each
    size: int  # the number of rows
    device: torch.device
    output_axes: tuple[int, int] = (0, 0)  # the dimension that has the rows of the first output, and of all others
    is_declared: bool = False  # by the module; else, every tensor as long as the first one is taken

    @property
    def given(self) -> dict[int | str, Tensor]:
        """The arguments that have the rows, by position or keyword; the first is the input."""
        values: dict[int | str, Any] = dict([*enumerate(self.args), *self.kwargs.items()])
        return {key: values[key] for key in self.axes}

    @classmethod
    def first(cls, args: tuple[Any, ...], kwargs: dict[str, Any], module: str) -> BatchRows:
        """Find the rows, assuming them in the first dimension of the input and of every equally long tensor."""
        given: dict[int | str, Any] = dict([*enumerate(args), *kwargs.items()])
        tensors = {key: value for key, value in given.items() if isinstance(value, Tensor) and value.dim()}
        if not tensors:
            raise AdapterError(f"routed needs a tensor with a batch, but an adapted {module} was given none")
        x = next(iter(tensors.values()))
        axes = {key: (0, 1) for key, value in tensors.items() if value.shape[0] == x.shape[0]}
        return cls(args, kwargs, axes, x.shape[0], x.device)


class Run(ABC):
    """Something that adapted layers do in a block instead of adding the updates of the active adapters."""

    words: ClassVar[str]  # the function that opens such a block, for messages
    adapters: tuple[str, ...]  # the names of those that act in it

    @property
    @abstractmethod
    def takes_over(self) -> bool:
        """Whether forwards of layers go through `product`, `rows` and `reading`; else, the adapters of `acting` act."""

    @abstractmethod
    def concerns(self, layer: Any) -> bool:
        """Whether any adapter that acts in the block adapts the weight of an adapter layer."""

    @abstractmethod
    def acting(self, layer: Any) -> list[tuple[Any, float]]:
        """Return what `AdapterLayer.active` does."""

    @abstractmethod
    def product(self, layer: Any, forward: ForwardCall) -> Tensor:
        """Return the output of a module whose forward is the product with the weight of a layer."""

    @abstractmethod
    def rows(self, layer: Any, forward: ForwardCall) -> Tensor:
        """Return the output of a module whose forward looks up rows of the weight of a layer."""

    @abstractmethod
    def reading(self, layer: Any, forward: ForwardCall) -> Any:
        """Return the output of a forward that reads the weight of a layer, with the adapters of the block."""


class _Open:
    """The blocks that are open, of all models and threads, since torch has one stance for all."""

    lock = threading.Lock()
    count = 0
    stance: Any = None


@contextmanager
def uncompiled() -> Iterator[None]:
    """Have torch run compiled functions uncompiled in the block, if its compiler is in use."""
    with _Open.lock:
        _Open.count += 1
        if _Open.stance is None and "torch._dynamo" in sys.modules:
            _Open.stance = torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        with _Open.lock:
            _Open.count -= 1
            if not _Open.count and _Open.stance is not None:
                _Open.stance.__exit__(None, None, None)
                _Open.stance = None

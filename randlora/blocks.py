"""Blocks in which the active adapters of a model do not act, such as `randlora.disabled`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

BLOCKS: ContextVar[tuple[object, ...]] = ContextVar("BLOCKS", default=())
"""The blocks of this library that this thread, or this task of asyncio, is in."""


class ForwardCall(NamedTuple):
    """A call of the forward of an adapted module.

    Attributes:
        owner: The module.
        call: Its forward without adapters, except that it reads weights, which may include them.
        args: The arguments.
        kwargs: The keyword arguments.
    """

    owner: nn.Module
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Run(ABC):
    """What adapted layers do in a block instead of adding the updates of the active adapters.

    Attributes:
        words: What opens such a block, for messages.
        adapters: The names of the adapters that act in it.
    """

    words: ClassVar[str]
    adapters: tuple[str, ...]

    @property
    @abstractmethod
    def takes_over(self) -> bool:
        """Whether forwards of layers go through `product`, `rows` and `reading`. Else the adapters of `acting` act."""

    @abstractmethod
    def concerns(self, layer: Any) -> bool:
        """Return whether any adapter that acts in the block adapts the weight of an adapter layer."""

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
        """Return the output of a forward that reads the weight of a layer, with whatever it adapts in it."""


def open_elsewhere(blocks: Sequence[object]) -> bool:
    """Return whether a `Run` is among these blocks that another thread, or another task of asyncio, is in."""
    here = BLOCKS.get()
    return any(isinstance(block, Run) and not any(block is own for own in here) for block in blocks)

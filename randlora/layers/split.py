"""How layers compute with a weight that is split over processes. Features that split weights register a `Splitter`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from randlora.functional import Compute
from randlora.layers.stored import StoredWeight
from randlora.layers.update import Update


class Split(ABC):
    """A weight of which this process has a part, with the tensors that its layer computes with."""

    @abstractmethod
    def product(self, update: Update, x: Tensor, compute: Compute) -> Tensor:
        """Return the product of an input, ``(..., in_features)``, with an update, split as the layer's output."""

    @abstractmethod
    def rows(self, updates: Sequence[Update], ids: Tensor, padding_idx: int | None) -> Tensor:
        """Return rows of a table with updates, split as the layer's lookup. The padding row gets no gradient."""

    @abstractmethod
    def value(self, updates: Sequence[Update]) -> Tensor:
        """Return the weight with updates, split as it is."""


class Piece(Protocol):
    """The part of a weight on this process, while the layer computes with this part as with a plain tensor."""

    def part(self, update: Update) -> Update:
        """Return the part of an update for this process, with Λ and Γ whose gradients are summed over processes."""


class Splitter:
    """A way of splitting weights over processes. Register a subclass with `register_splitter`."""

    def split(self, layer: type[StoredWeight], weight: Tensor) -> Split | None:  # noqa: ARG002
        """Return how to compute with a split weight of a kind of layer, or ``None``; see `split_of`."""
        return None

    def obstacle(self, owner: nn.Module, weight: Tensor, *, is_quantized: bool) -> str | None:  # noqa: ARG002
        """Return why a split weight cannot be adapted, as a phrase after its name, or ``None``."""
        return None

    def adopt(self, owner: nn.Module, layer: Any, held_as: str) -> bool:  # noqa: ARG002
        """Have an adapter layer computed within a forward that was set on its owner, if this splitter set it."""
        return False


SPLITTERS: list[Splitter] = []


def register_splitter(kind: type[Splitter]) -> type[Splitter]:
    """Add a splitter; a decorator of its class."""
    SPLITTERS.append(kind())
    return kind


def split_of(layer: type[StoredWeight], weight: Tensor) -> Split | None:
    """Return how to compute with a weight that is split over processes, or ``None`` if it is not split."""
    for each in SPLITTERS:  # torch 2.6 does not compile next() with a default
        if (found := each.split(layer, weight)) is not None:
            return found
    return None


def split_obstacle(owner: nn.Module, weight: Tensor, *, is_quantized: bool) -> str | None:
    """Return why a weight that is split over processes cannot be adapted, as a phrase after its name, or ``None``."""
    reasons = (each.obstacle(owner, weight, is_quantized=is_quantized) for each in SPLITTERS)
    return next((reason for reason in reasons if reason is not None), None)


def adopted(owner: nn.Module, layer: Any, held_as: str) -> bool:
    """Whether an adapter layer is now computed within a forward that a splitter of its weight set on its owner."""
    return any(each.adopt(owner, layer, held_as) for each in SPLITTERS)

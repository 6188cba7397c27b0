"""The place of a parameter: where its values are, how they are read and written, and how they are restored.

The values of most parameters are in the parameter itself, which is `Plain`. A feature that keeps those of others
elsewhere, such as the shards of several processes, registers a `Strategy` that finds its places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

from randlora.functional.region import Spans

Part = tuple[Spans, ...]
"""The part of a parameter that a process holds: which entries of each dimension."""


class Place(Protocol):
    """Where the values of one parameter of a module are."""

    @property
    def part(self) -> Part | None:
        """What of the parameter this process holds; ``None`` for all."""

    def read(self) -> Tensor:
        """Return the values of that part, a plain tensor. This may be a collective."""

    def write(self, value: Tensor) -> None:
        """Set the values of that part. This may be a collective."""

    def keep(self) -> Kept:
        """Return what `restore` needs to restore the present values, bit for bit."""

    def restore(self, values: Any) -> None:
        """Restore the ``values`` of what `keep` returned."""

    def stored(self, values: Any) -> Tensor | None:
        """Return kept values in the form in which a state dict has the parameter; ``None`` if it has none."""


class Kept(NamedTuple):
    """The values of a parameter from before it was merged into.

    Attributes:
        values: The values, as `restore` of their place takes them.
        place: Their place, if values are written there in place; ``None`` if the parameter was exchanged for another.
    """

    values: Any
    place: Place | None = None

    def put_back(self, now: Place) -> None:
        """Restore the values in the place that the parameter has now, which may be of another kind than it was."""
        if self.place is None and not isinstance(now, Plain):  # it has been offloaded since
            now.write(self.values)
        else:
            (self.place if self.place is not None and isinstance(now, Plain) else now).restore(self.values)

    def stored(self, now: Place) -> Tensor | None:
        """Return the values in the form in which a state dict has the parameter; ``None`` if it has none."""
        if self.place is None:
            values: Tensor = self.values
            return values
        return (self.place if isinstance(now, Plain) else now).stored(self.values)


class Plain:
    """The place of an ordinary parameter, whose data are all its values.

    To write is to put another parameter in its place: a program that was exported or traced from the model may hold
    this one, which must not change.
    """

    part = None

    def __init__(self, owner: nn.Module, attribute: str) -> None:
        """Take a module and the name of its parameter."""
        self._owner, self._attribute = owner, attribute

    def read(self) -> Tensor:
        """Return the parameter."""
        return self._own

    def write(self, value: Tensor) -> None:
        """Put a parameter with these values in the place of the present one.

        It does not require grad even if the present one does: what it would be trained to is dropped by `restore`.
        """
        held = nn.Parameter(value, requires_grad=False)
        held.__dict__.update(vars(self._own))  # what libraries set on parameters
        self._owner._parameters[self._attribute] = held

    def keep(self) -> Kept:
        """Return the parameter."""
        return Kept(self._own)

    def restore(self, values: nn.Parameter) -> None:
        """Put a parameter back, on the device and in the dtype of the present one."""
        own = self._own
        if values.device != own.device or values.dtype != own.dtype:
            values.data = values.data.to(device=own.device, dtype=own.dtype)
        self._owner._parameters[self._attribute] = values

    def stored(self, values: Tensor) -> Tensor:
        """Return the values."""
        return values

    @property
    def _own(self) -> nn.Parameter:
        own = self._owner._parameters[self._attribute]
        assert own is not None, "it has a place"
        return own


Strategy = Callable[[nn.Module, str], Place | None]
"""Returns the place of a module's parameter of some name if the strategy keeps its values, else ``None``."""

Found = TypeVar("Found", bound=Strategy)

STRATEGIES: list[Strategy] = []
"""What finds places that are not plain, in the order in which they are asked."""


def register_places(strategy: Found) -> Found:
    """Add a strategy that finds places, to be used as a decorator."""
    STRATEGIES.append(strategy)
    return strategy


def place_of(owner: nn.Module, attribute: str) -> Place:
    """Return the place of a module's parameter."""
    for strategy in STRATEGIES:
        if (found := strategy(owner, attribute)) is not None:
            return found
    return Plain(owner, attribute)

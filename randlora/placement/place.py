"""The place of a parameter's values, and all values of one, whatever shards it."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from randlora.placement import zero3
from randlora.placement.dtensor import Part, Shard, gathered, is_dtensor
from randlora.placement.offloaded import HOOK, offloaded


class Place(Protocol):
    """Where the values of a parameter are if its own data are not simply all of them.

    Values are written there in place, because what shards or offloads a parameter would not see another in its place.
    """

    @property
    def part(self) -> Part | None:
        """What of the parameter this process holds, which entries of each dimension; ``None`` for all."""

    def read(self) -> Tensor:
        """Return the values of that part, a plain tensor. This may be a collective."""

    def keep(self) -> Any:
        """Return what `restore` needs to restore the present values, bit for bit."""

    def write(self, value: Tensor) -> None:
        """Set the values of that part. This may be a collective."""

    def restore(self, kept: Any) -> None:
        """Restore the values that `keep` returned."""

    def stored(self, kept: Any) -> Tensor | None:
        """Return kept values in the form in which a state dict has the parameter; ``None`` if it has none."""


class Kept(NamedTuple):
    """The values of a parameter from before it was merged into, as `keep` of its place returned them.

    The place is the one to restore them in if the parameter has become an ordinary one since.
    """

    place: Place
    values: Any


def place_of(owner: nn.Module, attribute: str) -> Place | None:
    """Return the place of a module's parameter, or ``None`` for an ordinary one, whose data are all its values."""
    parameter = owner._parameters.get(attribute)
    if is_dtensor(parameter):
        return Shard(parameter)
    if zero3.is_managed(parameter) and zero3.is_writable(parameter):
        return zero3.Spread(parameter)
    return offloaded(owner, attribute) if HOOK in owner.__dict__ else None


def whole(parameter: Tensor) -> Tensor:
    """Return all values of a parameter, itself if it is not sharded; else a collective."""
    if is_dtensor(parameter):
        return gathered(parameter)
    if zero3.is_spread(parameter):
        return zero3.gathered(parameter)
    return parameter


def taken_whole(parameter: Tensor, *, is_kept: bool) -> Tensor | None:
    """Return a copy of all values of a parameter in the CPU's memory, or ``None`` if this process keeps none.

    A collective if the parameter is sharded. Nothing of it stays on the parameter's device.
    """
    values = whole(parameter)
    return values.detach().to("cpu", copy=True) if is_kept else None

"""All values of a parameter, whatever shards it."""

from __future__ import annotations

from torch import Tensor

from randlora.placement import zero3
from randlora.placement.dtensor import gathered, is_dtensor


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

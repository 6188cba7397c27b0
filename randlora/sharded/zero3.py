"""Parameters that DeepSpeed's ZeRO-3 spreads over processes.

Such a parameter is an ordinary one whose data are empty except while a forward or backward needs them. Small parameters
(``stage3_param_persistence_threshold``) stay whole. Each process has an equal piece of the flattened values in
``ds_tensor``. Nothing here imports DeepSpeed, because a program with such parameters already has.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from randlora.places import Exchanges, Keeper, Kept, Place, register_keeper
from randlora.ranks import Ranks


def is_managed(value: object) -> bool:
    """Whether a value is a parameter of ZeRO-3."""
    return hasattr(value, "ds_id") and hasattr(value, "ds_tensor")


def is_spread(value: Any) -> bool:
    """Whether a value is a parameter of ZeRO-3 whose data are not here, so that reading it is a collective."""
    return is_managed(value) and str(getattr(value.ds_status, "name", value.ds_status)) != "AVAILABLE"


def is_in_engine(module: nn.Module) -> bool:
    """Whether an engine of DeepSpeed runs a module and expects the parameter objects that it started with.

    The engine marks modules only for ZeRO-3.
    """
    return hasattr(module, "ds_id")


def gathered(parameter: Any) -> Tensor:
    """Return all values of a parameter of ZeRO-3; a collective if they are not here."""
    if not is_spread(parameter):
        here: Tensor = parameter.detach()
        return here
    with sys.modules["deepspeed"].zero.GatheredParameters([parameter]):
        values: Tensor = parameter.detach().clone()
    return values


def manage(parameter: nn.Parameter, like: Any) -> None:
    """Let ZeRO-3 manage a parameter like the one that it replaces, so that the engine's hooks find it.

    A collective. Afterwards every process has its piece of the values.
    """
    holder = nn.ParameterList([parameter])
    sys.modules["deepspeed"].zero.Init(
        module=holder,
        data_parallel_group=like.ds_process_group,
        dtype=parameter.dtype,
        mem_efficient_linear=False,  # which would replace F.linear for the whole program
    )


class _Pieces(NamedTuple):
    """The values of a parameter: this process's piece, and all of them if they were here."""

    own: Tensor
    all: Tensor | None


class Spread(Place):
    """The place of a parameter of ZeRO-3: all values, gathered when they are read.

    It has no `part`, because the pieces belong to its flattened values, not to a range in each dimension.
    """

    is_lasting = False  # the engine's optimizer has copies

    def __init__(self, parameter: Any, exchanges: Exchanges = "parameters") -> None:
        """Take a parameter that ZeRO-3 manages."""
        self._parameter, self.exchanges = parameter, exchanges

    @property
    def is_complete(self) -> bool:
        """Whether all values are in ``ds_tensor``.

        They are not if they are offloaded to NVMe, quantized, or have a second copy (``zero_hpz_partition_size``).
        """
        parameter = self._parameter
        own, count = parameter.ds_tensor, dist.get_world_size(parameter.ds_process_group)
        has_all = own.dtype == parameter.dtype and own.numel() * count >= parameter.ds_numel
        return has_all and getattr(parameter, "ds_secondary_tensor", None) is None

    def read(self) -> Tensor:
        """Return all values; a collective if they are not here."""
        return gathered(self._parameter)

    def whole(self) -> Tensor:
        """Return all values, without gradients; a collective if they are not here."""
        return gathered(self._parameter) if is_spread(self._parameter) else self._parameter

    def keep(self) -> Kept:
        """Return copies of the values on this process."""
        here = None if is_spread(self._parameter) else self._parameter.detach().clone()
        return Kept(_Pieces(self._parameter.ds_tensor.detach().clone(), here), self)

    @torch.no_grad()
    def write(self, value: Tensor) -> None:
        """Change this process's piece, and the data if they are here, in place."""
        own = self._parameter.ds_tensor.data.flatten()
        start = dist.get_rank(self._parameter.ds_process_group) * own.numel()
        piece = value.detach().flatten()[start : start + own.numel()]
        own[: piece.numel()].copy_(piece)
        if not is_spread(self._parameter):
            self._parameter.data.copy_(value)

    @torch.no_grad()
    def restore(self, values: _Pieces) -> None:
        """Restore kept values."""
        self._parameter.ds_tensor.data.copy_(values.own)
        if is_spread(self._parameter):
            return
        if values.all is None:  # they have been gathered since then, and will be again when they are needed
            self._parameter.partition(param_list=[self._parameter], has_been_updated=False)
        else:
            self._parameter.data.copy_(values.all)

    def follow(self, parameter: nn.Parameter) -> None:
        """Have ZeRO-3 manage a parameter that it does not manage yet; a collective."""
        if not is_managed(parameter):
            manage(parameter, self._parameter)

    def stored(self, values: _Pieces) -> Tensor | None:
        """Return all kept values, or ``None`` if only a piece was on this process."""
        return values.all


@register_keeper
class Zero3(Keeper):
    """Keeps parameters in equal pieces of their flattened values."""

    def place_at(self, tensor: Tensor) -> Spread | None:
        """Return the place of a parameter that ZeRO-3 manages."""
        return Spread(tensor) if is_managed(tensor) else None

    def place_of(self, owner: nn.Module, attribute: str) -> Spread | None:
        """Return the place of a module's parameter that an engine running the module expects to stay."""
        parameter = owner._parameters.get(attribute)
        return Spread(parameter, "nothing" if is_in_engine(owner) else "parameters") if is_managed(parameter) else None

    def ranks_of(self, parameters: Iterable[Tensor], *, is_written: bool) -> Ranks | None:
        """Return the processes over which parameters are spread."""
        spread: Any = next(filter(is_managed if is_written else is_spread, parameters), None)
        if spread is None:
            return None
        group = spread.ds_process_group
        return Ranks((group,), dist.get_rank(group) == 0)

"""Parameters that torch shards over processes, as `fully_shard` (FSDP2) and tensor parallelism do.

Such a parameter is a `DTensor`, which holds a part of the values, its shard. `fully_shard` keeps references to its
parameters and would ignore a replacement, so values are written into the shard. Nothing here imports
`torch.distributed.tensor` unless a program has already imported it, because this takes long.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import chain
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from randlora.errors import AdapterError
from randlora.functional.region import Spans, all_of, entries_of, fewest_spans
from randlora.places import Keeper, Part, Place, register_keeper
from randlora.ranks import Ranks


def is_dtensor(value: object) -> TypeGuard[Any]:
    """Whether a value is a `DTensor`."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def fsdp_modules(modules: Iterable[nn.Module]) -> list[Any]:
    """Return the given modules that `fully_shard` was called on."""
    module = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(module, "FSDPModule", None)
    return [] if kind is None else [each for each in modules if isinstance(each, kind)]


def all_fsdp_modules(model: nn.Module) -> list[Any]:
    """Return all modules of the program that `fully_shard` was called on.

    Raises:
        AdapterError: If this version of torch does not tell, and a part of the model is sharded.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    # private, but nothing else tells of a module around a model; it is loaded with FSDP2
    module = sys.modules.get("torch.distributed._composable_state")
    states = getattr(module, "_module_state_mapping", None)
    if states is None and (fsdp_modules(model.modules()) or any(map(is_dtensor, model.parameters()))):
        raise AdapterError(
            f"this model is sharded, and torch {torch.__version__} does not tell which modules fully_shard was called "
            "on (torch.distributed._composable_state._module_state_mapping), so its processes could come to differ: "
            "use a different version of torch, or report this to randlora"
        )
    return fsdp_modules([*(states or ())])


def reshard(model: nn.Module) -> None:
    """Have a model hold its shards, including those made by `fully_shard` on a module around it.

    After a forward without a backward, the outermost module still has whole copies of its parameters, which the next
    forward discards: values read from them may be stale, and values written to them are lost.
    """
    if not isinstance(model, nn.Module) or not (sharded := all_fsdp_modules(model)):  # the caller refuses others
        return
    within = {id(module) for module in model.modules()}
    for module in sharded:
        if id(module) in within or any(each is model for each in module.modules()):
            module.reshard()


class Shard(Place):
    """The place of a sharded parameter: this process's shard, read and written without communication."""

    exchanges = "values"

    def __init__(self, parameter: Any) -> None:
        """Take a parameter that is a `DTensor`."""
        self._parameter = parameter

    @property
    def part(self) -> Part:
        """The part of the parameter on this process, which may be empty."""
        own, mesh = self._parameter, self._parameter.device_mesh
        if (coordinate := mesh.get_coordinate()) is None:  # a process that is not of the mesh
            return tuple(all_of(0) for _ in own.shape)
        return part_at(own.shape, own.placements, mesh.shape, coordinate)

    @property
    def is_complete(self) -> bool:
        """Whether the shards have values."""
        return not self._parameter.is_meta

    def read(self) -> Tensor:
        """Return the values of the shard, which share its memory."""
        local: Tensor = self._parameter.detach().to_local()
        return local

    def whole(self) -> Tensor:
        """Return all values; a collective, through which gradients flow."""
        return gathered(self._parameter)

    @torch.no_grad()
    def write(self, value: Tensor) -> None:
        """Change the values of the shard, in place."""
        self.read().copy_(value)

    def stored(self, values: Tensor) -> Tensor:
        """Return kept values in the form in which a state dict has the parameter."""
        value: Tensor = _like(self._parameter, values)
        return value


def is_split(placement: Any) -> bool:
    """Whether a placement splits a dimension. Unlike ``is_shard()``, this includes `_StridedShard`."""
    return not placement.is_replicate() and not placement.is_partial()


def part_at(shape: Iterable[int], placements: Iterable[Any], mesh: Iterable[int], coordinate: Iterable[int]) -> Part:
    """Return the part of a parameter at a coordinate of a mesh.

    torch's own functions use tensors of indices, which are data that the compiler cannot branch on. `_StridedShard`
    first splits a dimension into several parts, and then each part over the processes.
    """
    part = [all_of(size) for size in shape]
    for placement, processes, index in zip(placements, mesh, coordinate, strict=True):
        if is_split(placement):
            spans, pieces = part[placement.dim], getattr(placement, "split_factor", 1)
            own = (_chunk(_chunk(spans, pieces, piece), processes, index) for piece in range(pieces))
            part[placement.dim] = fewest_spans(chain.from_iterable(own))
    return tuple(part)


def _chunk(spans: Spans, chunks: int, index: int) -> Spans:
    """Return one of the chunks that `torch.chunk` would cut these entries of a dimension into."""
    size = -(entries_of(spans) // -chunks)
    found, before = [], 0
    for first, last in spans:
        start, stop = (min(max(first, first + at * size - before), last) for at in (index, index + 1))
        found.append((start, stop))
        before += last - first
    return fewest_spans(found)


def _like(parameter: Any, local: Tensor) -> Any:
    """Return a `DTensor` that is sharded as a parameter, given its shard."""
    return type(parameter).from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def gathered(parameter: Any) -> Tensor:
    """Return all values of a sharded parameter; a collective, through which gradients flow."""
    device, mesh = parameter.device, parameter.device_mesh
    if device.type == mesh.device_type:
        whole: Tensor = parameter.full_tensor()
        return whole
    # offloaded to the CPU by CPUOffloadPolicy, where NCCL does not communicate
    local: Tensor = parameter.detach().to_local().to(mesh.device_type)
    offloaded: Tensor = _like(parameter, local).full_tensor().to(device)
    return offloaded


def meshes(parameters: Iterable[object]) -> list[Any]:
    """Return the device meshes that some parameters are sharded over, the largest first."""
    sharded = [each for each in parameters if is_dtensor(each)]
    found = {
        id(each.device_mesh): each.device_mesh
        for each in sharded
        if not all(placement.is_replicate() for placement in each.placements)
    }
    return sorted(found.values(), key=lambda mesh: -int(mesh.size()))


@register_keeper
class Mesh(Keeper):
    """Keeps parameters in shards over the processes of a device mesh."""

    def place_at(self, tensor: Tensor) -> Shard | None:
        """Return the place of a `DTensor`."""
        return Shard(tensor) if is_dtensor(tensor) else None

    def ranks_of(self, parameters: Iterable[Tensor], *, is_written: bool) -> Ranks | None:  # noqa: ARG002  # both alike
        """Return the processes of the largest mesh over which the parameters are sharded."""
        if not (found := meshes(parameters)):
            return None
        largest, *others = found
        held = set(largest.mesh.flatten().tolist())
        for mesh in others:
            if missing := sorted(set(mesh.mesh.flatten().tolist()) - held):
                raise AdapterError(
                    f"some parameters are sharded over {largest} and others over {mesh}, whose processes {missing} are "
                    "not in the first, so not all could take part in one call: shard the model over parts of one "
                    "mesh, or adapt its parts as separate models"
                )
        return Ranks(tuple(largest.get_all_groups()), not any(largest.get_coordinate() or ()))

    def own_class(self, kind: type[nn.Module]) -> type[nn.Module]:
        """Return the class that `fully_shard` was called on, of which it makes a subclass called ``FSDP…``."""
        module = sys.modules.get("torch.distributed.fsdp")
        sharded = getattr(module, "FSDPModule", None)
        return kind.__bases__[1] if sharded is not None and kind.__bases__[:1] == (sharded,) else kind

    def settle(self, model: nn.Module) -> None:
        """Have a model hold its shards; see `reshard`."""
        reshard(model)

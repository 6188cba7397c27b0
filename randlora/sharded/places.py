"""Where the values of parameters are that `fully_shard`, tensor parallelism, ZeRO-3 or the first FSDP spread.

Nothing here imports DeepSpeed or `torch.distributed.tensor`, because a program with such parameters already has.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from randlora.errors import AdapterError
from randlora.functional.region import Span, Spans, all_of, entries_of
from randlora.places import Exchanges, Keeper, Kept, Part, Place
from randlora.ranks import Ranks


def is_dtensor(value: object) -> TypeGuard[Any]:
    """Whether a value is a `DTensor`."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def fsdp_modules(modules: Iterable[nn.Module]) -> list[Any]:
    """Return the given modules that `fully_shard` was called on."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return [each for each in modules if isinstance(each, kind)]


def all_fsdp_modules(model: nn.Module) -> list[Any]:
    """Return all modules of the program that `fully_shard` was called on. Raises an error if torch does not tell."""
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


class Sharded(Place):
    """The place of a `DTensor`: this process's shard, written in place, as `fully_shard` would ignore a new one."""

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
        return self._parameter.detach().to_local()  # type: ignore[no-any-return]

    def whole(self) -> Tensor:
        """Return all values; a collective, through which gradients flow."""
        own, mesh_device = self._parameter, self._parameter.device_mesh.device_type
        if own.device.type == mesh_device:
            return own.full_tensor()  # type: ignore[no-any-return]
        # offloaded to the CPU by CPUOffloadPolicy, where NCCL does not communicate
        return sharded_like(own, self.read().to(mesh_device)).full_tensor().to(own.device)  # type: ignore[no-any-return]

    @torch.no_grad()
    def write(self, value: Tensor) -> None:
        """Change the values of the shard, in place."""
        self.read().copy_(value)

    def stored(self, values: Tensor) -> Tensor:
        """Return kept values in the form in which a state dict has the parameter."""
        return sharded_like(self._parameter, values)  # type: ignore[no-any-return]


def is_split(placement: Any) -> bool:
    """Whether a placement splits a dimension. Unlike ``is_shard()``, this includes `_StridedShard`."""
    return not placement.is_replicate() and not placement.is_partial()


def part_at(shape: Iterable[int], placements: Iterable[Any], mesh: Iterable[int], coordinate: Iterable[int]) -> Part:
    """Return the part of a parameter at a coordinate of a mesh, by integers, which the compiler can branch on.

    `_StridedShard` first splits a dimension into several parts, and then each part over the processes.
    """
    part = [all_of(size) for size in shape]
    for placement, processes, index in zip(placements, mesh, coordinate, strict=True):
        if is_split(placement):
            spans, pieces = part[placement.dim], getattr(placement, "split_factor", 1)
            own = (_chunk(_chunk(spans, pieces, piece), processes, index) for piece in range(pieces))
            part[placement.dim] = fewest_spans(chain.from_iterable(own))
    return tuple(part)


def fewest_spans(spans: Iterable[Span]) -> Spans:
    """Return the same entries in as few spans as possible."""
    found: list[Span] = []
    for start, stop in spans:
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], stop
        elif start < stop:
            found.append((start, stop))
    return tuple(found) or all_of(0)


def _chunk(spans: Spans, chunks: int, index: int) -> Spans:
    """Return one of the chunks that `torch.chunk` would cut these entries of a dimension into."""
    size = -(entries_of(spans) // -chunks)
    found, before = [], 0
    for first, last in spans:
        start, stop = (min(max(first, first + at * size - before), last) for at in (index, index + 1))
        found.append((start, stop))
        before += last - first
    return fewest_spans(found)


def sharded_like(parameter: Any, local: Tensor) -> Any:
    """Return a `DTensor` that is sharded as a parameter, given its shard."""
    whole = {"shape": parameter.shape, "stride": parameter.stride()}
    return type(parameter).from_local(local, parameter.device_mesh, parameter.placements, run_check=False, **whole)


class Mesh(Keeper):
    """Keeps parameters in shards over the processes of a device mesh."""

    def place_at(self, tensor: Tensor) -> Sharded | None:
        """Return the place of a `DTensor`."""
        return Sharded(tensor) if is_dtensor(tensor) else None

    def ranks_of(self, parameters: Iterable[Tensor], *, is_written: bool) -> Ranks | None:  # noqa: ARG002  # both alike
        """Return the processes of the largest mesh over which the parameters are sharded."""
        found = {
            id(each.device_mesh): each.device_mesh
            for each in filter(is_dtensor, parameters)
            if not all(placement.is_replicate() for placement in each.placements)
        }
        if not found:
            return None
        largest, *others = sorted(found.values(), key=lambda mesh: -int(mesh.size()))
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
        sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
        return kind.__bases__[1] if sharded is not None and kind.__bases__[:1] == (sharded,) else kind

    def settle(self, model: nn.Module) -> None:
        """Have a model hold its shards, not the whole copies that are there after a forward without a backward.

        The next forward discards them: values read from them may be stale, and values written to them are lost.
        """
        if not (sharded := all_fsdp_modules(model)):
            return
        within = {id(module) for module in model.modules()}
        for module in sharded:
            if id(module) in within or any(each is model for each in module.modules()):
                module.reshard()


def is_managed(value: object) -> bool:
    """Whether a value is a parameter of ZeRO-3."""
    return hasattr(value, "ds_id") and hasattr(value, "ds_tensor")


def is_spread(value: Any) -> bool:
    """Whether a value is a parameter of ZeRO-3 whose data are not here, so that reading it is a collective."""
    return is_managed(value) and str(getattr(value.ds_status, "name", value.ds_status)) != "AVAILABLE"


def gathered(parameter: Any) -> Tensor:
    """Return all values of a parameter of ZeRO-3; a collective if they are not here."""
    if not is_spread(parameter):
        return parameter.detach()  # type: ignore[no-any-return]
    with sys.modules["deepspeed"].zero.GatheredParameters([parameter]):
        return parameter.detach().clone()  # type: ignore[no-any-return]


class _Pieces(NamedTuple):  # of a parameter: this process's, and all values if they were here
    own: Tensor
    all: Tensor | None


class Spread(Place):
    """The place of a parameter of ZeRO-3, whose data are empty except while it is used: values are gathered when read.

    Each process has an equal piece of the flattened values in ``ds_tensor``, so there is no `part`.
    """

    is_lasting = False  # the engine's optimizer has copies
    is_gathered_by_use = True

    def __init__(self, parameter: Any, exchanges: Exchanges = "parameters") -> None:
        """Take a parameter that ZeRO-3 manages."""
        self._parameter, self.exchanges = parameter, exchanges

    @property
    def is_complete(self) -> bool:
        """Whether all values are in ``ds_tensor``: not offloaded to NVMe, quantized, or with a second copy (hpZ)."""
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
        """Have ZeRO-3 manage a new parameter, so that the engine's hooks find it; a collective."""
        if not is_managed(parameter):  # without a dtype, of which it would refuse float64 on a GPU
            sys.modules["deepspeed"].zero.Init(
                module=nn.ParameterList([parameter]),
                data_parallel_group=self._parameter.ds_process_group,
                mem_efficient_linear=False,  # which would replace F.linear for the whole program
            )

    def stored(self, values: _Pieces) -> Tensor | None:
        """Return all kept values, or ``None`` if only a piece was on this process."""
        return values.all


class Zero3(Keeper):
    """Keeps parameters in equal pieces of their flattened values."""

    def place_at(self, tensor: Tensor) -> Spread | None:
        """Return the place of a parameter that ZeRO-3 manages."""
        return Spread(tensor) if is_managed(tensor) else None

    def place_of(self, owner: nn.Module, attribute: str) -> Spread | None:
        """Return the place of a parameter of a module that an engine runs, whose parameters must stay."""
        parameter = owner._parameters.get(attribute) if hasattr(owner, "ds_id") else None  # as ZeRO-3 marks modules
        return Spread(parameter, "nothing") if is_managed(parameter) else None

    def ranks_of(self, parameters: Iterable[Tensor], *, is_written: bool) -> Ranks | None:
        """Return the processes over which parameters are spread."""
        spread: Any = next(filter(is_managed if is_written else is_spread, parameters), None)
        if spread is None:
            return None
        return Ranks((spread.ds_process_group,), dist.get_rank(spread.ds_process_group) == 0)


FLATTENED = "_fsdp_flattened"  # an attribute that FSDP sets on parameters
WHOLE = "FullyShardedDataParallel.summon_full_params"


def flattening(model: nn.Module) -> Iterator[Any]:
    """Yield the `FullyShardedDataParallel` wrappers in a model, itself included."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    return (each for each in model.modules() if isinstance(each, kind))


class Flattening(Keeper):
    """Keeps parameters in flat shards. A small one may be whole on one process and empty on others, so none counts."""

    def whole_only_inside(self, tensor: Tensor) -> str | None:
        """Return the block in which a flattened parameter is whole."""
        return f"it is sharded by FSDP: call this inside {WHOLE}(model)" if FLATTENED in vars(tensor) else None

    def why_incomplete(self, model: nn.Module) -> str | None:
        """Return why the values of flattened parameters are not here."""
        wrappers = [*flattening(model)]
        states = ({each.sharding_strategy.name, each.training_state.name} for each in wrappers)
        if any(state.isdisjoint({"NO_SHARD", "SUMMON_FULL_PARAMS"}) for state in states):
            return (
                "FullyShardedDataParallel leaves each process only a part of the values: call and iterate in a block "
                f"of {WHOLE}(model), in every process, or shard the model with fully_shard instead"
            )
        around = {id(parameter) for each in wrappers for parameter in each.parameters()}
        if any(FLATTENED in vars(each) and id(each) not in around for each in model.parameters()):
            return (
                "FullyShardedDataParallel may leave each process only a part of the values, and only its wrapper can "
                f"tell: give the wrapper instead of the model in it, in a block of {WHOLE}(wrapper)"
            )
        return None

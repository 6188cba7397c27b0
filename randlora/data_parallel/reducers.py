"""Parameters that the engine of a model does not know, because they did not require grad when it was made.

`DistributedDataParallel` averages the gradients of the parameters that required grad then, and of no others, and an
engine of DeepSpeed trains no others: what is trained besides them differs from process to process, without an error of
theirs. Both tell which these are, though only by names that are not documented, all of which are in this file.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from randlora.errors import warn
from randlora.model.engines import Engine, register_engine
from randlora.placement.flattened import flattening
from randlora.placement.zero3 import is_managed
from randlora.targets.match import shortened

_SEEN: weakref.WeakSet[Any] = weakref.WeakSet()
"""Engines that were found before, so that switching between adapters need not look for them each time."""


@register_engine
class Reducers(Engine):
    """`DistributedDataParallel` and the engines of DeepSpeed, which know the parameters that they were made with."""

    def changed(self, root: nn.Module) -> None:
        """Warn of parameters of a model that require grad and that the engine around it does not know."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return  # then there is no engine, or nothing to average
        trained = {name: each for name, each in root.named_parameters() if each.requires_grad and _is_plain(each)}
        own = {id(parameter) for parameter in root.parameters()}
        if not trained or _unknown(trained, own) == []:
            return
        _look_for([DistributedDataParallel, *_deepspeed_engines()])
        if _unknown(trained, own):
            gc.collect()  # an engine that was given up may still be here, as part of a cycle
        if unknown := _unknown(trained, own):
            warn(
                f"{shortened(unknown)} requires grad, and the {type(_of(own)[0]).__name__} around the model was made "
                "before and does not know it: every process would train its own copy. Wrap the model again after this "
                "call"
            )

    def is_first_copy(self, model: nn.Module) -> bool:
        """Whether this is the first of the processes that train copies of a model, as the engines around it tell.

        Of a model that no engine runs, each process has the only copy, as far as is known.
        """
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return True
        _look_for([DistributedDataParallel, *_deepspeed_engines()])
        own = {id(parameter): parameter for parameter in model.parameters()}
        is_spread = any(map(is_managed, own.values()))  # by an engine whose processes hold one copy together
        engines = [each for each in _of({*own}) if isinstance(each, DistributedDataParallel) or not is_spread]
        engines += flattening(model)
        return all(dist.get_rank(_group(engine)) == 0 for engine in engines)


def _group(engine: Any) -> Any:
    """Return the group of the processes that an engine runs in; ``None`` means all."""
    names = "process_group", "seq_data_parallel_group"  # of torch's engines, of DeepSpeed's
    return next((group for name in names if (group := getattr(engine, name, None)) is not None), None)


def _look_for(kinds: Iterable[type]) -> None:
    """Find all engines of some types that there are."""
    every = tuple(_with_subclasses(kinds))
    _SEEN.update(each for each in gc.get_referrers(*every) if type(each) in every)


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether a parameter is not a `DTensor`, which belongs to an engine that needs no wrapper."""
    return type(parameter.data) is Tensor


def _deepspeed_engines() -> list[type]:
    library: Any = sys.modules.get("deepspeed")
    return [] if library is None else [library.DeepSpeedEngine]


def _with_subclasses(kinds: Iterable[type]) -> Iterator[type]:
    for kind in kinds:
        yield kind
        yield from _with_subclasses(kind.__subclasses__())


def _of(own: set[int]) -> list[Any]:
    """Return the engines that hold some of these parameters."""
    return [each for each in _SEEN if not own.isdisjoint(map(id, each.parameters()))]


def _unknown(trained: Mapping[str, nn.Parameter], own: set[int]) -> list[str] | None:
    """Return the names of the parameters that no engine knows, or was told to ignore; ``None`` if there is no engine.

    Args:
        trained: The parameters, by name.
        own: The identities of all parameters of their model.
    """
    if not (engines := _of(own)):
        return None
    known: set[int] = set()
    for engine in engines:
        known.update(_averaged(engine) if isinstance(engine, DistributedDataParallel) else _optimized(engine))
    return [name for name, parameter in trained.items() if id(parameter) not in known]


def _averaged(wrapper: DistributedDataParallel) -> Iterator[int]:
    """Yield the ids of the parameters whose gradients DDP averages, and of those that it was told to ignore."""
    for bucket in wrapper.reducer._get_zeros_like_grad_buckets():
        yield from map(id, bucket.parameters())
    ignored = wrapper.parameters_to_ignore
    yield from (id(each) for name, each in wrapper.module.named_parameters() if name in ignored)


def _optimized(engine: Any) -> Iterator[int]:
    """Yield the ids of the parameters that DeepSpeed trains: with ZeRO its optimizer has them in groups beside it."""
    optimizer = engine.optimizer
    for groups in ("bit16_groups", "fp16_groups"):  # ZeRO 1 and 2; ZeRO 3 and its fp16 optimizer
        yield from (id(each) for group in getattr(optimizer, groups, ()) for each in group)
    for group in getattr(optimizer, "param_groups", ()):
        yield from map(id, group["params"])

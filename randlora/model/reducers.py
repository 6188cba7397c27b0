"""Parameters that `DistributedDataParallel` does not know, because they did not require grad when it was made.

It averages the gradients of the parameters that required grad then, and of no others: what is trained besides them
differs from process to process, without an error of torch's. torch tells which these are, though only by private names,
all of which are in this file.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Mapping

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from randlora.errors import warn
from randlora.targets.match import shortened

_SEEN: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()
"""Wrappers that were found before, so that switching between adapters need not look for them each time."""


def warn_of_unknown(model: nn.Module) -> None:
    """Warn of parameters of a model that require grad and whose gradients the wrapper around it would not average."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return  # then there is no wrapper, or nothing to average
    trained = {name: parameter for name, parameter in model.named_parameters() if _may_be_averaged(parameter)}
    own = {id(parameter) for parameter in model.parameters()}
    if trained and (not (wrappers := _of(own, _SEEN)) or _unknown(trained, wrappers)):
        gc.collect()  # a wrapper that was given up may still be here, as part of a cycle
        _SEEN.update(each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel))
        wrappers = _of(own, _SEEN)
        if wrappers and (unknown := _unknown(trained, wrappers)):
            warn(
                f"{shortened(unknown)} requires grad, and the DistributedDataParallel around the model was made before "
                "and does not know it: every process would train its own copy. Wrap the model again after this call"
            )


def _may_be_averaged(parameter: nn.Parameter) -> bool:
    """Whether a parameter is trained and not sharded, when another engine than this one has it."""
    return parameter.requires_grad and type(parameter.data) is Tensor and not hasattr(parameter, "ds_id")


def _of(own: set[int], wrappers: Iterable[DistributedDataParallel]) -> list[DistributedDataParallel]:
    """Return those of the wrappers that hold some of these parameters."""
    return [each for each in wrappers if not own.isdisjoint(map(id, each.parameters()))]


def _unknown(trained: Mapping[str, nn.Parameter], wrappers: Iterable[DistributedDataParallel]) -> list[str]:
    """Return the names of the parameters that none of the wrappers averages, or was told to ignore."""
    known: set[int] = set()
    for wrapper in wrappers:
        for bucket in wrapper.reducer._get_zeros_like_grad_buckets():
            known.update(map(id, bucket.parameters()))
        ignored = wrapper.parameters_to_ignore
        known.update(id(each) for name, each in wrapper.module.named_parameters() if name in ignored)
    return [name for name, parameter in trained.items() if id(parameter) not in known]

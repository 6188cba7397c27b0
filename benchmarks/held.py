"""What tensors hold memory: those alive, those a forward leaves for backward, and the most at once in a step."""

import gc
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

Storages = dict[int, int]
"""Bytes by address."""


@contextmanager
def among_new_objects() -> Iterator[None]:
    """Leave what was made until now out of every search: the libraries' objects are half a million."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def alive() -> Storages:
    """Find the memory of every tensor that Python can reach, wherever it is kept.

    Hooks on what autograd saves do not see what bitsandbytes keeps at the objects of its own functions.
    """
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if _has_memory(tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type in ("cpu", "cuda") and not is_fake(tensor)


def bytes_since(before: Storages) -> int:
    """Count the bytes of what lives now and did not live before; where it did, it has to live still."""
    return sum(nbytes for address, nbytes in alive().items() if address not in before)


def kept_for_backward(layer: nn.Module, x: Tensor) -> int:
    """Count the bytes that a forward leaves for backward, its output apart, its input with what keeps it."""
    before = alive()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor, lambda tensor: tensor
    ):  # within Python's reach
        output = layer(x.clone())
    return bytes_since({**before, output.untyped_storage().data_ptr(): 0})


def peak_of(step: Callable[[], Any], device: str) -> int:
    """Count the bytes that a step needs at its height, above those that were allocated before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of every start and stop
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    changes = [event.nbytes() for event in profile.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes), default=0)

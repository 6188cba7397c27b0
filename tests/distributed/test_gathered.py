"""How much of a sharded model a process holds whole at once: one tensor, whatever is written of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import randlora
from randlora.sharded import places
from tests.distributed.engines import engine_of, needs_deepspeed
from tests.distributed.processes import Processes
from tests.distributed.trained import Drawn

DRAWN = Drawn((12, 16, 8, 12), 4, "dense", 2.0, ("norms",))
COUNT = 3 * (2 + 2)
"""Λ and Γ of three layers, and the weight and bias of three norms."""

VERBS: dict[str, Callable[[torch.nn.Module, Path], object]] = {
    "save": randlora.save,
    "adapter_state": lambda model, _: randlora.adapter_state(model),
}


@contextmanager
def watched(on: Any, name: str) -> Iterator[list[int]]:
    """Yield how many of the tensors that a function has returned are there whenever it returns another."""
    own, held, alive = getattr(on, name), list[Any](), list[int]()

    def watching(*args: Any, **options: Any) -> Tensor:
        found: Tensor = own(*args, **options)
        held.append(weakref.ref(found))
        alive.append(sum(each() is not None for each in held))
        return found

    with mock.patch.object(on, name, watching):
        yield alive


def fully_sharded(verb: str, place: Path) -> list[int]:
    model = DRAWN.adapted()
    fully_shard(model)
    with watched(DTensor, "full_tensor") as alive:
        VERBS[verb](model, place)
    return alive


def spread(verb: str, place: Path) -> list[int]:
    model = engine_of(DRAWN, "3").module
    with watched(places, "gathered") as alive:
        VERBS[verb](model, place)
    return alive


@pytest.mark.parametrize("verb", VERBS)
def test_one_tensor_at_a_time_is_gathered_by_fully_shard(pair: Processes, verb: str, tmp_path: Path) -> None:
    assert pair.run(fully_sharded, verb, tmp_path) == [[1] * COUNT] * 2


@needs_deepspeed
@pytest.mark.parametrize("verb", VERBS)
def test_one_tensor_at_a_time_is_gathered_by_zero(zero_pair: Processes, verb: str, tmp_path: Path) -> None:
    assert zero_pair.run(spread, verb, tmp_path) == [[1] * COUNT] * 2

"""Adapters that one process sends and others receive: the same merged weights, errors on both ends, and a kill."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import randlora
from randlora.errors import AdapterError, RandLoRAError
from randlora.integrations import rollouts
from randlora.integrations.rollouts import receive_adapter, send_adapter
from tests.distributed.engines import sharded
from tests.distributed.processes import ProcessError, Processes, in_four, in_two, on_all
from tests.distributed.trained import Drawn, drawn
from tests.kit import all_bits, bits
from tests.pages import snippet

CASE = Drawn(dtype=torch.bfloat16, train_also=("head",))


@torch.no_grad()
def step(model: nn.Module, number: int) -> None:
    for index, parameter in enumerate(randlora.trainable_parameters(model)):
        parameter.add_(0.05 * drawn(*parameter.shape, seed=100 * number + index).to(parameter.dtype))


def merged_bits(model: nn.Module) -> dict[str, Any]:
    """Return the bits of the weights that a model computes with when merged: its own if it is merged, or a copy's."""
    if randlora.adapters(model)[0].is_merged:
        return all_bits(dict(randlora.merged_tensors(model)))
    randlora.merge(own := copy.deepcopy(model))
    return all_bits(own.state_dict())


@in_two
@pytest.mark.parametrize("is_merged", [True, False])
def test_a_receiver_computes_after_each_round_with_the_bits_of_the_senders_merged_model(is_merged: bool) -> None:
    model, rank = CASE.adapted(), dist.get_rank()
    base = all_bits(CASE.build().state_dict())
    if rank and is_merged:
        randlora.merge(model, reversible=True)
    scope = {"randlora": randlora, "model": model}
    for number in range(4):
        if rank == 0:
            step(model, number)
        exec(snippet("rollouts.md", "receive_adapter" if rank else "send_adapter"), scope)
        assert randlora.adapters(model)[0].is_merged is (is_merged and rank == 1)
        sent, received = on_all(merged_bits(model))
        assert sent == received
        ids = CASE.batch(0, number)[0]
        with torch.no_grad(), nullcontext() if rank else randlora.merged(model):
            there, here = on_all(bits(model(ids)))
        assert (there == here) is is_merged
    assert len({str(each) for each in on_all(list(randlora.adapter_state(model).metadata.values()))}) == 1
    if rank and is_merged:
        randlora.unmerge(model)
    own = all_bits(dict(model.named_parameters()))
    assert {name: own[name] for name in base if "head" not in name} == {
        name: found for name, found in base.items() if "head" not in name
    }


def damaged(place: int) -> Callable[..., bytes]:
    def damage(tensors: Any) -> bytes:
        found = bytearray(safetensors.torch.save(tensors))
        found[place] ^= 1
        return bytes(found)

    return damage


CANNOT: dict[str, tuple[dict[str, Any], int | None, str]] = {
    "a different seed": ({"seed": 1}, None, "the bases are .*seed=1"),
    "a different r": ({"r": 4}, None, "r=4 and alpha=2, but in the files r=3"),
    "different layers": ({"targets": ["up"]}, None, "the adapter has no layer"),
    "damaged values": ({}, -1, "checksum"),
    "a damaged name": ({}, 12, "it was damaged"),
    "values too large to merge": ({}, None, "not be finite"),
}
"""Options of the receiver's adapter, which byte is damaged, and what it says."""


@in_two
@pytest.mark.parametrize("what", CANNOT)
def test_a_receiver_that_cannot_take_an_adapter_is_as_it_was_and_the_sender_is_told(what: str) -> None:
    rank, case = dist.get_rank(), replace(CASE, dtype=torch.float16, train_also=())
    options, place, said = CANNOT[what]
    model = case.build()
    randlora.inject(model, **(case.options() | (options if rank else {})))
    step(model, 0)
    if rank:
        randlora.merge(model, reversible=True)
        before = merged_bits(model)
        with pytest.raises(RandLoRAError, match=said):
            receive_adapter(model)
        assert randlora.adapters(model)[0].is_merged
        assert merged_bits(model) == before
        randlora.unmerge(model)
        randlora.merge(model, reversible=True)
        assert merged_bits(model) == before, "and so is the adapter"
        return
    if what == "values too large to merge":
        for parameter, value in zip(randlora.trainable_parameters(model), (1e30, 1e3), strict=False):
            parameter.data.fill_(value)
    told = pytest.raises(RandLoRAError, match=rf"cannot send the adapter: rank 1 of the group: .*{said}")
    with nullcontext() if place is None else mock.patch.object(rollouts, "save", damaged(place)), told:
        send_adapter(model)


@in_two
def test_a_sender_that_fails_tells_the_receivers_and_so_does_a_process_that_is_taken_for_it() -> None:
    model, rank = CASE.adapted(), dist.get_rank()
    if rank == 0:
        randlora.trainable_parameters(model)[0].data.fill_(float("nan"))
        with pytest.raises(RandLoRAError, match=r"^cannot return the state of an adapter: .* NaN"):
            send_adapter(model)
        with pytest.raises(AdapterError, match="no adapter named 'other'"):
            send_adapter(model, "other")
        with pytest.raises(RandLoRAError, match=r"rank 1 of the group: .* sent none: it does not call send_adapter"):
            send_adapter(CASE.adapted(), sender=1)
        return
    before = merged_bits(model)
    for said, sender in ((" NaN", 0), ("'other'", 0), ("does not call send_adapter", 1)):
        with pytest.raises(RandLoRAError, match=f"cannot receive an adapter: the sender has sent none: .*{said}"):
            receive_adapter(model, sender=sender)
    assert merged_bits(model) == before


@in_four
def test_two_processes_that_hold_a_model_send_to_two_that_hold_another_and_all_know_of_an_error() -> None:
    case, rank = Drawn(), dist.get_rank()
    mesh, group = init_device_mesh("cpu", (2, 2), mesh_dim_names=("end", "part"))["part"], dist.new_group([0, 2, 3])
    model, verb = sharded(case.adapted(), mesh=mesh), send_adapter if rank < 2 else receive_adapter
    if rank < 2:
        with torch.no_grad():
            for parameter in randlora.trainable_parameters(model):
                parameter.mul_(1.5)
    else:
        randlora.merge(model, reversible=True)
    before = on_all(randlora.adapter_state(model).metadata)
    damage = mock.patch.object(rollouts, "load", side_effect=RandLoRAError("here alone"))
    with damage if rank == 3 else nullcontext(), pytest.raises(RandLoRAError, match="here alone"):
        verb(model, group=group)
    assert on_all(randlora.adapter_state(model).metadata) == before
    for _ in range(2):
        verb(model, group=group)
        found = on_all({name: bits(tensor) for name, tensor in randlora.merged_tensors(model)})
        assert found == [found[0]] * 4
    assert randlora.adapters(model)[0].is_merged is (rank > 1)


@in_four
def test_an_end_that_cannot_take_part_is_told_of_to_all_who_would_wait_for_it() -> None:
    rank, case = dist.get_rank(), Drawn()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("end", "part"))
    pair, without_last, ends = (dist.new_group(ranks) for ranks in ([0, 3], [0, 1, 2], [0, 2, 3]))
    if rank in (0, 3):
        model = case.adapted()
        if rank == 0:  # parts of a model over meshes of which none has all processes
            first, second = model.blocks[0].up, model.blocks[0].down
            fully_shard(first, mesh=mesh["end"])
            fully_shard(second, mesh=mesh["part"])
        with pytest.raises(RandLoRAError, match="adapt its parts as separate models"):
            (receive_adapter if rank else send_adapter)(model, group=pair)
    model = sharded(case.adapted(), mesh=mesh["part"])
    before = on_all(randlora.adapter_state(model).metadata)
    if rank < 2:
        with pytest.raises(RandLoRAError, match=r"rank 2 of the group: .* this process is not in the group"):
            send_adapter(model, group=without_last)
    else:
        with pytest.raises(RandLoRAError, match="this process is not in the group"):
            receive_adapter(model, group=without_last)
    assert on_all(randlora.adapter_state(model).metadata) == before
    own = rollouts._gathered_problems

    def lost(*args: Any) -> None:
        own(*args)
        raise RuntimeError("the connection is lost")

    losing = mock.patch.object(rollouts, "_gathered_problems", lost) if rank == 0 else nullcontext()
    with losing, pytest.raises(RuntimeError, match="is lost") if rank < 2 else nullcontext():
        (send_adapter if rank < 2 else receive_adapter)(model, group=ends)


def killed_in_third_round(place: Path, call: int) -> None:
    """Send and receive until the sender is killed in a round, before one of the collectives in it."""
    rank, model = dist.get_rank(), CASE.adapted()
    calls = list[str]()

    def observed(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return own(*args, **kwargs)

        return run

    if rank == 0:
        send_adapter(model)
        step(model, 1)
        torch.save(merged_bits(model), place / "sent")
        send_adapter(model)
        step(model, 2)
        torch.save(merged_bits(model), place / "next")
        own = vars(dist.distributed_c10d)
        for name in own.keys() & {"broadcast", "all_gather", "all_gather_single"}:  # the last since torch 2.15
            setattr(dist.distributed_c10d, name, observed(name, own[name]))
        send_adapter(model)
    randlora.merge(model, reversible=True)
    receive_adapter(model)
    receive_adapter(model)
    with pytest.raises(RuntimeError):
        receive_adapter(model)
    expected = torch.load(place / ("next" if call > 2 else "sent"), weights_only=False)
    assert merged_bits(model) == expected, "the last whole one"
    assert randlora.adapters(model)[0].is_merged
    (place / "done").touch()


@pytest.mark.parametrize("call", [1, 2, 3], ids=["before a round", "before the values", "before the answers"])
def test_a_sender_that_is_killed_leaves_the_last_whole_adapter(call: int, tmp_path: Path) -> None:
    pair = Processes(2)
    try:
        with pytest.raises(ProcessError, match=r"^rank 0: ended with exit code -9$"):
            pair.run(killed_in_third_round, tmp_path, call)
    finally:
        pair.stop()
    assert (tmp_path / "done").exists()

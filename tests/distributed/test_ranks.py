"""`check_ranks`: all processes are told what differs between them, and which has what. Which hold a model together."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import randlora
from randlora.errors import AdapterError
from randlora.model.updates import differences
from tests.distributed.processes import LAW, Processes
from tests.distributed.trained import Drawn, drawn_models

DRAWN = Drawn((6, 8, 6), 4, "block", 2.0)
OPTIONS: dict[str, Any] = {"r": 4, "targets": "all-linear", "stream": "portable", "basis": "sparse"}


def check(drawn: Drawn) -> None:
    model = drawn.adapted()
    randlora.check_ranks(model)
    randlora.check_ranks(DistributedDataParallel(model, broadcast_buffers=False), group=dist.new_group())


@LAW
@given(drawn=drawn_models(others=st.sampled_from([0, 1])))
def test_equal_adapters_pass(pair: Processes, drawn: Drawn) -> None:
    pair.run(check, drawn)


def check_different(options: dict[str, Any], torch_version: str | None = None, value: float | None = None) -> str:
    """Return the error of a model that has other options on rank 1."""
    model = DRAWN.build()
    is_last = dist.get_rank() == 1
    randlora.inject(model, **OPTIONS | (options if is_last else {}))
    if is_last and value is not None:  # as after a fault of the memory or of the machine
        (basis,) = randlora.state.adapted_root(model)[1].bank
        basis.matrices()[1].values[0, 0] += value
    with pytest.MonkeyPatch.context() as patch:
        if is_last and torch_version:
            patch.setattr(torch, "__version__", torch_version)
        with pytest.raises(AdapterError, match="cannot go on: the ranks have different adapters") as caught:
            randlora.check_ranks(model)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"seed": 1},
            "on rank 0; sparse bases (stream=portable, seed=1, ",
        ),
        ({"stream": "torch"}, "on rank 0; sparse bases (stream=torch, seed=0, "),
        ({"alpha": 3}, "the targets of 'default', their r and alpha"),
        ({"r": 2}, "the spec of the bases of r=2 of 'default': nothing on rank 0; sparse bases"),
        ({"exclude": "layers.0"}, "the targets of 'default', their r and alpha: 2 with"),
        ({"train_also": "norms"}, "0 parameters"),
        ({"dropout": 0.5}, "the dropout of 'default': 0.0 on rank 0; 0.5 on rank 1"),
        ({"name": "other"}, "the names of the adapters: default on rank 0; other on rank 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_rank_gets_the_same_error(pair: Processes, options: dict[str, Any], said: str) -> None:
    first, second = pair.run(check_different, options)
    assert first == second
    assert said in first


def test_bases_of_other_bits_are_found_and_versions_of_torch_are_named(pair: Processes) -> None:
    first, second = pair.run(check_different, {}, "2.0", 1)
    assert first == second
    assert "the bases of r=4 of 'default': SHA-256" in first
    assert "the versions of torch differ: torch 2" in first
    assert "torch 2.0 on rank 1" in first
    first, _ = pair.run(check_different, {}, None, 1)
    assert "versions" not in first


def check_values(fqn: str) -> str:
    """Return the error of a model of which rank 1 has trained something else."""
    drawn = replace(DRAWN, train_also=("norms.0",))
    model = drawn.adapted()
    randlora.check_ranks(model, values=True)
    with torch.no_grad():
        model.get_parameter(fqn).add_(dist.get_rank())
    randlora.check_ranks(model)
    with pytest.raises(AdapterError, match="cannot go on: the ranks have different adapters") as caught:
        randlora.check_ranks(model, values=True)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fqn", "said"),
    [
        ("layers.0.randlora_gamma.default", "Λ and Γ of layers.0 of 'default': SHA-256 "),
        ("norms.0.bias", "norms.0.bias, which 'default' trains: SHA-256 "),
    ],
)
def test_other_values_are_found_where_asked_for(pair: Processes, fqn: str, said: str) -> None:
    first, second = pair.run(check_values, fqn)
    assert first == second
    assert said in first
    assert "problems" not in first, "nothing else differs"


def check_one_plain() -> str:
    model = DRAWN.build() if dist.get_rank() else DRAWN.adapted()
    with pytest.raises(AdapterError, match="cannot compare the adapters of all ranks: rank 1: ") as caught:
        randlora.check_ranks(model)
    return str(caught.value)


def test_a_rank_without_adapters_stops_all(pair: Processes) -> None:
    first, second = pair.run(check_one_plain)
    assert first == second


def shard_in_two_places(place: str) -> str:
    """Return the error of a model of which each process has a layer of its own mesh."""
    model = DRAWN.build()
    meshes = [DeviceMesh("cpu", [rank]) for rank in range(dist.get_world_size())]
    for layer, mesh in zip(model.layers, meshes, strict=True):
        own = nn.Parameter(distribute_tensor(layer.get_parameter("weight").detach(), mesh, [Shard(0)]))
        layer.register_parameter("weight", own)
    randlora.inject(model, 4, targets=[f"layers.{dist.get_rank()}"])
    with pytest.raises(AdapterError, match="so not all could take part in one call") as caught:
        randlora.save(model, place)
    return str(caught.value)


def test_meshes_without_one_that_has_all_processes_are_refused(pair: Processes, tmp_path: Path) -> None:
    first, second = pair.run(shard_in_two_places, str(tmp_path / "adapter"))
    assert first == second
    assert "whose processes [1] are not in the first" in first
    assert not (tmp_path / "adapter").exists()


def test_in_one_process_there_is_nothing_to_compare() -> None:
    model = DRAWN.build()
    with pytest.raises(AdapterError, match="no adapter"):
        randlora.check_ranks(model)
    DRAWN.adapt(model)
    randlora.check_ranks(model)


def test_differences_name_all_ranks_of_a_value() -> None:
    facts = {0: {"a": "x", "b": "y"}, 2: {"a": "x", "b": "z"}, 3: {"a": "x", "b": "y"}}
    assert differences(facts) == ["b: y on ranks 0, 3; z on rank 2"]

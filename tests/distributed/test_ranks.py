"""`check_ranks`: all processes are told what differs between them, and which has what. Which hold a model together."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import randlora
from randlora.errors import AdapterError
from randlora.model.updates import differences
from tests.distributed.processes import LAW, PAIR, ProcessError, in_two, on_all
from tests.distributed.trained import Drawn, drawn_models

DRAWN = Drawn(r=4, basis="block", train_also=("norm",))
OPTIONS: dict[str, Any] = {"r": 4, "targets": ["up", "down"], "stream": "portable", "basis": "sparse"}


def fail_on_last() -> None:
    assert 1 / (1 - dist.get_rank())


def test_what_fails_in_one_of_them_is_raised_and_the_next_call_works() -> None:
    with pytest.raises(ProcessError, match=r"rank 1: (.|\n)*ZeroDivisionError"):
        PAIR.run(fail_on_last)
    assert PAIR.run(on_all, 2) == [[2, 2], [2, 2]]


@LAW
@given(drawn=drawn_models)
@in_two
def test_equal_adapters_pass(drawn: Drawn) -> None:
    model = drawn.adapted()
    randlora.check_ranks(model)
    randlora.check_ranks(DistributedDataParallel(model, broadcast_buffers=False), group=dist.new_group())


def refused(
    model: nn.Module, said: str, what: str = "cannot go on: the ranks have different adapters", **options: Any
) -> str:
    """Return the error of `check_ranks`, which all processes get."""
    with pytest.raises(AdapterError, match=what) as caught:
        randlora.check_ranks(model, **options)
    first, second = on_all(str(caught.value))
    assert first == second
    assert said in first
    return first


@in_two
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 1}, "on rank 0; sparse bases (stream=portable, seed=1, "),
        ({"stream": "torch"}, "on rank 0; sparse bases (stream=torch, seed=0, "),
        ({"alpha": 3}, "the targets of 'default', their r and alpha"),
        ({"r": 2}, "the spec of the bases of r=2 of 'default': nothing on rank 0; sparse bases"),
        ({"exclude": "blocks.0.up"}, "the targets of 'default', their r and alpha: 4 with"),
        ({"train_also": ["norm"]}, "0 parameters"),
        ({"dropout": 0.5}, "the dropout of 'default': 0.0 on rank 0; 0.5 on rank 1"),
        ({"name": "other"}, "the names of the adapters: default on rank 0; other on rank 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_rank_gets_the_same_error(options: dict[str, Any], said: str) -> None:
    model = DRAWN.build()
    randlora.inject(model, **OPTIONS | (options if dist.get_rank() else {}))
    refused(model, said)


@in_two
def test_bases_of_other_bits_are_found_and_versions_of_torch_are_named() -> None:
    model = DRAWN.build()
    randlora.inject(model, **OPTIONS)
    if dist.get_rank():  # as after a fault of the memory or of the machine
        (basis,) = randlora.state.adapted_root(model)[1].bank
        basis.matrices()[1].values[0, 0] += 1
    assert "versions" not in refused(model, "the bases of r=4 of 'default': SHA-256")
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank():
            patch.setattr(torch, "__version__", "2.0")
        assert "torch 2.0 on rank 1" in refused(model, "the versions of torch differ: torch 2")


@in_two
@pytest.mark.parametrize(
    ("fqn", "said"),
    [
        ("blocks.0.up.randlora_gamma.default", "Λ and Γ of blocks.0.up of 'default': SHA-256 "),
        ("blocks.0.norm.bias", "blocks.0.norm.bias, which 'default' trains: SHA-256 "),
    ],
)
def test_other_values_are_found_where_asked_for(fqn: str, said: str) -> None:
    model = DRAWN.adapted()
    randlora.check_ranks(model, values=True)
    with torch.no_grad():
        model.get_parameter(fqn).add_(dist.get_rank())
    randlora.check_ranks(model)
    assert "problems" not in refused(model, said, values=True), "nothing else differs"


@in_two
def test_a_rank_without_adapters_stops_all() -> None:
    refused(DRAWN.build() if dist.get_rank() else DRAWN.adapted(), "rank 1: ", "cannot compare the adapters of all")


@in_two
def test_meshes_without_one_that_has_all_processes_are_refused(tmp_path: Path) -> None:
    """Each process has a layer of its own mesh."""
    model = DRAWN.build()
    meshes = [DeviceMesh("cpu", [rank]) for rank in range(2)]
    for index, mesh in enumerate(meshes):
        layer = model.get_submodule(f"blocks.{index}.up")
        own = distribute_tensor(layer.get_parameter("weight").detach(), mesh, [Shard(0)])
        layer.register_parameter("weight", nn.Parameter(own))
    randlora.inject(model, 4, targets=[f"blocks.{dist.get_rank()}.up"])
    with pytest.raises(AdapterError, match="so not all could take part in one call") as caught:
        randlora.save(model, tmp_path / "adapter")
    assert "whose processes [1] are not in the first" in str(caught.value)
    assert len(set(on_all(str(caught.value)))) == 1
    assert not (tmp_path / "adapter").exists()


def test_in_one_process_there_is_nothing_to_compare_and_all_ranks_of_a_value_are_named() -> None:
    model = DRAWN.build()
    with pytest.raises(AdapterError, match="no adapter"):
        randlora.check_ranks(model)
    randlora.check_ranks(DRAWN.adapt(model))
    facts = {0: {"a": "x", "b": "y"}, 2: {"a": "x", "b": "z"}, 3: {"a": "x", "b": "y"}}
    assert differences(facts) == ["b: y on ranks 0, 3; z on rank 2"]

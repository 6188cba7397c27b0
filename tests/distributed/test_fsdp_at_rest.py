"""A model sharded by `fully_shard` is saved and merged, by all its processes together, as the whole one is."""

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, parallelize_module

import randlora
from randlora.errors import CheckpointError, MergeError
from tests.distributed.processes import Processes
from tests.kit import all_bits, fill
from tests.laws import TOKENS, Mixed


class Two(nn.Module):
    """Two blocks, one of which is sharded by itself and the other with the model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mixed(), Mixed()

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(batch,)`` tokens to ``(batch, 3)``."""
        output: Tensor = self.first(tokens) + self.second(tokens)
        return output


def adapted() -> Two:
    model = Two()
    randlora.inject(model, r=3, targets=["q", "up", "down", "embed"], train_also=["norm"])
    return fill(model)


def sharded(model: Two) -> Two:
    fully_shard(model.first)
    fully_shard(model)
    return model


def pair_of_models() -> tuple[Two, Two]:
    """Return a whole model and a sharded one of the same values."""
    torch.manual_seed(0)
    one = adapted()
    torch.manual_seed(0)
    return one, sharded(adapted())


def local(parameter: Tensor) -> Tensor:
    return (parameter._local_tensor if isinstance(parameter, DTensor) else parameter).detach()


def full(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.full_tensor()


def shards(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the shards of a model that may hold whole parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {name: local(parameter).clone() for name, parameter in model.named_parameters()}


def save(place: Path) -> None:
    one, model = pair_of_models()
    model(TOKENS)  # after which the root holds whole parameters
    report = randlora.save(model, place / "sharded")
    assert report.directory == place / "sharded"
    if dist.get_rank() == 0:
        randlora.save(one, place / "whole")
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (place / "sharded" / name).read_bytes() == (place / "whole" / name).read_bytes()


def test_the_files_are_those_of_one_process(pair: Processes, tmp_path: Path) -> None:
    pair.run(save, tmp_path)


def swap_and_return_states(place: Path) -> None:
    one, model = pair_of_models()
    model(TOKENS)  # after which the root holds whole parameters
    before = randlora.adapter_state(model)
    expected = randlora.adapter_state(one)
    assert before.metadata == expected.metadata
    assert all_bits(before.tensors) == all_bits(expected.tensors)
    fill(one, seed=7)
    if dist.get_rank() == 0:
        randlora.save(one, place / "other")
    dist.barrier()
    held = [id(parameter) for parameter in model.parameters()]
    if dist.get_rank() == 1:
        (place / "none").mkdir()
    for source in (place / ("other" if dist.get_rank() else "none"), place / "none"):
        with pytest.raises(CheckpointError, match=r"cannot load .*/none"):
            randlora.swap(model, source)
        assert randlora.adapter_state(model).metadata == before.metadata
    randlora.swap(model, place / "other")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    assert [id(parameter) for parameter in model.parameters()] == held
    assert randlora.adapter_state(model).metadata == randlora.adapter_state(one).metadata
    assert torch.allclose(model(TOKENS), one(TOKENS), rtol=0, atol=1e-6)
    randlora.swap(model, expected)
    assert randlora.adapter_state(model).metadata == expected.metadata


def test_a_state_is_that_of_one_process_and_is_swapped_in_all(pair: Processes, tmp_path: Path) -> None:
    pair.run(swap_and_return_states, tmp_path)


class Saver(Two):
    """A model with the method of transformers' models."""

    def save_pretrained(self, save_directory: Path) -> None:
        raise AssertionError(f"writes {save_directory} without the adapter")


def split(model: Saver, mesh: DeviceMesh) -> Saver:
    layers = (f"{block}.{layer}" for block in ("first", "second") for layer in ("up", "down"))
    plan: dict[str, ParallelStyle] = {layer: ColwiseParallel() for layer in layers}
    parallelize_module(model, mesh, plan)
    return model


def save_in_each(order: str, place: Path) -> tuple[int, list[str]]:
    """Save by each way that there is; return how often this process wrote files, and the errors where none could."""
    model, count = Saver(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (count // 2, 2), mesh_dim_names=("data", "tensor"))
    steps: dict[str, Callable[[], object]] = {
        "inject": lambda: randlora.inject(model, r=3, targets=["q", "up", "down"], save_pretrained="adapter"),
        "shard": lambda: fully_shard(model, mesh=mesh["data" if "split" in order else "tensor"]),
        "split": lambda: split(model, mesh["tensor"]),
    }
    for step in order.split(", "):
        steps[step]()
    (place / "file").touch()
    save_module = importlib.import_module("randlora.checkpoint.save")  # the package has a function of this name
    written, errors = mock.Mock(side_effect=save_module.write_files), []
    with mock.patch.object(save_module, "write_files", written):
        report = randlora.save(model, place / "adapter")
        assert report.nbytes > 0
        model.save_pretrained(place / "other")
        for write in (partial(randlora.save, model), model.save_pretrained):
            with pytest.raises(CheckpointError) as caught:
                write(place / "file")
            errors.append(str(caught.value))
    dist.barrier()
    assert (place / "other" / "adapter_model.safetensors").exists()
    return written.call_count, errors


@pytest.mark.parametrize("order", ["inject, shard", "split, inject"])
def test_one_process_writes_and_all_learn_of_errors(pair: Processes, order: str, tmp_path: Path) -> None:
    (first, errors), (second, others) = pair.run(save_in_each, order, tmp_path)
    assert (first, second) == (2, 0)
    assert errors == others


def test_one_process_of_a_mesh_of_two_dimensions_writes(four: Processes, tmp_path: Path) -> None:
    found = four.run(save_in_each, "inject, split, shard", tmp_path)
    assert [count for count, _ in found] == [2, 0, 0, 0]
    assert all(errors == found[0][1] for _, errors in found)


def fail_to_merge() -> None:
    _, model = pair_of_models()
    if dist.get_rank() == 1:
        local(model.second.up.weight).fill_(torch.inf)
    before = shards(model)
    with pytest.raises(MergeError, match=r"second\.up would not be finite"):
        randlora.merge(model, reversible=True)
    after = shards(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_what_fails_in_one_process_is_raised_in_all_and_changes_nothing(pair: Processes) -> None:
    pair.run(fail_to_merge)

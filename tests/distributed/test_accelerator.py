"""`accelerate.Accelerator` on two processes: the same training as without it, resumed with the same bits."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import randlora
from tests.distributed.processes import Processes
from tests.kit import adapter_values, all_bits, fill

INPUTS, STEPS = 8, 3


def built() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, 12), nn.Tanh(), nn.Linear(12, INPUTS))
    randlora.inject(model, r=3, targets="all-linear", stream="portable")
    return fill(model)


def batches() -> torch.Tensor:
    return torch.randn(STEPS, 4, INPUTS, generator=torch.Generator().manual_seed(1))


def trained_alone() -> nn.Module:
    model = built()
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=1e-3)
    for batch in batches():
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def train_as_launched(folder: str) -> Any:
    """Call `train` with the environment of a process that torchrun has started."""
    rank, count = str(dist.get_rank()), str(dist.get_world_size())
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    with mock.patch.dict(os.environ, launched):
        return train(folder)


def train(folder: str) -> tuple[str, dict[str, Any], dict[str, Any], bool]:
    """Train, save the state, train on, go back, and save; return the class of the model, its values and those alone."""
    from accelerate import Accelerator  # type: ignore[import-untyped]
    from accelerate.state import AcceleratorState, GradientState, PartialState  # type: ignore[import-untyped]

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator = Accelerator(cpu=True)
    model = built()
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    plain = accelerator.unwrap_model(model)
    for step, batch in enumerate(batches()):
        if step == 1:
            accelerator.save_state(folder)
        own = batch.chunk(accelerator.num_processes)[accelerator.process_index]
        accelerator.backward(model(own).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    values = {name: value.detach().clone() for name, value in adapter_values(plain).items()}
    whole = accelerator.get_state_dict(model)
    is_whole = {name: value for name, value in all_bits(whole).items() if "randlora" in name}.keys() >= {
        name for name, parameter in plain.named_parameters() if parameter.requires_grad
    }
    accelerator.load_state(folder)
    for batch in batches()[1:]:
        own = batch.chunk(accelerator.num_processes)[accelerator.process_index]
        accelerator.backward(model(own).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    assert all_bits(adapter_values(plain)) == all_bits(values)  # resumed to the same bits
    if accelerator.is_main_process:
        randlora.save(plain, Path(folder) / "adapter")
    accelerator.wait_for_everyone()
    accelerator.save_model(model, str(Path(folder) / "whole"))
    return type(model).__name__, values, adapter_values(trained_alone()), is_whole


def test_an_accelerator_trains_saves_and_resumes_an_adapter(pair: Processes, tmp_path: Path) -> None:
    (kind, first, alone, is_whole), (_, second, *_) = pair.run(train_as_launched, str(tmp_path))
    assert kind == DistributedDataParallel.__name__
    assert is_whole
    assert all_bits(first) == all_bits(second)
    for name, value in first.items():
        torch.testing.assert_close(value, alone[name], rtol=0, atol=1e-6)
    loaded = nn.Sequential(nn.Linear(INPUTS, 12), nn.Tanh(), nn.Linear(12, INPUTS))
    randlora.load(loaded, tmp_path / "adapter")
    assert all_bits(adapter_values(loaded)) == all_bits(first)

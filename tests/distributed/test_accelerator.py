"""`accelerate.Accelerator` on two processes: the same training as without it, resumed with the same bits."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import randlora
from tests.distributed.launched import launched
from tests.distributed.processes import Processes
from tests.distributed.trained import distance
from tests.kit import adapter_values, all_bits, fill

INPUTS, STEPS = 8, 3


def built() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, 12), nn.Tanh(), nn.Linear(12, INPUTS))
    randlora.inject(model, r=3, targets="all-linear", stream="portable")
    return fill(model)


def batches() -> torch.Tensor:
    return torch.randn(STEPS, 4, INPUTS, generator=torch.Generator().manual_seed(1))


def take_steps(model: nn.Module, optimizer: Any, backward: Any, rows: Any) -> None:
    for batch in rows:
        backward(model(batch).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def train(folder: Path) -> tuple[str, dict[str, Any], bool]:
    """Train, save the state, train on, go back, and save; return the class of the model and its values."""
    with launched("ddp"):
        from accelerate import Accelerator  # type: ignore[import-untyped]

        accelerator = Accelerator(cpu=True)
        model = built()
        optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=1e-3)
        model, optimizer = accelerator.prepare(model, optimizer)
        plain = accelerator.unwrap_model(model)
        own = [batch.chunk(accelerator.num_processes)[accelerator.process_index] for batch in batches()]
        take_steps(model, optimizer, accelerator.backward, own[:1])
        accelerator.save_state(str(folder))
        take_steps(model, optimizer, accelerator.backward, own[1:])
        values = {name: value.detach().clone() for name, value in adapter_values(plain).items()}
        trained = {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
        is_whole = trained <= accelerator.get_state_dict(model).keys()
        accelerator.load_state(str(folder))
        take_steps(model, optimizer, accelerator.backward, own[1:])
        assert all_bits(adapter_values(plain)) == all_bits(values)  # resumed to the same bits
        if accelerator.is_main_process:
            randlora.save(plain, folder / "adapter")
        accelerator.wait_for_everyone()
        accelerator.save_model(model, str(folder / "whole"))
        return type(model).__name__, values, is_whole


def test_an_accelerator_trains_saves_and_resumes_an_adapter(pair: Processes, tmp_path: Path) -> None:
    (kind, first, is_whole), (_, second, _) = pair.run(train, tmp_path)
    assert kind == DistributedDataParallel.__name__
    assert is_whole
    assert all_bits(first) == all_bits(second)
    alone = built()
    take_steps(alone, torch.optim.SGD(randlora.trainable_parameters(alone), lr=1e-3), torch.Tensor.backward, batches())
    assert distance(first, adapter_values(alone)) <= 1e-6
    loaded = nn.Sequential(nn.Linear(INPUTS, 12), nn.Tanh(), nn.Linear(12, INPUTS))
    randlora.load(loaded, tmp_path / "adapter")
    assert all_bits(adapter_values(loaded)) == all_bits(first)

"""Modules adapted in place under `fully_shard` and distributed checkpoints: one process of a group of its own."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.torch_version import TorchVersion

import randlora
from tests.distributed.processes import Processes
from tests.kit import fill
from tests.laws import TOKENS, Mixed

pytestmark = [
    pytest.mark.medium,
    pytest.mark.skipif(
        TorchVersion(torch.__version__) < "2.7", reason="torch 2.6 computes with sharded parameters on a GPU alone"
    ),
]


@pytest.fixture(scope="module")
def alone() -> Iterator[Processes]:
    """A process that is all of a group."""
    processes = Processes(1)
    yield processes
    processes.stop()


def adapt(model: nn.Module) -> nn.Module:
    randlora.inject(model, r=3, targets=["q", "up", "down"], stream="portable")
    return model


def shard(model: nn.Module, *layers: str) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for layer in layers:
        fully_shard(model.get_submodule(layer), mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Set Λ and Γ as after some training, and train on; return the loss and all parameters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "randlora" in name:
                local: Tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                local.copy_(torch.randn(parameter.shape, generator=generator) * 0.05 + 0.02)
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=0.1)
    loss = model(TOKENS).sum()
    loss.backward()
    optimizer.step()
    return loss.detach(), {name: full(value.detach()).clone() for name, value in model.named_parameters()}


ORDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "before": lambda model: adapt(shard(model)),
    "layer-before": lambda model: adapt(shard(model, "up")),
    "after": lambda model: shard(adapt(model)),
    "layer-after": lambda model: shard(adapt(model), "up"),
}


def saved_and_trained(order: str, directory: Path) -> None:
    torch.manual_seed(0)
    base = Mixed()
    plain = {name for name, _ in base.named_parameters()}
    model = ORDERS[order](copy.deepcopy(base))
    loss, after = step(model)
    expected_loss, expected = step(adapt(copy.deepcopy(base)))
    assert torch.equal(full(loss), expected_loss)
    assert after.keys() == expected.keys()
    assert [name for name in after if not torch.equal(after[name], expected[name])] == []
    state: dict[str, Any] = get_model_state_dict(model)
    assert set(state) == set(expected)
    assert {name for name in state if "randlora" not in name} == plain
    save(state, checkpoint_id=directory)
    other = adapt(Mixed())
    loaded: dict[str, Any] = get_model_state_dict(other)
    load(loaded, checkpoint_id=directory)
    set_model_state_dict(other, loaded)
    assert torch.equal(full(model(TOKENS)), other(TOKENS))
    if order == "layer-after":
        with pytest.raises(randlora.errors.AdapterError, match="up changed its class to FSDPAdaptedLinear"):
            randlora.eject(model)
        return
    randlora.eject(model)
    assert {name for name, _ in model.named_parameters()} == plain
    assert torch.equal(full(model(TOKENS)), base(TOKENS))


@pytest.mark.parametrize("order", ORDERS)
def test_a_sharded_model_is_saved_and_trained_as_the_whole_one_and_ejected(
    order: str, tmp_path: Path, alone: Processes
) -> None:
    alone.run(saved_and_trained, order, tmp_path)


def routed() -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8))
    for name in "ab":
        randlora.inject(model, r=4, name=name)
        fill(model, name)
    shard(model, "0", "1")
    x = torch.randn(2, 16)
    with torch.no_grad():
        with randlora.serving.routed(model, ["a", "b"]):
            before = model(x)
            sharded: dict[str, Any] = dict(model.named_parameters())
            for name, value in sharded.items():
                if name.endswith("lambda.b"):
                    value.to_local().mul_(-3)
            after = model(x)
        randlora.activate(model, "b")
        torch.testing.assert_close(after[1], model(x)[1])
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_routed_sees_that_sharded_values_change(alone: Processes) -> None:
    alone.run(routed)

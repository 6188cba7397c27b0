"""Modules adapted in place under `fully_shard` and distributed checkpoints: one process of a group of its own."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from tests.distributed.processes import Processes

pytestmark = pytest.mark.medium

PREAMBLE = """
import copy, os, sys, torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
import randlora
from tests.kit import fill
from tests.laws import Mixed, TOKENS
from tests.in_place_models import Reading, TableReader, Tables, TurnedReader

mesh = init_device_mesh("cpu", (1,))
for reader in (TableReader, TurnedReader):
    randlora.layers.register_layer(Tables)(reader)

class Whole(nn.Module):
    "Layers of several shapes, and weights that are read."
    def __init__(self):
        super().__init__()
        self.mixed, self.reading = Mixed(), Reading()
    def forward(self, tokens):
        return self.mixed(tokens).sum() + self.reading(self.mixed.embed(tokens)).sum()

TARGETS = ["mixed.q", "mixed.up", "mixed.down", "reading.read", "reading.called", "reading.linear"]
def adapt(model):
    randlora.inject(model, r=3, targets=TARGETS, stream="portable")
    return model
def values(model):
    # Λ and Γ as after some training, set through the state dict, which knows how they are sharded
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "randlora" in name:
                value = torch.randn(parameter.shape, generator=generator) * 0.05 + 0.02
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                local.copy_(value)
    return model
def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
def step(model):
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=0.1)
    loss = model(TOKENS)
    loss.backward()
    optimizer.step()
    return loss.detach(), {name: full(p.detach()).clone() for name, p in model.named_parameters()}
def assert_same_step(model, base):
    loss, after = step(model)
    expected_loss, expected = step(values(adapt(copy.deepcopy(base))))
    assert torch.equal(full(loss), expected_loss), (loss, expected_loss)
    assert after.keys() == expected.keys(), after.keys() ^ expected.keys()
    changed = [name for name in after if not torch.equal(after[name], expected[name])]
    assert not changed, changed
    moved = [name for name in after if "randlora" in name and torch.equal(after[name], dict(START)[name])]
    assert not moved, moved
def names(model):
    return {name for name, _ in model.named_parameters()}
base = Whole()
plain = names(base)
START = {name: p.detach().clone() for name, p in values(adapt(copy.deepcopy(base))).named_parameters()}
model = copy.deepcopy(base)
"""
SHARDED_BEFORE = "fully_shard(model, mesh=mesh); adapt(model); values(model)"
LAYER_BEFORE = "fully_shard(model.mixed.up, mesh=mesh); fully_shard(model, mesh=mesh); adapt(model); values(model)"
SHARDED_AFTER = "adapt(model); values(model); fully_shard(model, mesh=mesh)"
LAYER_AFTER = (
    "adapt(model); values(model); fully_shard(model.mixed.up, mesh=mesh); fully_shard(model.reading.called, mesh=mesh);"
    "fully_shard(model, mesh=mesh)"
)
every_order = pytest.mark.parametrize(
    "order",
    [SHARDED_BEFORE, LAYER_BEFORE, SHARDED_AFTER, LAYER_AFTER],
    ids=["before", "layer-before", "after", "layer-after"],
)


shards_on_a_cpu = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.7", reason="torch 2.6 computes with sharded parameters on a GPU alone"
)


def execute(script: str, directory: Path) -> None:
    """Run a script, to which a directory is given as the argument of a command line."""
    sys.argv = ["script", str(directory)]
    exec(compile(f"{PREAMBLE}\n{script}", "<script>", "exec"), {"__name__": "script"})


@pytest.fixture(scope="module")
def alone() -> Iterator[Processes]:
    """A process that is all of a group."""
    processes = Processes(1)
    yield processes
    processes.stop()


@shards_on_a_cpu
@every_order
def test_a_sharded_model_is_saved_and_trained_as_the_whole_one(order: str, tmp_path: Path, alone: Processes) -> None:
    script = f"""
{order}
assert_same_step(model, base)
state = get_model_state_dict(model)
assert set(state) == set(START), set(state) ^ set(START)
assert {{name for name in state if "randlora" not in name}} == plain
dcp.save(state, checkpoint_id=sys.argv[1] + "/dcp")
written = dcp.FileSystemReader(sys.argv[1] + "/dcp").read_metadata().state_dict_metadata
assert set(written) == set(START), set(written) ^ set(START)
other = adapt(Whole())
state = get_model_state_dict(other)
dcp.load(state, checkpoint_id=sys.argv[1] + "/dcp")
set_model_state_dict(other, state)
assert torch.equal(full(model(TOKENS)), other(TOKENS))
"""
    alone.run(execute, script, tmp_path)


def test_a_layer_sharded_after_it_was_adapted_stops_eject(tmp_path: Path, alone: Processes) -> None:
    script = f"""
{LAYER_AFTER}
classes = {{name: type(module) for name, module in model.named_modules()}}
try:
    randlora.eject(model)
except randlora.errors.AdapterError as error:
    assert "mixed.up changed its class to FSDPAdaptedLinear after it was adapted" in str(error), error
else:
    raise AssertionError("eject went on")
assert {{name: type(module) for name, module in model.named_modules()}} == classes
assert names(model) == set(START)
"""
    alone.run(execute, script, tmp_path)


@shards_on_a_cpu
def test_a_model_sharded_before_it_was_adapted_is_ejected(tmp_path: Path, alone: Processes) -> None:
    script = f"""
{LAYER_BEFORE}
randlora.eject(model)
assert type(model.mixed.up).__name__ == "FSDPLinear", type(model.mixed.up)
assert names(model) == plain
assert torch.equal(full(model(TOKENS)), base(TOKENS))
"""
    alone.run(execute, script, tmp_path)


@shards_on_a_cpu
def test_routed_sees_that_sharded_values_change(tmp_path: Path, alone: Processes) -> None:
    script = """
model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8))
for name in "ab":
    randlora.inject(model, r=4, name=name)
    fill(model, name)
for layer in model:
    fully_shard(layer, mesh=mesh, reshard_after_forward=True)
x = torch.randn(2, 16)
with torch.no_grad():
    with randlora.serving.routed(model, ["a", "b"]):
        assert not model.randlora_state.run.keeps  # what gathers Λ and Γ may hide from torch that they change
        before = model(x)
        for name, parameter in model.named_parameters():
            if name.endswith("lambda.b"):
                parameter.to_local().mul_(-3)
        after = model(x)
    randlora.activate(model, "b")
    torch.testing.assert_close(after[1], model(x)[1])
assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
"""
    alone.run(execute, script, tmp_path)

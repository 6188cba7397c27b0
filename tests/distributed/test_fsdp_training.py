"""Drawn models under `fully_shard` train, in two processes with half a batch each, as in one process with all of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import randlora
from randlora.errors import AdapterError
from tests.distributed.processes import LAW, Processes
from tests.distributed.test_fsdp_at_rest import Two, full, shards
from tests.kit import Model, fill

TOKENS = torch.arange(16) % 11


@dataclass(frozen=True)
class Case:
    """A drawn model, its adapter, and how it is sharded and trained."""

    basis: Any = "dense"
    r: int = 3
    train_also: tuple[str, ...] = ()
    is_sharded_first: bool = False
    backwards: int = 1
    dtype: torch.dtype = torch.float32
    replicas: int = 1

    def base(self) -> Two:
        torch.manual_seed(0)
        return Two().to(self.dtype)

    def adapt(self, model: Two, name: str = "default") -> Two:
        also = list(self.train_also) or None
        targets = ["q", "up", "down", "embed"]
        randlora.inject(model, r=self.r, basis=self.basis, targets=targets, train_also=also, name=name)
        return filled(model, name)

    def shard(self, model: Two, **options: Any) -> Two:
        if self.replicas > 1:
            shape = self.replicas, dist.get_world_size() // self.replicas
            options["mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        fully_shard(model.first, **options)
        fully_shard(model, **options)
        return model

    def sharded(self) -> Two:
        model = self.base()
        return self.adapt(self.shard(model)) if self.is_sharded_first else self.shard(self.adapt(model))


def filled(model: Model, name: str) -> Model:
    """Give Λ and Γ the same values as of one process."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for fqn, parameter in model.named_parameters():
            if "randlora" in fqn and fqn.endswith(f".{name}"):
                value = (torch.randn(parameter.shape, generator=generator) * 0.05).to(parameter.dtype)
                if isinstance(parameter, DTensor):
                    value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
                parameter.copy_(value)
    return model


def train(model: nn.Module, tokens: Tensor, backwards: int = 1, steps: int = 3, lr: float = 0.02) -> None:
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=lr)
    for _ in range(steps):
        for part in tokens.view(backwards, -1):
            (model(part).pow(2).mean() / backwards).backward()
        optimizer.step()
        optimizer.zero_grad()


def share_of(tokens: Tensor, backwards: int) -> Tensor:
    """Return the part of every batch that this process has."""
    return tokens.view(backwards, dist.get_world_size(), -1)[:, dist.get_rank()].flatten()


def values(model: nn.Module) -> dict[str, Tensor]:
    shards_of_root = shards(model)  # which has the model hold its shards
    assert shards_of_root
    return {
        name: full(parameter) if isinstance(parameter, DTensor) else parameter.detach()
        for name, parameter in model.named_parameters()
    }


def assert_as_one_process(case: Case) -> None:
    one = case.adapt(case.base())
    before = {name: parameter.detach().clone() for name, parameter in one.named_parameters()}
    train(one, TOKENS, case.backwards)
    model = case.sharded()
    train(model, share_of(TOKENS, case.backwards), case.backwards)
    found = values(model)
    moved = 0.0
    for name, expected in one.named_parameters():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6, msg=f"{name} of {case}")
        moved = max(moved, (expected - before[name]).abs().max().item())
    assert moved > 1e-4, "nothing was trained"
    own = torch.cat([value.flatten() for name, value in sorted(found.items()) if "randlora" in name])
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    assert all(torch.equal(each, own) for each in everyone), "the processes have other values"


cases = st.builds(
    Case,
    basis=st.sampled_from(["dense", "block", "sparse"]),
    r=st.integers(1, 5),
    train_also=st.sampled_from([(), ("norm",), ("head",)]),
    is_sharded_first=st.booleans(),
    backwards=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
).filter(lambda case: case.is_sharded_first or case.dtype == torch.float32)  # what FSDP2 trains has one dtype


@LAW
@given(case=cases)
def test_a_sharded_model_trains_as_in_one_process(pair: Processes, case: Case) -> None:
    pair.run(assert_as_one_process, case)


@pytest.mark.parametrize("is_sharded_first", [False, True])
def test_replicas_of_shards_train_as_in_one_process(four: Processes, is_sharded_first: bool) -> None:
    case = Case(is_sharded_first=is_sharded_first, train_also=("norm",), replicas=2)
    four.run(assert_as_one_process, case)
    four.run(merge_replicas, case)


def merge_replicas(case: Case) -> None:
    one, model = case.adapt(case.base()), case.sharded()
    before = shards(model)
    with randlora.merged(model), randlora.merged(one):
        found = values(model)
        for name, value in one.named_parameters():  # a part of a product may round otherwise than all of it
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)
    assert all(torch.equal(value, before[name]) for name, value in shards(model).items())


def two_adapters(case: Case) -> None:
    """A second adapter, added to a sharded model, trains as in one process."""
    one, model = case.adapt(case.adapt(case.base()), "second"), case.adapt(case.sharded(), "second")
    for each in (one, model):
        randlora.activate(each, "second")
        randlora.set_trainable(each, "second")
    train(one, TOKENS)
    train(model, share_of(TOKENS, 1))
    found = values(model)
    for name, expected in one.named_parameters():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6, msg=name)
    randlora.remove(model, "second")
    assert randlora.eject(model)
    assert all(torch.equal(value, dict(case.base().named_parameters())[name]) for name, value in values(model).items())


@pytest.mark.parametrize("is_sharded_first", [False, True])
def test_a_second_adapter_of_a_sharded_model(pair: Processes, is_sharded_first: bool) -> None:
    pair.run(two_adapters, Case(is_sharded_first=is_sharded_first))


def exchange(model: nn.Module) -> None:
    """Put other Parameter objects in the places of Λ and Γ."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if isinstance(module, nn.ParameterDict) and parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().clone())


def replace_parameters() -> None:
    """Other Parameter objects, as ``to_empty`` of a model on the meta device makes them, are averaged too."""
    case = Case(is_sharded_first=True)
    one, model = case.adapt(case.base()), case.sharded()
    exchange(model)
    train(one, TOKENS)
    train(model, share_of(TOKENS, 1))
    for name, expected in one.named_parameters():
        torch.testing.assert_close(values(model)[name], expected, rtol=0, atol=1e-6, msg=name)


def test_parameters_that_replace_others_are_averaged(pair: Processes) -> None:
    pair.run(replace_parameters)


def switch_trained(case: Case) -> None:
    """Parameters of ``train_also`` are exchanged by values."""
    one, model = case.adapt(case.base()), case.sharded()
    train(one, TOKENS)
    train(model, share_of(TOKENS, 1))
    equal = partial(torch.testing.assert_close, rtol=0, atol=1e-6)
    for _ in range(2):
        equal(model(TOKENS), one(TOKENS))
        with randlora.disabled(model), randlora.disabled(one):
            equal(model(TOKENS), one(TOKENS))
            assert torch.equal(values(model)["first.norm.weight"], torch.ones(12, dtype=case.dtype))
    with pytest.raises(AdapterError, match="which is sharded, so only one adapter can train it"):
        randlora.inject(model, r=2, targets=["q"], train_also=["norm"], name="second")
    randlora.inject(model, r=2, targets=["q"], name="second", active=True)
    randlora.inject(one, r=2, targets=["q"], name="second", active=True)
    equal(model(TOKENS), one(TOKENS))
    for each in (one, model):
        randlora.activate(each, "default")
    equal(model(TOKENS), one(TOKENS))
    train(one, TOKENS)
    train(model, share_of(TOKENS, 1))
    for name, expected in one.named_parameters():
        equal(values(model)[name], expected, msg=name)
    randlora.eject(model)
    base = dict(case.base().named_parameters())
    assert all(torch.equal(value, base[name]) for name, value in values(model).items())


@pytest.mark.parametrize("is_sharded_first", [False, True])
def test_trained_parameters_are_switched_by_values(pair: Processes, is_sharded_first: bool) -> None:
    pair.run(switch_trained, Case(is_sharded_first=is_sharded_first, train_also=("norm", "head")))


def merge_and_train_on(case: Case) -> None:
    one, model = case.adapt(case.base()), case.sharded()
    randlora.merge(one)
    randlora.merge(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    for each, tokens in ((one, TOKENS), (model, share_of(TOKENS, 1))):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.01)
        for _ in range(2):
            each(tokens).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    found = values(model)
    assert found.keys() == dict(one.named_parameters()).keys()
    for name, expected in one.named_parameters():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("is_sharded_first", [False, True])
def test_a_model_that_was_merged_trains_on(pair: Processes, is_sharded_first: bool) -> None:
    pair.run(merge_and_train_on, Case(is_sharded_first=is_sharded_first, train_also=("norm",)))


def in_bfloat16() -> None:
    """Λ and Γ stay float32 where `fully_shard` computes in bfloat16."""
    case = Case(is_sharded_first=True)
    model = case.base()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    case.adapt(case.shard(model, mp_policy=policy))
    one = fill(case.adapt(case.base()), spread=0.0)
    train(model, share_of(TOKENS, 1))
    train(one, TOKENS)
    for name, expected in one.named_parameters():
        assert values(model)[name].dtype == expected.dtype
        torch.testing.assert_close(values(model)[name], expected, rtol=0, atol=2e-2, msg=name)


def test_a_mixed_precision_policy(pair: Processes) -> None:
    pair.run(in_bfloat16)

"""Drawn models under `fully_shard` train, in two processes with half a batch each, as in one process with all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import randlora
from randlora.errors import AdapterError
from tests.distributed.processes import LAW, Processes
from tests.distributed.test_fsdp_at_rest import Two, full, shards
from tests.distributed.trained import distance, require_equal_on_ranks
from tests.kit import Model

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
    is_offloaded: bool = False
    is_averaged_last: bool = False

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
        if self.is_offloaded:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        fully_shard(model.first, **options)
        fully_shard(model, **options)
        return model

    def models(self) -> tuple[Two, Two]:
        """Return an adapted model and the same, sharded."""
        one, model = self.adapt(self.base()), self.base()
        return one, self.adapt(self.shard(model)) if self.is_sharded_first else self.shard(self.adapt(model))


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


def train(model: nn.Module, tokens: Tensor, backwards: int = 1, lr: float = 0.02, averaged_last: Any = None) -> None:
    """Take steps of some backwards each, only the last of which averages over processes in a model given for that."""
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=lr)
    for _ in range(3):
        for index, part in enumerate(tokens.view(backwards, -1), 1):
            if averaged_last is not None:
                averaged_last.set_requires_gradient_sync(index == backwards)
            (model(part).pow(2).mean() / backwards).backward()
        optimizer.step()
        optimizer.zero_grad()


def share_of(tokens: Tensor, backwards: int = 1) -> Tensor:
    """Return the part of every batch that this process has."""
    return tokens.view(backwards, dist.get_world_size(), -1)[:, dist.get_rank()].flatten()


def values(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole values of a model, which holds its shards then."""
    assert shards(model)
    return {
        name: full(parameter) if isinstance(parameter, DTensor) else parameter.detach()
        for name, parameter in model.named_parameters()
    }


def require_alike(one: nn.Module, model: nn.Module, within: float = 1e-6) -> dict[str, Tensor]:
    """Return the values of a model, which are those of one process."""
    found = values(model)
    apart = distance(found, dict(one.named_parameters()))
    assert apart <= within, apart
    return found


def train_alike(one: nn.Module, model: nn.Module, case: Case | None = None, within: float = 1e-6) -> dict[str, Tensor]:
    """Train both and return the values of the second, which are those of the first."""
    case = case or Case()
    shards(model)  # or the outermost module may hold whole parameters, after a forward without a backward
    train(one, TOKENS, case.backwards)
    own = share_of(TOKENS, case.backwards)
    train(model, own, case.backwards, averaged_last=model if case.is_averaged_last else None)
    return require_alike(one, model, within)


def outputs_alike(one: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():  # after which the root holds whole parameters, which the next forward forgets
        torch.testing.assert_close(model(TOKENS), one(TOKENS))


def train_and_merge(case: Case) -> None:
    one, model = case.models()
    found = train_alike(one, model, case)
    assert distance(found, dict(case.adapt(case.base()).named_parameters())) > 1e-4, "nothing was trained"
    require_equal_on_ranks({name: value for name, value in found.items() if "randlora" in name})
    before = shards(model)
    torch.testing.assert_close(randlora.delta_weight(model, "first.up"), randlora.delta_weight(one, "first.up"))
    outputs_alike(one, model)
    with randlora.merged(model), randlora.merged(one):
        outputs_alike(one, model)
        require_alike(one, model)
    assert all(torch.equal(value, before[name]) for name, value in shards(model).items())


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
@example(Case(is_offloaded=True, train_also=("norm",)))
@example(Case(is_offloaded=True, train_also=("norm",), is_sharded_first=True))
@example(Case(is_averaged_last=True, backwards=2))
@example(Case(is_averaged_last=True, backwards=2, is_sharded_first=True))
def test_a_sharded_model_trains_and_merges_as_in_one_process(pair: Processes, case: Case) -> None:
    pair.run(train_and_merge, case)


@pytest.mark.parametrize("is_sharded_first", [False, True])
def test_replicas_of_shards_train_and_merge_as_in_one_process(four: Processes, is_sharded_first: bool) -> None:
    four.run(train_and_merge, Case(is_sharded_first=is_sharded_first, train_also=("norm",), replicas=2))


def accumulate() -> None:
    """One process that accumulates what the others compute does the same operations: not one bit is another.

    Compared with all of a batch in one backward, what differs in the last bits of the gradients grows in training: with
    lr=0.5 it is 8.9e-8 after one step and 9.8e-6 after two, and 3.6e-5 if one process starts with values one bit off.
    """
    for case in (Case(), Case(is_sharded_first=True)):
        one, model = case.models()
        train(one, TOKENS, dist.get_world_size(), lr=0.5)
        train(model, share_of(TOKENS), lr=0.5)
        require_alike(one, model, within=0)


def train_a_second(case: Case) -> None:
    one, model = case.models()
    for each in (one, model):
        case.adapt(each, "second")
        randlora.activate(each, "second")
        randlora.set_trainable(each, "second")
    train_alike(one, model)
    randlora.remove(model, "second")
    assert randlora.eject(model)
    require_alike(case.base(), model, within=0)


def switch_by_values(case: Case) -> None:
    """Parameters of ``train_also`` are exchanged by values."""
    one, model = case.models()
    train_alike(one, model)
    for _ in range(2):
        outputs_alike(one, model)
        with randlora.disabled(model), randlora.disabled(one):
            outputs_alike(one, model)
            assert torch.equal(values(model)["first.norm.weight"], torch.ones(12))
    with pytest.raises(AdapterError, match="which is sharded, so only one adapter can train it"):
        randlora.inject(model, r=2, targets=["q"], train_also=["norm"], name="second")
    for each in (one, model):
        randlora.inject(each, r=2, targets=["q"], name="second", active=True)
    outputs_alike(one, model)
    for each in (one, model):
        randlora.activate(each, "default")
    outputs_alike(one, model)
    train_alike(one, model)
    randlora.eject(model)
    require_alike(case.base(), model, within=0)


def replace_parameters() -> None:
    """Other Parameter objects, such as ``to_empty`` makes, are averaged, also if only a part of the model is called."""
    for part in ("", "first"):
        one, model = Case(is_sharded_first=True).models()
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if isinstance(module, nn.ParameterDict) and parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.detach().clone())
        train_alike(one.get_submodule(part), model.get_submodule(part))


def compute_in_bfloat16() -> None:
    """Λ and Γ stay float32 where `fully_shard` computes in bfloat16."""
    case = Case(is_sharded_first=True)
    model = case.adapt(case.shard(case.base(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)))
    one = case.adapt(case.base())
    found = train_alike(one, model, within=2e-2)
    assert {value.dtype for value in found.values()} == {torch.float32}


@pytest.mark.parametrize("check", [accumulate, replace_parameters, compute_in_bfloat16])
def test_sharded_models_train_in_other_ways(pair: Processes, check: Callable[[], None]) -> None:
    pair.run(check)


@pytest.mark.parametrize("is_sharded_first", [False, True])
@pytest.mark.parametrize(("use", "also"), [(train_a_second, ()), (switch_by_values, ("norm", "head"))])
def test_a_second_adapter_of_a_sharded_model(
    pair: Processes, use: Callable[[Case], None], also: tuple[str, ...], is_sharded_first: bool
) -> None:
    pair.run(use, Case(is_sharded_first=is_sharded_first, train_also=also))


def use_after(end: Callable[[nn.Module], Any], case: Case, place: Path) -> None:
    """End the adapter, then compute, train, load, adapt again and save, as in one process."""
    one, model = case.models()
    for each in (one, model):
        end(each)
    assert list(model.state_dict()) == list(one.state_dict())
    assert all(isinstance(value, DTensor) for value in model.state_dict().values())
    outputs_alike(one, model)
    require_alike(one, model)
    whole = StateDictOptions(full_state_dict=True)
    assert list(get_model_state_dict(model, options=whole)) == list(one.state_dict())
    set_model_state_dict(model, one.state_dict(), options=whole)
    assert all(parameter.requires_grad for parameter in model.parameters())
    train_alike(one, model)
    plain = {name: value.clone() for name, value in one.state_dict().items()}
    for each in (one, model):
        case.adapt(each)
    train_alike(one, model)
    randlora.save(model, place)
    dist.barrier()
    loaded, other = case.base(), case.shard(case.base())
    loaded.load_state_dict(plain)
    set_model_state_dict(other, plain, options=whole)
    for each in (loaded, other):
        randlora.load(each, place, trainable=True)
    require_alike(loaded, model, within=1e-6)
    require_alike(loaded, other, within=0)
    train_alike(loaded, other)


@pytest.mark.parametrize(("end", "is_sharded_first"), [(randlora.eject, False), (randlora.merge, True)])
def test_what_had_an_adapter_is_used_and_adapted_again(
    pair: Processes, tmp_path: Path, end: Callable[[nn.Module], Any], is_sharded_first: bool
) -> None:
    case = Case(is_sharded_first=is_sharded_first, train_also=("norm",))
    pair.run(use_after, end, case, tmp_path / "adapter")

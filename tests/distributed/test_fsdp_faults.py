"""What would let processes differ under `fully_shard` is an error, and what fails in one process is raised in all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import randlora
from randlora.errors import AdapterError, MergeError
from randlora.layers.base import AdapterLayer
from randlora.model import merge
from tests.distributed.processes import Processes
from tests.distributed.test_fsdp_at_rest import shards
from tests.distributed.trained import require_equal_on_ranks
from tests.kit import fill


class Experts(nn.Module):
    """Layers of equal shapes, of which a call uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        output: Tensor = self.experts[expert](x)
        return output


def train_another_expert_in_each() -> None:
    """The average counts a process without a gradient as zero; what no process uses has none. One collective each."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = Experts()
    one = copy.deepcopy(model)
    fully_shard(model)
    for each in (model, one):
        randlora.inject(each, r=2, targets=r"experts\.\d")
    x = torch.randn(ranks, 2, 8)
    for expert, of_one in ((1, (1,) * ranks), (rank, range(ranks))):
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as collective:
            model(x[rank], expert).sum().backward()
        assert collective.call_count == 1
        sum(one(rows, own).sum() / ranks for rows, own in zip(x, of_one, strict=True)).backward()
    assert any(each.grad is None for each in randlora.trainable_parameters(one))
    for found, expected in zip(randlora.trainable_parameters(model), randlora.trainable_parameters(one), strict=True):
        assert (found.grad is None) == (expected.grad is None)
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad)


def fail_in_a_backward() -> None:
    """The gradients of the next backward are averaged all the same."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    fully_shard(model)
    randlora.inject(model, r=2)
    fill(model)
    x = torch.randn(2, 8) + dist.get_rank()
    handle = model[0].register_full_backward_hook(mock.Mock(side_effect=ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        model(x).sum().backward()
    handle.remove()
    model.zero_grad()
    model(x).sum().backward()
    gradients = [each.grad for each in randlora.trainable_parameters(model) if each.grad is not None]
    assert len(gradients) == 4
    require_equal_on_ranks({str(index): grad for index, grad in enumerate(gradients)})


def interrupt_merges() -> None:
    for reversible, last in ((False, "detach_all"), (True, "MergeReport")):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        fully_shard(model)
        randlora.inject(model, r=2)
        fill(model)
        x = torch.randn(2, 8)
        expected = model(x)
        with mock.patch.object(merge, last, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            randlora.merge(model, reversible=reversible)
        assert torch.equal(model(x), expected)
        with randlora.disabled(model):
            assert not torch.allclose(model(x), expected), "the adapter has an effect"


def train_a_copy_that_is_not_sharded() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8))
    fully_shard(model[0])
    with pytest.raises(AdapterError, match=r"cannot train copies of 2\.weight, 2\.bias: they are not sharded"):
        randlora.inject(model, r=2, targets=["0", "1"], train_also=["2"])
    assert type(model[1]) is nn.Linear
    randlora.inject(model, r=2, targets=["0", "1"])


def activate_a_copy_that_is_not_sharded() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8))
    fully_shard(model[0])
    randlora.inject(model, r=2, targets=["0", "1"], train_also=["2"], trainable=False)
    randlora.activate(model, "default")
    randlora.set_trainable(model, "default", trainable=False)
    with pytest.raises(AdapterError, match=r"cannot train copies of 2\.weight, 2\.bias: they are not sharded"):
        randlora.set_trainable(model, "default")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    randlora.inject(model, r=2, targets=["0", "1"], trainable=False, name="second")
    randlora.activate(model, "second")
    randlora.set_trainable(model, "second")


def inject_without_gathering() -> None:
    """Copies of sharded parameters are made of shards, also those of an adapter that is not active at first."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    fully_shard(model)
    with mock.patch.object(DTensor, "full_tensor", side_effect=AssertionError("gathers")):
        randlora.inject(model, r=2, targets=["0"])
        randlora.inject(model, r=2, targets=["0"], train_also=["1"], name="second", trainable=True)
        randlora.activate(model, "second")
    model(torch.randn(2, 8)).sum().backward()
    assert torch.equal(shards(model)["1.weight"], torch.ones(4))
    assert model.get_parameter("1.weight").grad is not None


def adapted() -> nn.Module:
    """Return a sharded model that has what a merge and `save` gather."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8))
    randlora.inject(model, r=2, targets=["0", "1"], train_also=["2"])
    fully_shard(fill(model))
    return model


@contextmanager
def failing_in_last(method: str, on: Any, call: int, error: BaseException) -> Iterator[None]:
    """Have one call of a method raise in the last process, once it has returned."""
    own, calls = getattr(on, method), count()

    def failing(*args: Any, **options: Any) -> Any:
        result = own(*args, **options)
        if next(calls) == call and dist.get_rank() == dist.get_world_size() - 1:
            raise error
        return result

    with mock.patch.object(on, method, failing):
        yield


def require_shards(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = shards(model)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def fail_between_gathers(place: Path) -> None:
    model = adapted()
    before = shards(model)
    verbs: list[Callable[[], object]] = [
        lambda: randlora.merge(model),
        lambda: randlora.merge(model, reversible=True),
        lambda: randlora.save(model, place),
        lambda: dict(randlora.merged_tensors(model)),
    ]
    for verb, call in product(verbs, (0, 1)):  # Λ and Γ of the first layer
        failing = failing_in_last("full_tensor", DTensor, call, MemoryError("no room"))
        with failing, pytest.raises(MemoryError, match="no room"):
            verb()
    require_shards(model, before)
    randlora.merge(model)


def fail_to_unmerge() -> None:
    model = adapted()
    before = shards(model)
    randlora.merge(model, reversible=True)
    failing = partial(failing_in_last, "unfold", AdapterLayer, 0)
    with failing(MemoryError("no room")), pytest.raises(MemoryError, match="no room"):
        randlora.unmerge(model)
    randlora.unmerge(model)
    with failing(MemoryError("no room")), pytest.raises(MemoryError, match="no room"), randlora.merged(model):
        pass
    with pytest.raises(MergeError, match="not merged"):
        randlora.unmerge(model)
    randlora.merge(model, reversible=True)
    is_last = dist.get_rank() == dist.get_world_size() - 1
    with failing(KeyboardInterrupt()), pytest.raises(KeyboardInterrupt) if is_last else nullcontext():
        randlora.unmerge(model)
    require_shards(model, before)
    randlora.merge(model)


def rename_what_is_sharded() -> None:
    """`fully_shard` knows Λ and Γ by name. Those that were added later are whole, and have another name."""
    model, x = adapted(), torch.randn(2, 8)
    randlora.inject(model, r=2, targets=["0"], name="whole", active=False)
    expected, before = model(x), shards(model)
    held = {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}
    infos = randlora.adapters(model)
    with pytest.raises(AdapterError, match="cannot rename 'default', 2 problems:") as caught:
        randlora.rename(model, "default", "new")
    for fqn in "01":
        assert f"Λ and Γ of {fqn} are sharded, and fully_shard knows them by name: rename before" in str(caught.value)
    assert randlora.adapters(model) == infos
    after = {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}
    assert list(after.items()) == list(held.items())
    require_shards(model, before)
    assert torch.equal(model(x), expected)
    randlora.rename(model, "whole", "new")
    assert [info.name for info in randlora.adapters(model)] == ["default", "new"]
    assert torch.equal(model(x), expected)


def raise_in_one_block() -> None:
    """An error of one process in a block of `merged` is raised at once, and not when others come to the end of it."""
    model = adapted()
    before = shards(model)
    if dist.get_rank() == 0:
        with suppress(ZeroDivisionError), randlora.merged(model):
            dist.recv(torch.zeros(1), 1)  # of what is sent after the other's block
            raise ZeroDivisionError
    else:
        with suppress(ZeroDivisionError), randlora.merged(model):
            raise ZeroDivisionError
        dist.send(torch.zeros(1), 0)
    require_shards(model, before)


@pytest.mark.parametrize(
    "check",
    [
        train_another_expert_in_each,
        fail_in_a_backward,
        interrupt_merges,
        train_a_copy_that_is_not_sharded,
        activate_a_copy_that_is_not_sharded,
        inject_without_gathering,
        rename_what_is_sharded,
        fail_to_unmerge,
        raise_in_one_block,
    ],
)
def test_processes_cannot_come_to_differ(pair: Processes, check: Callable[[], None]) -> None:
    pair.run(check, seconds=30)


def test_what_fails_in_one_process_between_two_gathers_is_raised_in_all(pair: Processes, tmp_path: Path) -> None:
    pair.run(fail_between_gathers, tmp_path / "adapter", seconds=30)
    assert not (tmp_path / "adapter").exists()

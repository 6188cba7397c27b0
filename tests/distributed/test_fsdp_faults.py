"""What would let processes differ under `fully_shard` is an error, and an interrupted merge leaves nothing behind."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import randlora
from randlora.errors import AdapterError
from randlora.model import merge
from tests.distributed.processes import Processes
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
    model = Experts()
    fully_shard(model)
    randlora.inject(model, r=2, targets=r"experts\.\d")
    model(torch.randn(2, 8), 1).sum().backward()
    with pytest.raises(AdapterError, match="gradients to different adapted layers in different processes"):
        model(torch.randn(2, 8), dist.get_rank()).sum().backward()


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
    with pytest.raises(AdapterError, match=r"cannot train copies of 2\.weight, 2\.bias, not sharded"):
        randlora.inject(model, r=2, targets=["0", "1"], train_also=["2"])
    assert type(model[1]) is nn.Linear
    randlora.inject(model, r=2, targets=["0", "1"])


def test_gradients_of_different_layers_are_not_mixed(pair: Processes) -> None:
    pair.run(train_another_expert_in_each)


def test_an_interrupted_merge_leaves_the_values_as_they_were(pair: Processes) -> None:
    pair.run(interrupt_merges)


def test_copies_that_nothing_would_average_are_refused(pair: Processes) -> None:
    pair.run(train_a_copy_that_is_not_sharded)

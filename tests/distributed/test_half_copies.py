"""Parameters of 16 bits whose copies are trained in float32, under engines that several processes share."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import randlora
from tests.checkpoint_files import read_tensors
from tests.distributed.processes import Processes
from tests.kit import on_one_line
from tests.laws import Mixed

TOKENS = torch.arange(8)
ALSO = ["head", "norm", "q.bias"]


def base() -> Mixed:
    torch.manual_seed(0)
    return Mixed(torch.float16)


def adapted() -> Mixed:
    model = base()
    randlora.inject(model, r=3, targets=["q", "down"], train_also=ALSO)
    return model


def sharded(model: nn.Module) -> nn.Module:
    fully_shard(model)
    return model


def sharded_by_module(model: Mixed) -> nn.Module:
    fully_shard(model.head)
    fully_shard(model)
    return model


def in_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def losses_of(model: nn.Module, tokens: Tensor) -> list[float]:
    """Train, and return the losses of all tokens."""
    optimizer, losses = torch.optim.AdamW(randlora.trainable_parameters(model), lr=1e-3), []
    for _ in range(8):
        loss = (model(tokens).float() - 1).square().mean() / 1e3
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach() * 1e3 / dist.get_world_size())
    total = torch.stack(losses)
    dist.all_reduce(total)
    return total.tolist()


def train_in_float16(wrap: Callable[[nn.Module], nn.Module], place: Path) -> None:
    own = base()(TOKENS)
    one, model = adapted(), adapted()
    wrapped = wrap(model)
    expected = losses_of(one, TOKENS)
    share = TOKENS.chunk(dist.get_world_size())[dist.get_rank()]
    assert losses_of(wrapped, share) == pytest.approx(expected, rel=5e-3)
    assert expected[-1] < expected[0]
    assert {each.dtype for each in randlora.trainable_parameters(model)} == {torch.float32}
    randlora.save(model, place)
    dist.barrier()
    assert {each.dtype for each in read_tensors(place)[0].values()} == {torch.float32}
    loaded = base()
    randlora.load(loaded, place)
    torch.testing.assert_close(model(TOKENS), loaded(TOKENS))
    entries = dict(randlora.merged_tensors(model))
    assert {each.dtype for each in entries.values()} == {torch.float16}
    with randlora.merged(loaded):
        again = base()
        again.load_state_dict(entries)
        torch.testing.assert_close(again(TOKENS), loaded(TOKENS))
    with randlora.disabled(model):
        torch.testing.assert_close(model(TOKENS), own)
    randlora.eject(model)
    torch.testing.assert_close(wrapped(TOKENS), own)
    if wrap is not in_ddp:  # whose reducer has what was trained
        randlora.inject(model, r=3, targets=["q"], train_also=ALSO)
        wrapped(TOKENS).float().mean().backward()
        assert {each.dtype for each in randlora.trainable_parameters(model)} == {torch.float32}


@pytest.mark.parametrize("wrap", [sharded, sharded_by_module, in_ddp])
def test_copies_in_float32_train_as_in_one_process(
    pair: Processes, wrap: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    pair.run(train_in_float16, wrap, tmp_path / "saved")


def inject_into_shards() -> str:
    model = sharded(base())
    report = randlora.inject(model, r=3, targets=["q", "down"], train_also=ALSO)
    model(TOKENS).float().mean().backward()
    own = model.get_parameter("head.weight")
    assert isinstance(own, DTensor)
    assert own.dtype == torch.float16
    return on_one_line(report)


def test_what_is_sharded_already_keeps_its_dtype_and_the_report_says_so(pair: Processes) -> None:
    assert ["are trained in torch.float16" in said for said in pair.run(inject_into_shards)] == [True, True]

"""Running statistics of a model that several processes train: those of the first are saved with the adapter."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import randlora
from tests.distributed.engines import engine_around
from tests.distributed.processes import For
from tests.kit import all_bits, bits

X = torch.linspace(-1, 1, 12).view(2, 6)


def build() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        last = nn.Sequential(OrderedDict(linear=nn.Linear(6, 6), norm=nn.BatchNorm1d(6)))
        return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), last).eval()


def inject(model: nn.Module) -> None:
    randlora.inject(model, r=2, targets=["0", "2"], train_also=["1"], stream="portable")


def shard(model: nn.Sequential) -> None:
    for part in (*model, model):
        fully_shard(part)


def train(model: nn.Module, run: Any) -> None:
    """Take steps of other data in each process."""
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=0.05)
    generator = torch.Generator().manual_seed(dist.get_rank())
    run.train()
    for _ in range(2):
        loss = run(torch.randn(8, 6, generator=generator) + 1).square().mean()
        if run is not model and hasattr(run, "backward"):
            run.backward(loss)
            run.step()
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    run.eval()


def saved(how: str, directory: Path) -> tuple[Tensor, Tensor, tuple[str, ...], dict[str, Any], dict[str, Any]]:
    """Return outputs of the model and of a loaded one, notes, and the buffers here and in what was loaded."""
    model = build()
    if how == "sharded-first":
        shard(model)
    inject(model)
    if how == "sharded-after":
        shard(model)
    run: Any = model
    if how == "ddp":
        run = DistributedDataParallel(model)
    elif how.startswith("zero"):
        run = engine_around(model, how.removeprefix("zero-"))
    train(model, run)
    if how in ("ddp", "zero-2"):  # each process holds all of the model, and statistics of its own
        directory /= str(dist.get_rank())
    notes = randlora.save(model, directory).notes
    dist.barrier()
    fresh = build()
    randlora.load(fresh, directory)
    own = {name: dict(model.named_buffers())[name] for name in randlora.adapters(model)[0].buffers}
    for name, buffer in fresh.named_buffers():  # of the norm that no adapter has a copy of
        if name not in own:
            buffer.copy_(dict(model.named_buffers())[name])
    theirs = {name: dict(fresh.named_buffers())[name] for name in own}
    with torch.no_grad():
        return run(X), fresh(X), notes, all_bits(own), all_bits(theirs)


@pytest.mark.parametrize("how", ["ddp", "sharded-first", "sharded-after", "zero-2", "zero-3"])
def test_an_adapter_has_the_statistics_of_the_first_process(how: str, processes_of: For, tmp_path: Path) -> None:
    (output, loaded, notes, own, theirs), _ = processes_of(how).run(saved, how, tmp_path)
    before = {name: bits(value) for name, value in build().named_buffers()}
    torch.testing.assert_close(output, loaded)
    assert own == theirs
    assert own.keys() == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert all(value != before[name] for name, value in own.items())
    (note,) = (note for note in notes if "moved since" in note)
    assert "3.norm.running_mean" in note
    assert "1.running_mean" not in note

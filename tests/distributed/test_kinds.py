"""Every kind of layer trains, is saved and merged under `fully_shard` and DeepSpeed's ZeRO-3 as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers.pytorch_utils import Conv1D

import randlora
from tests.distributed.engines import engine_around, whole_values
from tests.distributed.processes import For
from tests.distributed.test_fsdp_training import values
from tests.distributed.trained import distance, optimizer_of, values_of
from tests.kit import fill
from tests.read_kinds import READ_KINDS, ReadKind, output_of, weighted


def _conv1d() -> nn.Module:
    layer: nn.Module = Conv1D(20, 12)
    return layer


CONV1D = ReadKind("Conv1D", "linear", _conv1d, lambda: (torch.randn(5, 12),), options={"targets": ["0"]})
KINDS = {kind.name: kind for kind in (*READ_KINDS, CONV1D)}


class Run(nn.Module):
    """Runs the module of a kind, whose names it keeps, through a forward that an engine sees."""

    def __init__(self, kind: ReadKind) -> None:
        super().__init__()
        self.add_module("0", kind.model()[0])

    def forward(self, *args: Tensor) -> Tensor:
        """Return the output of the module."""
        return output_of(self.get_submodule("0")(*args))


def trained_values(model: nn.Module, engine: str) -> dict[str, Tensor]:
    if engine == "zero":
        return whole_values(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: value for name, value in values(model).items() if name in trained}


def train_save_and_merge(name: str, engine: str, directory: Path) -> None:
    kind = KINDS[name]
    one, model = Run(kind), Run(kind)
    if engine == "shard, inject":
        fully_shard(model)
    for each in (one, model):
        randlora.inject(each, **kind.adapter_options)
        fill(each)
    run: Any = model
    if engine == "inject, shard":
        fully_shard(model)
    elif engine == "zero":
        run = engine_around(model, "3-experts" if "experts" in name else "3")
    before, arguments = values_of(one), kind.arguments()
    factors = [1, 1] if engine == "zero" else [1, 2]  # another loss in each process
    optimizers = [optimizer_of(one)] if engine == "zero" else [optimizer_of(each, lr=1e-3) for each in (one, model)]
    for _ in range(2):
        loss = weighted(run(*arguments)) * factors[dist.get_rank()]
        if engine == "zero":
            run.backward(loss)
            run.step()
        else:
            loss.backward()
        (weighted(one(*arguments)) * sum(factors) / len(factors)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    found = trained_values(model, engine)
    assert distance(found, values_of(one)) <= 1e-6
    assert distance(found, before) > 1e-4
    randlora.save(model, directory)
    dist.barrier()
    loaded = Run(kind)
    randlora.load(loaded, directory, trainable=True)
    assert distance(found, values_of(loaded)) == 0
    torch.testing.assert_close(randlora.delta_weight(model, kind.target), randlora.delta_weight(loaded, kind.target))
    expected = loaded(*arguments)
    torch.testing.assert_close(run(*arguments), expected)
    with torch.no_grad(), randlora.merged(run), randlora.merged(loaded):
        torch.testing.assert_close(run(*arguments), loaded(*arguments))
    torch.testing.assert_close(run(*arguments), expected)
    randlora.eject(run)
    torch.testing.assert_close(run(*arguments), Run(kind)(*arguments))


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        ("inject, shard", "Conv1D"),
        ("shard, inject", "Conv2d-groups"),
        ("inject, shard", "ConvTranspose1d"),
        ("shard, inject", "Embedding-few-rows"),
        ("inject, shard", "attention-in_proj"),
        ("shard, inject", "attention-in_proj-split"),
        ("inject, shard", "attention-k_proj"),
        ("shard, inject", "attention-out_proj"),
        ("inject, shard", "experts-gate_up"),
        ("shard, inject", "experts-down-shared-batched"),
        ("zero", "Conv2d-stride"),
        ("zero", "Embedding"),
        ("zero", "attention-in_proj"),
        ("zero", "attention-out_proj"),
        ("zero", "experts-gate_up"),
    ],
)
def test_each_kind_trains_is_saved_and_merged(processes_of: For, tmp_path: Path, engine: str, name: str) -> None:
    processes_of(engine).run(train_save_and_merge, name, engine, tmp_path / "adapter")

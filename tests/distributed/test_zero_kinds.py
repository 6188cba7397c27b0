"""DeepSpeed's ZeRO-3 with weights that other code reads, which it must gather for whoever reads them."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import randlora
from tests.distributed.engines import engine_around, needs_deepspeed, whole_values
from tests.distributed.processes import Processes
from tests.distributed.trained import distance, optimizer_of, values_of
from tests.kit import all_bits
from tests.read_kinds import READ_KINDS, output_of, weighted

pytestmark = needs_deepspeed

NAMES = ["Conv2d-stride", "Embedding", "attention-in_proj", "attention-out_proj", "experts-gate_up"]
"""One of each group of kinds."""


def train_save_and_merge(name: str, directory: str) -> None:
    stage = "3-experts" if "experts" in name else "3"
    kind = next(each for each in READ_KINDS if each.name == name)
    engine = engine_around(Run(kind.adapted()), stage)
    model, twin = engine.module.model, kind.adapted()
    optimizer = optimizer_of(twin)
    for _ in range(2):
        loss = weighted(engine(*kind.arguments()))
        engine.backward(loss)
        engine.step()
        expected = weighted(kind.run(twin))
        torch.testing.assert_close(loss, expected)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
    assert distance(whole_values(model), values_of(twin)) <= 1e-6
    randlora.save(engine, directory)
    dist.barrier()
    loaded = kind.model()
    randlora.load(loaded, directory, trainable=True)
    assert distance(whole_values(model), values_of(loaded)) == 0
    assert all_bits({kind.target: randlora.delta_weight(model, kind.target)}) == all_bits({
        kind.target: randlora.delta_weight(loaded, kind.target)
    })
    with torch.no_grad(), randlora.merged(engine), randlora.merged(loaded):
        torch.testing.assert_close(engine(*kind.arguments()), kind.run(loaded))
    torch.testing.assert_close(engine(*kind.arguments()), kind.run(loaded))
    randlora.eject(engine)
    torch.testing.assert_close(engine(*kind.arguments()), kind.run(kind.model()))


class Run(nn.Module):
    """Runs the module of a kind through a module that an engine can call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor) -> Tensor:
        """Return the output of the module."""
        return output_of(self.model.get_submodule("0")(*args))


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_is_read_trains_and_is_saved_and_merged(zero_pair: Processes, tmp_path: Path, name: str) -> None:
    zero_pair.run(train_save_and_merge, name, str(tmp_path / "adapter"))

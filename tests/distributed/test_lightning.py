"""Lightning on two processes, with DDP and FSDP2: a resumed run has the bits of a whole one."""

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import randlora
from randlora.integrations.lightning import AdapterCallback
from tests.distributed.processes import Processes
from tests.lightning_modules import Module, fit


class Sharded(Module):
    """The module, sharded over the processes by FSDP2."""

    def configure_model(self) -> None:
        if not getattr(self, "is_sharded", False):
            self.is_sharded = True
            mesh: Any = self.device_mesh
            for module in (self.model[0], self.model, self.head):  # not `self`, whose forward is not called
                fully_shard(module, mesh=mesh["data_parallel"])


def run(kind: type[Module], out: Path, epochs: int, resume: Path | None = None) -> Module:
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy

    rank, count = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{count}", "GROUP_RANK": "0"}
    os.environ |= {"LOCAL_WORLD_SIZE": f"{count}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    os.environ["TORCHELASTIC_RUN_ID"] = "tests"
    strategy: Any = DDPStrategy(process_group_backend="gloo")
    if kind is Sharded:
        strategy = ModelParallelStrategy(count, 1, save_distributed_checkpoint=False)
    module = kind(norm=kind is Module)
    beside = AdapterCallback(adapter_directories=kind is Module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(
            module,
            out,
            epochs=epochs,
            resume=resume,
            batch=4,
            callback=beside,
            strategy=strategy,
            devices=count,
            plugins=[TorchElasticEnvironment()],
        )
    return module


def resumed_equals_whole(kind: type[Module], out: Path) -> tuple[list[float], list[float], list[str]]:
    """Return the last epoch's losses of a whole and of a resumed run, and the names of values in a checkpoint."""
    whole = run(kind, out / "whole", 2)
    run(kind, out / "part", 1)
    rest = run(kind, out / "part", 2, out / "part/epoch=0.ckpt")
    values = torch.load(out / "part/epoch=0.ckpt", weights_only=True)["state_dict"]
    return whole.losses[4:], rest.losses, sorted(values)


@pytest.mark.parametrize("kind", [Module, Sharded], ids=["ddp", "fsdp2"])
def test_a_resumed_run_on_two_processes_has_the_bits_of_a_whole_one(kind: type[Module], pair: Processes) -> None:
    out = Path(tempfile.mkdtemp())
    results = pair.run(resumed_equals_whole, kind, out)
    for whole, rest, _ in results:
        assert whole == rest
        assert len(set(whole)) == 4
    assert results[0][0] != results[1][0], "each process has other data"
    names = results[0][2]
    assert any("randlora_lambda" in name for name in names)
    assert "model.0.weight" not in names
    assert (out / "part/epoch=0.adapter").is_dir() is (kind is Module)
    if kind is Module:
        fresh = Module().model
        randlora.eject(fresh)
        randlora.load(fresh, out / "part/epoch=0.adapter")

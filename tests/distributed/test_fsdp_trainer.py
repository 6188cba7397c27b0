"""Trainers with FSDP's options: checkpoints of the adapter alone, a stock trainer's, and DPO's and GRPO's reference.

accelerate takes the FSDP plugin for DistributedDataParallel on a CPU. Here it is told that it has devices and that they
are the CPU, so that the models are sharded as on GPUs.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import randlora
from randlora.places import whole
from tests.distributed.processes import Processes
from tests.distributed.referring import compared
from tests.further import further
from tests.kit import Bits, bits


@contextmanager
def launched() -> Iterator[None]:
    """Have accelerate find what a launcher sets and devices that FSDP shards on, and forget that afterwards."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "HF_HUB_OFFLINE": "1"}
    found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    with mock.patch.dict(os.environ, found), warnings.catch_warnings(action="ignore"):
        from accelerate.state import AcceleratorState, PartialState  # type: ignore[import-untyped]
        from accelerate.utils import DistributedType  # type: ignore[import-untyped]

        def on_cpu(state: Any) -> None:
            state.device = torch.device("cpu")

        backend = mock.patch.object(PartialState, "_prepare_backend", return_value=("gloo", DistributedType.MULTI_GPU))
        try:
            with backend, mock.patch.object(PartialState, "set_device", on_cpu):
                yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def options(kind: str) -> dict[str, Any]:
    """Return the arguments of a trainer that shards by FSDP2 and saves state dicts of a kind."""
    config: dict[str, Any] = {"version": 2, "fsdp_version": 2, "state_dict_type": kind}
    config |= {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    config |= {"cpu_ram_efficient_loading": False, "sync_module_states": False}
    sharded = "full_shard auto_wrap"
    return {"fsdp": sharded, "fsdp_config": config, "use_cpu": False, "per_device_train_batch_size": 1}


def trainer(kind: Any, directory: Path, **given: Any) -> Any:
    from transformers import TrainingArguments

    from tests.trainers import adapted_model, arguments, rows

    model = adapted_model(train_also=["norm"], dropout=0.1)
    return kind(model, arguments(TrainingArguments, directory, **given), train_dataset=rows())


def whole_bits(model: Any) -> list[Bits]:
    return [bits(whole(parameter)) for parameter in randlora.trainable_parameters(model)]


def run(directory: Path, given: dict[str, Any]) -> tuple[list[Bits], list[Bits], str]:
    from randlora.integrations.transformers import AdapterTrainer
    from tests.trainers import plain_model, trained_bits

    with launched():
        through = trainer(AdapterTrainer, directory, **given)
        through.train()
        dist.barrier()
        rest = trainer(AdapterTrainer, directory, **given)
        rest.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
        loaded = plain_model()
        randlora.load(loaded, directory / "checkpoint-4", trainable=True)
        assert trained_bits(loaded) == whole_bits(through.model)
        return whole_bits(through.model), whole_bits(rest.model), type(through.model).__name__


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", further("SHARDED_STATE_DICT")])
def test_a_run_is_resumed_from_checkpoints_without_the_base(pair: Processes, tmp_path: Path, kind: str) -> None:
    (through, rest, name), (other, *_) = pair.run(run, tmp_path, options(kind))
    assert through == rest == other
    assert name == "FSDPLlamaForCausalLM"
    found = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert found >= {"adapter_model.safetensors", "scheduler.pt", "rng_state_0.pth"}
    assert not {name for name in found if "model_fsdp" in name or name.startswith("model")}


def refer(kind: str, directory: Path, train_also: list[str], given: dict[str, Any]) -> tuple[float, float]:
    with launched():
        return compared(kind, directory, train_also, given)


@pytest.mark.parametrize(("kind", "train_also"), [("DPO", ["norm"]), further("DPO", []), further("GRPO", [])])
def test_the_reference_is_the_same_model_without_its_adapter(
    pair: Processes, tmp_path: Path, kind: str, train_also: list[str]
) -> None:
    for reference, model in pair.run(refer, kind, tmp_path, train_also, options("SHARDED_STATE_DICT")):
        assert reference < 1e-6 < model


def stock(directory: Path, given: dict[str, Any]) -> None:
    """Train with transformers' own trainer, and compare the adapter that its checkpoint has; resume."""
    from transformers import Trainer

    from tests.trainers import plain_model, trained_bits

    with launched():
        through = trainer(Trainer, directory, **given)
        through.train()
        dist.barrier()
        loaded = plain_model()
        randlora.load(loaded, directory / "checkpoint-4", trainable=True)
        assert trained_bits(loaded) == whole_bits(through.model)
        rest = trainer(Trainer, directory, **given)
        rest.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
        assert whole_bits(rest.model) == whole_bits(through.model)


@pytest.mark.slow
def test_a_stock_trainer_with_full_state_dicts_saves_the_adapter_and_resumes(pair: Processes, tmp_path: Path) -> None:
    pair.run(stock, tmp_path, options("FULL_STATE_DICT"))

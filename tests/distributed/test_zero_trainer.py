"""`AdapterTrainer` with an engine of DeepSpeed, whose own checkpoint beside the adapter resumes the run."""

import copy
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
from tests.distributed.engines import STAGES, deepspeed, needs_deepspeed, whole_values
from tests.distributed.processes import Processes
from tests.distributed.referring import compared
from tests.distributed.trained import distance
from tests.further import further

pytestmark = needs_deepspeed


@contextmanager
def launched() -> Iterator[None]:
    """Have accelerate find what a launcher sets, and count these processes, as on GPUs: without them it counts one."""
    deepspeed()
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "HF_HUB_OFFLINE": "1"}
    found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    with mock.patch.dict(os.environ, found), warnings.catch_warnings(action="ignore"):
        from accelerate.state import AcceleratorState, PartialState  # type: ignore[import-untyped]
        from accelerate.utils import DistributedType  # type: ignore[import-untyped]

        counted = ("gloo", DistributedType.MULTI_CPU)
        try:
            with mock.patch.object(PartialState, "_prepare_backend", return_value=counted):
                yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def options(stage: str, **zero: Any) -> dict[str, Any]:
    """Return the arguments of a trainer that makes an engine."""
    engine: dict[str, Any] = dict.fromkeys(["train_micro_batch_size_per_gpu", "gradient_clipping"], "auto")
    engine |= {"zero_optimization": copy.deepcopy(STAGES[stage]) | zero}
    engine |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return {"per_device_train_batch_size": 1, "use_cpu": False, "deepspeed": engine}


def trainer(directory: Path, stage: str, kind: Any, **zero: Any) -> Any:
    from transformers import TrainingArguments

    from tests.trainers import adapted_model, arguments, rows

    given = arguments(TrainingArguments, directory, **options(stage, **zero))
    return kind(adapted_model(train_also=["norm"], dropout=0.1), given, train_dataset=rows())


def run(directory: Path, stage: str) -> None:
    with launched():
        from randlora.integrations.transformers import AdapterTrainer
        from tests.trainers import plain_model

        through = trainer(directory, stage, AdapterTrainer)
        through.train()
        assert type(through.model_wrapped).__name__ == "DeepSpeedEngine"
        dist.barrier()
        rest = trainer(directory, stage, AdapterTrainer)
        rest.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
        expected = whole_values(through.model)
        assert distance(whole_values(rest.model), expected) == 0
        assert [each.get("loss") for each in rest.state.log_history] == [
            each.get("loss") for each in through.state.log_history
        ]
        loaded = plain_model()
        randlora.load(loaded, directory / "checkpoint-4", trainable=True)
        held = {name: each.detach() for name, each in loaded.named_parameters() if each.requires_grad}
        assert distance(held, expected) == 0
        assert any(value.any() for name, value in held.items() if "lambda" in name)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_run_is_resumed_from_the_checkpoint_of_deepspeed(zero_pair: Processes, tmp_path: Path, stage: str) -> None:
    zero_pair.run(run, tmp_path, stage)
    found = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "rng_state_0.pth", "rng_state_1.pth", "global_step2"} <= found
    assert "model.safetensors" not in found
    saved = [torch.load(path, weights_only=False) for path in tmp_path.glob("checkpoint-2/*/*model_states.pt")]
    names = {name for each in saved for name in each["module"]}
    assert names
    assert all("randlora" in name or "norm" in name for name in names)
    assert not any(each.get("frozen_param_fragments") for each in saved)


def stock(directory: Path, stage: str, is_gathered: bool) -> None:
    """Train with transformers' own trainer, and compare the adapter that its checkpoint has, if it can have one."""
    from transformers import Trainer

    with launched():
        from tests.trainers import plain_model

        through = trainer(directory, stage, Trainer, stage3_gather_16bit_weights_on_model_save=is_gathered)
        through.train()
        dist.barrier()
        if is_gathered:
            loaded = plain_model()
            randlora.load(loaded, directory / "checkpoint-4", trainable=True)
            held = {name: each.detach() for name, each in loaded.named_parameters() if each.requires_grad}
            assert distance(held, whole_values(through.model)) == 0
        rest = trainer(directory, stage, Trainer, stage3_gather_16bit_weights_on_model_save=is_gathered)
        rest.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
        assert distance(whole_values(rest.model), whole_values(through.model)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("is_gathered", [True, False])
def test_a_stock_trainer_of_zero_3_saves_the_adapter_if_the_engine_gathers_it(
    zero_pair: Processes, tmp_path: Path, is_gathered: bool
) -> None:
    zero_pair.run(stock, tmp_path, "3", is_gathered)


def refer(kind: str, directory: Path, stage: str) -> tuple[float, float]:
    with launched():
        return compared(kind, directory, [] if stage == "3" else ["norm"], options(stage))


@pytest.mark.parametrize(
    ("kind", "stage"), [further("DPO", "2"), ("DPO", "3"), further("GRPO", "2"), further("GRPO", "3")]
)
def test_the_reference_is_the_same_model_without_its_adapter(
    zero_pair: Processes, tmp_path: Path, kind: str, stage: str
) -> None:
    for reference, model in zero_pair.run(refer, kind, tmp_path, stage):
        assert reference < 1e-6 < model

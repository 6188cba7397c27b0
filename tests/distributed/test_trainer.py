"""`AdapterTrainer` on two processes: one of them writes, all resume, and each ends with the bits of an unbroken run."""

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
from torch.distributed.fsdp import fully_shard

import randlora
from randlora.errors import CheckpointError
from randlora.places import whole
from tests.distributed.processes import Processes
from tests.kit import Bits, bits, fill

pytestmark = pytest.mark.medium


@contextmanager
def launched() -> Iterator[None]:
    """Have accelerate find what a launcher sets, and forget after that what it found."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "HF_HUB_OFFLINE": "1"}
    found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999", "ACCELERATE_USE_CPU": "true"}
    with mock.patch.dict(os.environ, found), warnings.catch_warnings(action="ignore"):
        from accelerate.state import AcceleratorState  # type: ignore[import-untyped]

        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def trainer(model: Any, directory: Path) -> Any:
    from transformers import TrainingArguments

    from randlora.integrations.transformers import AdapterTrainer
    from tests.trainers import arguments, rows

    given = arguments(TrainingArguments, directory, ddp_backend="gloo", per_device_train_batch_size=1)
    return AdapterTrainer(model, given, train_dataset=rows())


def run(directory: Path) -> tuple[list[Bits], list[Bits], int, str]:
    """Train, resume, and return the values after both, how often this process saved, and how the model was wrapped."""
    with launched():
        from tests.trainers import adapted_model, trained_bits

        through = trainer(adapted_model(train_also=["norm"], dropout=0.1), directory)
        with mock.patch.object(randlora, "save", side_effect=randlora.save) as saved:
            through.train()
        wrapped = type(through.model_wrapped).__name__
        dist.barrier()
        rest = trainer(fill(adapted_model(train_also=["norm"], dropout=0.1)), directory)
        rest.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
        return trained_bits(through.model), trained_bits(rest.model), saved.call_count, wrapped


def test_one_process_writes_and_all_resume(pair: Processes, tmp_path: Path) -> None:
    (first, resumed, saves, wrapped), (other, also_resumed, more, _) = pair.run(run, tmp_path)
    assert first == resumed == other == also_resumed
    assert (saves, more) == (2, 0)
    assert wrapped == "DistributedDataParallel"
    found = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"} <= found
    assert "model.safetensors" not in found


def run_with_fsdp(directory: Path) -> str:
    """Train with FSDP2 asked for on a CPU, and return how the model was wrapped."""
    from transformers import Trainer, TrainingArguments

    with launched():
        from tests.trainers import adapted_model, arguments, rows

        options = {"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2}, "max_steps": 1, "save_strategy": "no"}
        given = arguments(TrainingArguments, directory, ddp_backend="gloo", **options)
        through = Trainer(adapted_model(), given, train_dataset=rows())
        through.train()
        return type(through.model_wrapped).__name__


def test_fsdp2_of_a_trainer_is_ddp_on_a_cpu(pair: Processes, tmp_path: Path) -> None:
    """So that nobody takes a test through `Trainer` on a CPU for one of FSDP."""
    assert pair.run(run_with_fsdp, tmp_path) == ["DistributedDataParallel"] * 2


def sharded(seed: int) -> Any:
    from tests.trainers import adapted_model

    model = fill(adapted_model(train_also=["norm"]), seed=seed)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def whole_bits(model: Any) -> list[Bits]:
    return [bits(whole(parameter)) for parameter in randlora.trainable_parameters(model)]


def restore_sharded(directory: Path) -> tuple[list[Bits], list[Bits], list[Bits], bool]:
    """Save a sharded model, and return its values, those of another one, and those that this one then restores."""
    with launched():
        model = sharded(1)
        trainer(model, directory).save_model(str(directory))
        other = sharded(2)
        before, held = whole_bits(other), list(randlora.trainable_parameters(other))
        with torch.no_grad():
            other(torch.arange(8)[None])  # after which the root holds whole parameters
        randlora.swap(other, directory)
        is_same = all(map(lambda one, two: one is two, held, randlora.trainable_parameters(other)))
        return whole_bits(model), before, whole_bits(other), is_same


def test_a_sharded_model_is_saved_and_restored_in_place(pair: Processes, tmp_path: Path) -> None:
    for saved, before, restored, is_same in pair.run(restore_sharded, tmp_path):
        assert restored == saved != before
        assert is_same


def restore_missing(directory: Path) -> str:
    """Save a model, restore it from nowhere in one of the processes, and return the error."""
    with launched():
        model = sharded(1)
        randlora.save(model, directory)
        with pytest.raises(CheckpointError) as error:
            randlora.swap(model, directory if dist.get_rank() else directory / "none")
        return str(error.value)


def test_what_one_process_cannot_read_is_raised_in_all(pair: Processes, tmp_path: Path) -> None:
    first, other = pair.run(restore_missing, tmp_path)
    assert "cannot load" in first == other

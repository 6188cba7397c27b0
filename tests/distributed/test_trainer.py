"""`AdapterTrainer` on two processes: one of them writes, all resume, and each ends with the bits of an unbroken run."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

import randlora
from tests.distributed.processes import Processes
from tests.kit import Bits, fill


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

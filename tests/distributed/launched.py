"""What a launcher of accelerate sets, in processes that are in a group already."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.distributed.engines import deepspeed


@contextmanager
def launched(engine: str) -> Iterator[None]:
    """Have accelerate find what a launcher sets, and forget after that what it found.

    Without a GPU accelerate counts one process for DeepSpeed, and takes FSDP's plugin for DistributedDataParallel. Here
    it is told that it counts these processes, and for FSDP that they have devices and that these are the CPU.
    """
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "HF_HUB_OFFLINE": "1"}
    found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    if engine.startswith("zero"):
        deepspeed()
    elif engine == "ddp":
        found["ACCELERATE_USE_CPU"] = "true"
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, found))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        from accelerate.state import AcceleratorState, PartialState  # type: ignore[import-untyped]
        from accelerate.utils import DistributedType  # type: ignore[import-untyped]

        def on_cpu(state: Any) -> None:
            state.device = torch.device("cpu")

        kind = DistributedType.MULTI_CPU if engine.startswith("zero") else DistributedType.MULTI_GPU
        if engine != "ddp":
            stack.enter_context(mock.patch.object(PartialState, "_prepare_backend", return_value=("gloo", kind)))
        if engine.startswith("fsdp"):
            stack.enter_context(mock.patch.object(PartialState, "set_device", on_cpu))
        stack.callback(AcceleratorState._reset_state, reset_partial_state=True)
        yield

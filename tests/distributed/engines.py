"""The engines that spread a model over processes: how each is put around an adapted model, and trains it."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.trained import Net, gathered, optimizer_of

LACKING = "DeepSpeed is not installed"
has_deepspeed = sys.platform.startswith("linux") and importlib.util.find_spec("deepspeed") is not None

KNOWS_FP16 = os.environ.get("KNOWS_FP16", "1") == "1"
"""Whether DeepSpeed takes the processor for one that computes in fp16, as a GPU or the newest CPUs of Intel.

It would ask oneDNN, and so the tests would depend on the machine: where the processor does, there are fp16 engines, and
ZeRO-3 refuses models in float64. `KNOWS_FP16=0 make distributed` runs the tests as where it does not.
"""

LINEAR = functional.linear
"""What DeepSpeed replaces in a process for good, also for engines that are told not to."""

SPREAD = {"stage": 3, "stage3_param_persistence_threshold": 0}
"""ZeRO-3 that spreads small parameters too, as it does large ones."""

STAGES: dict[str, dict[str, Any]] = {
    "2": {"stage": 2},
    "3": SPREAD,
    "3-experts": SPREAD | {"memory_efficient_linear": False},  # else it computes F.linear by a function of its own
    "3-persistent": {"stage": 3},
    "3-gathered": SPREAD | {"stage3_gather_16bit_weights_on_model_save": True},
    "3-offload": SPREAD | {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}


def deepspeed() -> Any:
    """Return the library, which must find the variables that its launcher sets."""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_SIZE": "2"}
    import deepspeed as library  # each process imports it only for these tests

    library.utils.logger.setLevel("ERROR")
    # else it compiles a collective of its own, for a minute or two, and a process that is killed then leaves a lock for
    # which every later one waits
    vars(library.ops)["__compatible_ops__"] = {}
    vars(library.get_accelerator()).setdefault("is_fp16_supported", lambda: KNOWS_FP16)
    return library


def answering(*, knows_fp16: bool) -> AbstractContextManager[object]:
    return mock.patch.object(deepspeed().get_accelerator(), "is_fp16_supported", return_value=knows_fp16)


def config(stage: str, **options: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_clipping": 0.0,
        "zero_optimization": STAGES[stage],
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000,
        **options,
    }


def built_spread(case: Any, stage: str) -> nn.Module:
    with deepspeed().zero.Init(config_dict_or_path=config(stage)):
        model: nn.Module = case.build()
    plain = case.build()
    with gathered(model.parameters()), torch.no_grad():
        for own, value in zip(model.parameters(), plain.parameters(), strict=True):
            own.copy_(value)
    return model


def zero(model: nn.Module, stage: str, **options: Any) -> Any:
    """Return an engine of a model, which computes with DeepSpeed's `F.linear` only if its own stage says so."""
    vars(functional)["linear"] = LINEAR
    engine, *_ = deepspeed().initialize(model=model, optimizer=optimizer_of(model), config=config(stage, **options))
    return engine


def sharded(model: Any, parts: Sequence[str] = (), **options: Any) -> Any:
    for part in parts or (("blocks.0",) if isinstance(model, Net) else ()):
        fully_shard(model.get_submodule(part), **options)
    fully_shard(model, **options)
    return model


def offloaded(model: Any) -> Any:
    return sharded(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def replicated(model: Any) -> Any:
    return sharded(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def split(model: Any, mesh: Any = None, *, table: str = "rows") -> Any:
    plan: dict[str, Any] = {"head": ColwiseParallel(output_layouts=Replicate()), "blocks.*.down": RowwiseParallel()}
    plan["blocks.*.up"] = ColwiseParallel(use_local_output=False)  # torch takes a local output of an odd half for even
    if table == "rows":
        plan["embed"] = RowwiseParallel(input_layouts=Replicate())
    elif table == "columns":
        plan["embed"] = ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(model, mesh or init_device_mesh("cpu", (dist.get_world_size(),)), plan)


def flattened(model: nn.Module) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def on_two_dimensions(model: Any, *, adapt: Callable[[Any], Any] = lambda model: model) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    return sharded(adapt(split(model, mesh["tensor"])), mesh=mesh["data"])


def around(wrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda case: wrap(case.adapted())


def within(wrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda case: case.adapt(wrap(case.build()))


@dataclass(frozen=True)
class Engine:
    make: Callable[[Any], Any]
    fixed: dict[str, Any] = field(default_factory=dict)  # what of a drawn model it does not do otherwise
    sharing: int = 1  # how many processes have the same batch
    is_split: bool = False  # each process computes a part of a merged weight, which may round otherwise than all of it
    has_copies: bool = False  # each process has a copy of the model
    within: float = 1e-6  # how far values and losses may be from those of one process, in float32
    in_double: float = 1e-12
    is_trained: bool = True  # by the tests

    def whole(self, run: Any) -> AbstractContextManager[object]:
        is_flattened = isinstance(run, FullyShardedDataParallel)
        return FullyShardedDataParallel.summon_full_params(run) if is_flattened else nullcontext()

    def ranks(self) -> range:
        return range(dist.get_world_size() // self.sharing)


ONE_DTYPE = {"dtype": torch.float32}

BY_ENGINE = ONE_DTYPE | {"checkpointed": False, "backwards": 1}
"""An engine of DeepSpeed counts backwards for itself."""

SPLIT: dict[str, Any] = {"sharing": 2, "is_split": True, "within": 5e-6}
ENGINES: dict[str, Engine] = {
    "DDP": Engine(around(DistributedDataParallel), has_copies=True),
    "DDP, static": Engine(
        around(partial(DistributedDataParallel, static_graph=True)), {"backwards": 1}, has_copies=True
    ),  # torch counts a pass in no_sync as one of the first
    "DDP, unused": Engine(
        around(partial(DistributedDataParallel, find_unused_parameters=True, gradient_as_bucket_view=True)),
        has_copies=True,
    ),
    "FSDP": Engine(around(flattened), ONE_DTYPE, has_copies=True, is_trained=False),
    "FSDP2": Engine(around(sharded), ONE_DTYPE, is_split=True),
    "FSDP2, offloaded": Engine(around(offloaded), ONE_DTYPE, is_split=True),
    "FSDP2 first": Engine(within(sharded), is_split=True),
    "FSDP2 first, offloaded": Engine(within(offloaded), is_split=True),
    "tensor parallel": Engine(around(split), **SPLIT),
    "tensor parallel first": Engine(within(partial(split, table="columns")), **SPLIT),
    "ZeRO-2": Engine(around(partial(zero, stage="2")), BY_ENGINE, has_copies=True),
    "ZeRO-3": Engine(around(partial(zero, stage="3")), BY_ENGINE),
    "ZeRO-3 first": Engine(lambda case: zero(case.adapt(built_spread(case, "3")), "3"), BY_ENGINE),
    "ZeRO-3, persistent": Engine(around(partial(zero, stage="3-persistent")), BY_ENGINE),
    "ZeRO-3, offloaded": Engine(around(partial(zero, stage="3-offload")), BY_ENGINE),
    "ZeRO-3, experts": Engine(around(partial(zero, stage="3-experts")), BY_ENGINE),
    "replicas": Engine(around(replicated), ONE_DTYPE, is_split=True),
    "replicas first": Engine(within(replicated), is_split=True),
    "two dimensions": Engine(around(on_two_dimensions), ONE_DTYPE, **SPLIT),
    "two dimensions, split first": Engine(
        lambda case: on_two_dimensions(case.build(), adapt=case.adapt), ONE_DTYPE, **SPLIT
    ),
}
IN_FOUR, OF_EXPERTS = [*ENGINES][-4:], "ZeRO-3, experts"
IN_TWO = [name for name in ENGINES if name not in (*IN_FOUR, OF_EXPERTS)]


def trained(run: Any, case: Any, batch: int, steps: int = 3) -> list[float]:
    """Train with one of the batches, and return the losses. All backwards but the last of a step are not averaged."""
    is_zero, losses = hasattr(run, "backward"), []
    optimizer = None if is_zero else optimizer_of(run)
    for step in range(steps):
        losses.append(0.0)
        for part in range(case.backwards):
            is_last = part + 1 == case.backwards
            if hasattr(run, "set_requires_gradient_sync"):
                run.set_requires_gradient_sync(is_last)
            unsynced = isinstance(run, DistributedDataParallel) and not is_last
            with run.no_sync() if unsynced else nullcontext():
                inputs = case.batch(batch, step * case.backwards + part)
                loss = case.loss(run(*inputs), batch)
                (run if is_zero else loss).backward(*[loss] if is_zero else [])
            losses[-1] += loss.item()
        if optimizer is None:
            run.step()
        else:
            optimizer.step()
            optimizer.zero_grad()
    return losses

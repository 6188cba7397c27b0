"""DeepSpeed's engines of drawn models, in the processes that other tests share."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.distributed.trained import ROWS, Drawn, loss_of, optimizer_of
from tests.kit import fill

LACKING = "DeepSpeed is not installed"
has_deepspeed = sys.platform.startswith("linux") and importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not has_deepspeed, reason=LACKING)

LINEAR = functional.linear
"""What DeepSpeed replaces in a process for good, also for engines that are told not to."""

SPREAD = {"stage": 3, "stage3_param_persistence_threshold": 0}
"""ZeRO-3 that spreads small parameters too, as it does large ones."""

STAGES: dict[str, dict[str, Any]] = {
    "2": {"stage": 2},
    "3": SPREAD,
    "3-experts": SPREAD | {"memory_efficient_linear": False},  # else it computes F.linear by a function of its own
    "3-persistent": {"stage": 3},
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
    return library


def config(stage: str, **options: Any) -> dict[str, Any]:
    """Return a config that does not clip gradients."""
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_clipping": 0.0,
        "zero_optimization": STAGES[stage],
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000,
        **options,
    }


def adapted_spread(drawn: Drawn, stage: str, options: dict[str, Any]) -> nn.Module:
    """Return the adapted model, the base of which was built under `zero.Init`."""
    library = deepspeed()
    with library.zero.Init(config_dict_or_path=config(stage, **options)):
        model = drawn.build()
    plain = drawn.build()
    with library.zero.GatheredParameters([*model.parameters()], modifier_rank=0):
        for own, value in zip(model.parameters(), plain.parameters(), strict=True):
            own.data.copy_(value.data)
    drawn.adapt(model)
    with library.zero.GatheredParameters([*model.parameters()], modifier_rank=0):
        fill(model, seed=2)
    return model


def engine_of(drawn: Drawn, stage: str, *, is_spread_first: bool = False, **options: Any) -> Any:
    """Return an engine of the adapted model, adapted before or after its base was spread."""
    model = adapted_spread(drawn, stage, options) if is_spread_first else drawn.adapted()
    return engine_around(model, stage, **options)


def engine_around(model: nn.Module, stage: str, **options: Any) -> Any:
    """Return an engine of a model, which computes with DeepSpeed's `F.linear` only if its own stage says so."""
    vars(functional)["linear"] = LINEAR
    engine, *_ = deepspeed().initialize(model=model, optimizer=optimizer_of(model), config=config(stage, **options))
    return engine


def trained(engine: Any, drawn: Drawn, rank: int, step: int) -> float:
    """Train one step and return the loss."""
    loss = loss_of(engine(drawn.batch(rank, step).to(next(engine.module.parameters()).dtype)))
    engine.backward(loss)
    engine.step()
    return float(loss.item())


def whole_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all that the adapters train, gathered by DeepSpeed."""
    with deepspeed().zero.GatheredParameters([*model.parameters()]):
        return {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}

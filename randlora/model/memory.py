"""`training_memory`: the bytes that training an adapter of a model takes on each device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from randlora.config import RandLoRAConfig, further_options
from randlora.memory.training import Setup, Training, TrainingMemory
from randlora.model.inject import make_plan
from randlora.model.view import opened_to_add
from randlora.options import Strategy


@further_options(RandLoRAConfig)
def training_memory(
    model: nn.Module,
    r: int | Mapping[str, int] | None = None,
    *,
    like_lora: int | None = None,
    devices: int = 1,
    strategy: Strategy = "ddp",
    tokens: int = 0,
    dtype: torch.dtype | None = None,
    tp_plan: Mapping[str, str] | None = None,
    optimizer_states: int = 2,
    checkpointing: bool = False,
    device_type: Literal["cuda", "cpu"] = "cuda",
    config: RandLoRAConfig | None = None,
    **options: Any,
) -> TrainingMemory:
    """Return the bytes that training a new adapter takes on each device, computed from sizes.

    Neither the model nor the adapter needs values: the model may be on the meta device.

    Args:
        model: A model, which is not changed.
        r: As for `randlora.inject`.
        like_lora: As for `randlora.inject`.
        devices: The number of devices.
        strategy: ``"ddp"``: each has everything. ``"fsdp2"``: each has a shard of every parameter, and blocks, the
            entries of module lists, are gathered when they compute. ``"tp"``: each has a part of every layer that the
            plan names, and all of Λ, Γ and the bases.
        tokens: Tokens of a step on each device, for what layers keep for backward. With ``"tp"`` all devices have the
            same tokens.
        dtype: The dtype to hold the model in and to compute in. ``None`` for that of each parameter.
        tp_plan: The style of each layer under ``"tp"``, by name with ``*`` for numbers, in transformers' words:
            ``{"model.layers.*.self_attn.q_proj": "colwise"}``. ``None`` for the model's own.
        optimizer_states: Numbers that the optimizer keeps for each trained one: two for AdamW, one for SGD with
            momentum.
        checkpointing: Whether blocks are computed again in backward, so that one at a time keeps its inputs.
        device_type: The type of the devices, which the choice of how to compute depends on.
        config: As for `randlora.inject`.
        **options: The other options of `RandLoRAConfig`.

    Returns:
        The sizes as fields; it prints as a table, with what is not counted.

    Raises:
        ConfigError: If numbers are negative, or ``"tp"`` has no plan.
        RandLoRAError: Any error that `randlora.plan` would raise.
    """
    setup = Setup(devices, strategy, tokens, dtype, tp_plan, optimizer_states, checkpointing, device_type)
    return memory_of(model, r, setup, {}, like_lora=like_lora, config=config, **options)


def memory_of(
    model: nn.Module, r: int | Mapping[str, int] | None, setup: Setup, stored: Mapping[str, int], **options: Any
) -> TrainingMemory:
    """Return the result of `training_memory`; ``stored`` has the bytes of quantized parameters, by FQN."""
    asked = {"name": "default", "active": True, "trainable": True, "r": r, **options}
    with opened_to_add(model, ["default"], "inject") as view:
        planned = make_plan(view, asked)
    return Training(planned.census, planned.adapter, tuple(planned.selection.sites), setup, stored).memory()

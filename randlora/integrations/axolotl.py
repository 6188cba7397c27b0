"""A plugin of axolotl: ``adapter: randlora`` in its YAML, and the options of `randlora.inject` in a block of that name.

    plugins:
      - randlora.integrations.axolotl.RandLoRAPlugin
    adapter: randlora
    randlora:
      r: 32
      basis: block

axolotl builds the model, the data and the trainer. Written for the interface of axolotl 0.19.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from axolotl.core.trainers import AxolotlTrainer
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.utils.logging import get_logger
from pydantic import BaseModel, Field, field_validator

import randlora
from randlora.config import RandLoRAConfig
from randlora.errors import AdapterError, ConfigError, raise_collected
from randlora.integrations.transformers import AdapterCheckpoints

LOG = get_logger("axolotl.integrations.randlora")  # axolotl shows what loggers below its own name say

NAME = "randlora"  # the value of ``adapter:``, and the name of the block with the options
CONFIG = tuple(inspect.signature(RandLoRAConfig).parameters)
OPTIONS = tuple(name for name in inspect.signature(randlora.inject).parameters if name not in ("model", "config"))


class RandLoRAArgs(BaseModel):
    """The options that the plugin adds to axolotl's config."""

    randlora: dict[str, Any] = Field(
        default_factory=dict, description="Options of randlora.inject, by their names there, such as r, alpha, targets."
    )

    @field_validator("randlora")
    @classmethod
    def check(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Check the options before a model is loaded. Names of layers are checked once it is loaded."""
        try:
            RandLoRAConfig(**{name: own for name, own in options.items() if name in CONFIG or name not in OPTIONS})
        except ConfigError as error:
            raise ValueError(str(error)) from error  # which pydantic reports with the name of the field
        return options


class AdapterAxolotlTrainer(AdapterCheckpoints, AxolotlTrainer):  # type: ignore[misc]  # axolotl carries no types
    """axolotl's trainer, with checkpoints that contain the adapter and not the model."""


class RandLoRAPlugin(BasePlugin):  # type: ignore[misc]
    """Trains a RandLoRA adapter if axolotl's config says ``adapter: randlora``."""

    def get_input_args(self) -> str:
        """Return the name of the class that describes the block ``randlora:``."""
        return f"{__name__}.{RandLoRAArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Return the name that ``adapter:`` takes."""
        return [AdapterCapabilities(name=NAME)]

    def register(self, cfg: Any) -> None:
        """Raise an error for options that axolotl would ignore or take differently, before anything is loaded."""
        if cfg.get("adapter") == NAME:
            raise_collected(AdapterError, [*_config_problems(cfg)], doing=f"train with adapter: {NAME}")

    def load_adapter(
        self,
        model: Any,
        cfg: Any,
        inference: bool = False,  # noqa: FBT001, FBT002  # axolotl's signature
        config_only: bool = False,  # noqa: ARG002, FBT001, FBT002
    ) -> tuple[Any, None] | None:
        """Add a new adapter, or the one in ``lora_model_dir`` or a checkpoint; ``None`` for any other ``adapter:``."""
        if cfg.adapter != NAME:
            return None
        if cfg.lora_model_dir:
            report = randlora.load(model, cfg.lora_model_dir, trainable=not inference, save_pretrained="adapter")
        else:
            report = randlora.inject(model, **{"save_pretrained": "adapter", **(cfg.randlora or {})})
        LOG.info("%s", report)
        return model, None

    def get_trainer_cls(self, cfg: Any) -> type[AxolotlTrainer] | None:
        """Return the trainer whose checkpoints hold the adapter."""
        return AdapterAxolotlTrainer if cfg.adapter == NAME else None

    def post_train_unload(self, cfg: Any) -> None:
        """Log the command that merges the adapter into the model, as ``axolotl merge-lora`` does for LoRA."""
        if cfg.adapter == NAME:
            LOG.info("merge the adapter by: %s", _merging(cfg))


def _merging(cfg: Any) -> str:
    """Return the command that merges the adapter of a run into its model."""
    return f"randlora merge {cfg.get('output_dir')} MERGED_DIR --base {cfg.get('base_model')}"


def _config_problems(cfg: Any) -> Iterator[str]:
    """Yield what in a config would be ignored, or mean something else, with what to do instead."""
    given = {name for name, value in cfg.items() if value}
    if "merge_lora" in given:
        yield f"axolotl merge-lora merges only LoRA: {_merging(cfg)}"
    if given & {"load_in_4bit", "load_in_8bit", "gptq"}:
        yield (
            "axolotl quantizes for load_in_4bit, load_in_8bit and gptq only with its own lora and qlora: leave them "
            "out, and give as base_model a checkpoint that is already quantized by bitsandbytes"
        )
    if given & {"rl", "reward_model", "process_reward_model"}:
        yield (
            "axolotl takes no trainer from a plugin for rl, reward_model and process_reward_model: use TRL's trainer "
            "with randlora.integrations.transformers.AdapterCheckpoints"
        )
    if lora := sorted(name for name in given if name.startswith(("lora_", "peft_")) and name != "lora_model_dir"):
        yield f"{', '.join(lora)} are options of LoRA: give RandLoRA's in the block {NAME}:"
    if {"lora_model_dir", NAME} <= given:
        yield f"the adapter in lora_model_dir has its options already: leave out the block {NAME}:"
    if "unfrozen_parameters" in given:
        yield f"unfrozen_parameters would not be saved with the adapter: use train_also in the block {NAME}:"

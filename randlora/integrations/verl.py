"""An engine of verl that trains a RandLoRA adapter under FSDP2, where verl's own would train LoRA.

verl takes it if the environment of its workers says ``VERL_ENGINE_VENDOR=randlora``, and its config

    actor_rollout_ref.actor.strategy=fsdp2
    actor_rollout_ref.model.lora_rank=32
    actor_rollout_ref.model.lora.merge=True
    actor_rollout_ref.model.target_modules=randlora
    +actor_rollout_ref.model.lora.randlora.basis=block

Written for the interface of verl 0.9.1, which imports `randlora.integrations.verl_plugin`, and that imports this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

from torch import Tensor
from verl.utils.device import get_device_id
from verl.utils.fs import copy_to_local
from verl.utils.fsdp_utils import load_fsdp_model_to_gpu, offload_fsdp_model_to_cpu
from verl.utils.model import convert_weight_keys
from verl.utils.py_functional import convert_to_regular_types
from verl.workers.config import HFModelConfig
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine.fsdp.utils import unfuse_moe_params

import randlora
from randlora.errors import ConfigError, MergeError, raise_collected

NAME = "randlora"
"""The vendor, the value of ``target_modules``, and the block of ``model.lora`` with options of `randlora.inject`."""

ADAPTER = "adapter"  # the directory of a checkpoint with the adapter's files, beside verl's own


# for both strategies, or verl would silently take its own engine for fsdp
@EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device=["cuda", "npu", "cpu"], vendor=NAME)
class RandLoRAEngine(FSDPEngineWithLMHead):  # type: ignore[misc]  # verl carries no types
    """verl's engine of a language model under FSDP2, with a RandLoRA adapter in place of LoRA."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Raise an error for options that verl would ignore or take differently, before a model is loaded."""
        super().__init__(*args, **kwargs)
        self._has_adapter = self._is_lora or not self.engine_config.forward_only
        if self._has_adapter:
            doing = "train with verl's engine of the vendor randlora"
            raise_collected(ConfigError, [*self._config_problems()], doing=doing)

    def _config_problems(self) -> Iterator[str]:
        """Yield what in the config would be ignored, or mean something else, with what to do instead."""
        model, saves = self.model_config, self.checkpoint_config or {}
        if not self._is_lora:
            yield "model.lora_rank is 0, with which verl trains the whole model: set it to r, such as 32"
        if model.target_modules != NAME:
            yield (
                f"model.target_modules is {model.target_modules!r}: set it to {NAME}, with which verl's own engine "
                "raises an error, instead of training LoRA where this one is not loaded"
            )
        if not model.lora.get("merge"):
            yield "model.lora.merge is False, with which verl's rollout expects LoRA: set it to True"
        if self.engine_config.strategy != "fsdp2":
            yield f"actor.strategy is {self.engine_config.strategy}, FSDP's first version: set it to fsdp2"
        if self._qat_enabled:
            yield "qat would replace the adapted layers: leave it out"
        if "hf_model" in (saves.get("save_contents") or ()):
            yield (
                "hf_model in checkpoint.save_contents would be the model without the adapter: leave it out, and merge "
                "the saved adapter by `randlora merge`"
            )
        if saves.get("save_lora_only"):
            yield (
                "checkpoint.save_lora_only is for LoRA: leave it out, and model out of checkpoint.save_contents and "
                "load_contents; the adapter is always saved"
            )
        fields = HFModelConfig.__dataclass_fields__
        of_lora = "lora_alpha", "exclude_modules", "target_parameters", "lora_adapter_path"  # not read by this engine
        if given := [name for name in of_lora if getattr(model, name) != fields[name].default]:
            yield (
                f"{', '.join(given)} would be ignored: give the options of randlora.inject in the block "
                f"model.lora.{NAME}, and merge an adapter to start from into the model"
            )

    def _build_lora_module(self, module: Any) -> Any:
        """Add the adapter, and freeze the model. Layers and options that match nothing raise an error."""
        module.enable_input_require_grads()  # verl's offloading of activations computes nothing again without
        options = convert_to_regular_types(self.model_config.lora.get(NAME) or {})
        randlora.inject(module, r=self.model_config.lora_rank, **options)
        return module

    def get_per_tensor_param(self, **kwargs: Any) -> tuple[Iterator[tuple[str, Tensor]], None]:  # noqa: ARG002
        """Return the merged weights as they are at each iteration, under the names that verl sends, and no config."""
        return unfuse_moe_params(self._merged_tensors(), self.model_config.hf_config.model_type), None

    def _merged_tensors(self) -> Iterator[tuple[str, Tensor]]:
        with self._on_device():
            for name, tensor in randlora.merged_tensors(self.module):
                yield from convert_weight_keys({name: tensor.to(get_device_id())}, self.module).items()

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Within the block, have the parameters where they are gathered. verl's copies to the CPU wait for nothing."""
        if not self._uses_fsdp2_cpu_offload_policy:
            load_fsdp_model_to_gpu(self.module)
        try:
            yield
        finally:
            if self._is_offload_param:
                offload_fsdp_model_to_cpu(self.module)

    def get_per_tensor_param_shard(self, **kwargs: Any) -> NoReturn:  # noqa: ARG002
        """Raise an error: shards are of the base weights, so that a rollout would stay with the first policy."""
        raise MergeError(
            "cannot send shards to the rollout: they are of the weights without the adapter; choose a backend of "
            "rollout.checkpoint_engine other than delta_sharded"
        )

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Return a block in which the model is the reference policy."""
        return randlora.disabled(self.module)

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """Save what verl saves, and the adapter beside it, in the directory ``adapter``."""
        super().save_checkpoint(local_path, *args, **kwargs)
        if self._has_adapter:
            with self._on_device():
                randlora.save(self.module, f"{local_path}/{ADAPTER}")

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """Load what verl loads, and the adapter, which must be of the same bases."""
        super().load_checkpoint(local_path, *args, **kwargs)
        if self._has_adapter:
            with self._on_device():
                randlora.swap(self.module, copy_to_local(f"{local_path}/{ADAPTER}"))

"""A tuner of ms-swift: ``swift sft --external_plugins plugin.py --tuner_type randlora``, with this as ``plugin.py``.

    from randlora.integrations.swift import register

    register(r=32, basis="block")

ms-swift builds the model, the data and the trainer. Written for the interface of ms-swift 4.6.
"""

from __future__ import annotations

from typing import Any

from swift.trainers import Seq2SeqTrainer, Trainer
from swift.trainers.trainer_factory import TrainerFactory
from swift.tuner_plugin import Tuner, tuners_map
from swift.utils import get_logger
from torch import nn

import randlora
from randlora.errors import AdapterError
from randlora.integrations.transformers import LoadsAdapters

LOG = get_logger()
NAME = "randlora"  # the value of ``--tuner_type``


class AdapterSeq2SeqTrainer(LoadsAdapters, Seq2SeqTrainer):  # type: ignore[misc]  # ms-swift carries no types
    """ms-swift's trainer of language models, which resumes from checkpoints of an adapter."""


class AdapterClassifierTrainer(LoadsAdapters, Trainer):  # type: ignore[misc]
    """ms-swift's trainer of classifiers, which resumes from checkpoints of an adapter."""


TRAINERS = {"causal_lm": AdapterSeq2SeqTrainer, "seq_cls": AdapterClassifierTrainer}  # the trainers by `--task_type`


def register(**options: Any) -> type[Tuner]:
    """Register the tuner with ms-swift, with options of `randlora.inject` such as ``r`` and ``alpha``; return it."""

    class RandLoRATuner(Tuner):  # type: ignore[misc]
        """Adds, saves and loads a RandLoRA adapter."""

        @staticmethod
        def prepare_model(args: Any, model: nn.Module) -> nn.Module:
            """Add a new adapter, and freeze the model. Only `TRAINERS` are let, which know an adapter's checkpoints."""
            task = getattr(args, "rlhf_type", None) or args.task_type
            if task not in TRAINERS:
                raise AdapterError(
                    f"cannot train {task} with tuner_type {NAME}: it trains {' and '.join(TRAINERS)}; for others use "
                    "TRL's trainer with randlora.integrations.transformers.AdapterCheckpoints"
                )
            _bring_trainers()
            LOG.info("%s", randlora.inject(model, **{"save_pretrained": "adapter", **options}))
            return model

        @staticmethod
        def save_pretrained(model: nn.Module, save_directory: str, *args: Any, **kwargs: Any) -> None:  # noqa: ARG004
            """Save the adapter."""
            randlora.save(model, save_directory)

        @staticmethod
        def from_pretrained(model: nn.Module, model_id: str, **kwargs: Any) -> nn.Module:
            """Load the adapter of a checkpoint, to go on training it if ``is_trainable``."""
            _bring_trainers()
            trainable = bool(kwargs.get("is_trainable"))
            LOG.info("%s", randlora.load(model, model_id, trainable=trainable, save_pretrained="adapter"))
            return model

    tuners_map[NAME] = RandLoRATuner
    return RandLoRATuner


def _bring_trainers() -> None:
    """Have ms-swift make trainers of `TRAINERS`. It does so after the tuner, and other tuners keep its own."""
    for task, trainer in TRAINERS.items():
        TrainerFactory.TRAINER_MAPPING[task] = f"{__name__}.{trainer.__name__}"

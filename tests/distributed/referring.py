"""Runs of TRL's trainers in the processes that other tests share, and what their reference computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch

import randlora


def rewards(completions: list[str], **_: Any) -> list[float]:
    return [sum(map(ord, text)) % 7 for text in completions]


def make(kind: str, directory: Path, train_also: list[str], given: dict[str, Any]) -> Any:
    """Make a trainer of TRL, which must not load a model."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

    from randlora.integrations.transformers import AdapterCheckpoints
    from tests.trainers import adapted_model, arguments, preferences, tokenizer

    model, own = adapted_model(train_also=train_also or None), {"processing_class": tokenizer()}
    given = {"max_steps": 2, "save_strategy": "no", "gradient_checkpointing": False, "bf16": False, **given}
    with mock.patch(
        f"trl.trainer.{kind.lower()}_trainer.create_model_from_path", side_effect=AssertionError("a second model")
    ):
        if kind == "DPO":
            dpo = type("DPO", (AdapterCheckpoints, DPOTrainer), {})
            return dpo(model, args=arguments(DPOConfig, directory, **given), train_dataset=preferences(), **own)
        prompts = Dataset.from_dict({"prompt": [f"{i} squared is" for i in range(16)]})
        sizes = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
        grpo = type("GRPO", (AdapterCheckpoints, GRPOTrainer), {})
        args = arguments(GRPOConfig, directory, **sizes, **given)
        return grpo(model, rewards, args=args, train_dataset=prompts, **own)


def compared(kind: str, directory: Path, train_also: list[str], given: dict[str, Any]) -> tuple[float, float]:
    """Train, and return how far the reference and the model are from the base's output."""
    from tests.trainers import plain_model

    trainer = make(kind, directory, train_also, given)
    trainer.train()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        base = plain_model()(ids).logits
        reference, model = trainer.ref_model(ids).logits, trainer.model(ids).logits
    assert trainer.args.beta == (trainer.beta if kind == "DPO" else 0.1)
    assert [info.is_active for info in randlora.adapters(trainer.model)] == [True]
    return float((reference - base).abs().max()), float((model - base).abs().max())

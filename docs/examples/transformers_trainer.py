"""Train an adapter with transformers' `Trainer`, whose checkpoints then hold the adapter and not the model.

`python docs/examples/transformers_trainer.py` runs it, and `--resume` goes on from the last checkpoint. The model is a
tiny Llama with random weights, in the place of one that you would load; the text is the Grimms' tales, byte by byte.
"""

import os
from pathlib import Path
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: nothing here is on the Hub

import torch
import typer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import randlora
from randlora.integrations.transformers import AdapterTrainer

TALES = Path(__file__).parent / "data" / "grimm.txt"
WINDOW = 64  # bytes


def pretrained() -> LlamaForCausalLM:
    """Make a model, always with the same weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def windows(count: int) -> list[dict[str, Tensor]]:
    """Cut the tales into examples of `WINDOW` bytes, each its own label."""
    ids = torch.tensor(list(TALES.read_bytes()[: count * WINDOW])).reshape(-1, WINDOW)
    return [{"input_ids": row, "labels": row} for row in ids]


def make_trainer(out: Path, *, steps: int, every: int) -> AdapterTrainer:
    """Put an adapter on the model, and a trainer round it."""
    model = pretrained()
    print(randlora.inject(model, r=8, alpha=16, dropout=0.1, targets=["q_proj", "v_proj", "up_proj", "down_proj"]))
    arguments = TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        save_steps=every,
        logging_steps=every,
        report_to=[],
    )
    return AdapterTrainer(model, arguments, train_dataset=windows(400))


def main(
    steps: Annotated[int, typer.Option(min=1)] = 60,
    every: Annotated[int, typer.Option(min=1, help="Steps from one checkpoint to the next.")] = 20,
    out: Annotated[Path, typer.Option(help="Directory for the checkpoints.")] = Path("build/transformers-trainer"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,  # noqa: FBT002
) -> None:
    """Train an adapter with transformers' Trainer."""
    trainer = make_trainer(out, steps=steps, every=every)
    trainer.train(resume_from_checkpoint=resume)
    print(randlora.save(trainer.model, out / "adapter"))


if __name__ == "__main__":
    typer.run(main)

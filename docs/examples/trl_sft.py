"""Fine-tune a causal language model with TRL's `SFTTrainer` and an adapter, which alone is in the checkpoints.

`python docs/examples/trl_sft.py` runs it, and `--resume` goes on from the last checkpoint. The model is a tiny Llama
with random weights, in the place of one that you would load; the text is the Grimms' tales, letter by letter.
"""

import os
from pathlib import Path
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: nothing here is on the Hub

import torch
import typer
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import randlora
from randlora.integrations.transformers import AdapterCheckpoints

TALES = Path(__file__).parent / "data" / "grimm.txt"
LETTERS = {chr(code): code for code in range(128)}


class AdapterSFT(AdapterCheckpoints, SFTTrainer):  # type: ignore[misc]  # TRL carries no types
    """TRL's trainer, whose checkpoints hold the adapter and not the model."""


def pretrained() -> LlamaForCausalLM:
    """Make a model, always with the same weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(LETTERS) + 1, **sizes))


def letters() -> PreTrainedTokenizerFast:
    """Make a tokenizer of letters."""
    tokenizer = Tokenizer(models.WordLevel(LETTERS | {"<eos>": len(LETTERS)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def lines(count: int) -> Dataset:
    """Return the first lines of the tales that are not empty."""
    found = [line for line in TALES.read_text(encoding="ascii", errors="ignore").splitlines() if line.strip()]
    return Dataset.from_dict({"text": found[:count]})


def make_trainer(out: Path, *, steps: int, every: int) -> AdapterSFT:
    """Put an adapter on the model, and a trainer round it."""
    model = pretrained()
    print(randlora.inject(model, r=8, alpha=16, targets=["q_proj", "v_proj", "up_proj", "down_proj"]))
    arguments = SFTConfig(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        max_length=64,
        save_steps=every,
        logging_steps=every,
        bf16=torch.cuda.is_available(),  # TRL's default, which it refuses without a GPU
        report_to=[],
    )
    return AdapterSFT(model, arguments, train_dataset=lines(400), processing_class=letters())


def main(
    steps: Annotated[int, typer.Option(min=1)] = 60,
    every: Annotated[int, typer.Option(min=1, help="Steps from one checkpoint to the next.")] = 20,
    out: Annotated[Path, typer.Option(help="Directory for the checkpoints.")] = Path("build/trl-sft"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,  # noqa: FBT002
) -> None:
    """Fine-tune with TRL's SFTTrainer."""
    trainer = make_trainer(out, steps=steps, every=every)
    trainer.train(resume_from_checkpoint=resume)
    print(randlora.save(trainer.model, out / "adapter"))


if __name__ == "__main__":
    typer.run(main)

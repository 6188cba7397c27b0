"""Trainers and launchers in environments of their own (`make test-trainers`, `make test-runs`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import randlora

WORDS = ["<s>", "</s>", "<pad>", "?", *"abcdefghijklmnopqrstuvwxyz0123456789 :\n"]
QUIET = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline"}
QUIET |= {"AXOLOTL_DO_NOT_TRACK": "1"}


def command(directory: Path, name: str, *arguments: str) -> str:
    line = [str(Path(sys.executable).parent / name), *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=directory, env=os.environ | QUIET)
    return f"{done.returncode}\n{done.stdout}{done.stderr}"


def write_inputs(directory: Path, form: str) -> Path:
    """Write a Llama of two layers with random weights, and texts, one on a line as JSON; return the directory.

    A text is a ``text``, or ``messages`` of a conversation. The tokenizer has a token for each letter.
    """
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(directory / "base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": len(WORDS), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).save_pretrained(directory / "base")
    lines = []
    for number in range(64):
        text = f"tale {number} is of a fox that jumped {number * number} times"
        said = [{"role": "user", "content": f"tell tale {number}"}, {"role": "assistant", "content": text}]
        lines.append(json.dumps({"text": text} if form == "text" else {"messages": said}))
    (directory / "texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


def logits(directory: Path, adapter: Path | None = None) -> torch.Tensor:
    """Return what a model on disk computes, with an adapter if one is given."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if adapter is not None:
        randlora.load(model, adapter)
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(4, 24).unsqueeze(0)).logits
    return found

"""A model, its tokenizer and texts, small enough that a run takes seconds."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<s>", "</s>", "<pad>", "?", *"abcdefghijklmnopqrstuvwxyz0123456789 :\n"]


def write_base(directory: Path) -> None:
    """Write a Llama of two layers with random weights, and a tokenizer that has a token for each letter."""
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def write_texts(file: Path, form: str) -> None:
    """Write texts, one on a line as JSON: as ``text``, or as ``messages`` of a conversation."""
    lines = []
    for number in range(64):
        text = f"tale {number} is of a fox that jumped {number * number} times"
        said = [{"role": "user", "content": f"tell tale {number}"}, {"role": "assistant", "content": text}]
        lines.append(json.dumps({"text": text} if form == "text" else {"messages": said}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def logits(directory: Path, adapter: Path | None = None) -> torch.Tensor:
    """Return what a model on disk computes, with an adapter if one is given."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if adapter is not None:
        import randlora

        randlora.load(model, adapter)
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(4, 24).unsqueeze(0)).logits
    return found

"""Checkpoints that transformers writes of models it quantized with bitsandbytes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.model_directories import save_model
from tests.models import GPT2, LLAMA, RealModel

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4 in floats": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "8 bits": {"load_in_8bit": True},
}
"""What transformers is told, by a name."""

SHARD = "8KB"
"""Small enough for several files, and for what stands beside codes to be in other ones."""

KINDS = {name: name.split()[0] if name != "8 bits" else name for name in QUANTIZATIONS}
"""What a report calls it."""


every_quantization = pytest.mark.parametrize(
    ("kind", "quantization"),
    [*((LLAMA, name) for name in QUANTIZATIONS), (GPT2, "nf4")],
    ids=lambda value: value if isinstance(value, str) else value.name,
)


def quantize(kind: RealModel, quantization: str, directory: Path, *, is_sharded: bool = False) -> Path:
    """Let transformers quantize a model in bfloat16 and write it, before it computes anything."""
    dense = save_model(kind, directory.with_name(f"{directory.name} dense"), dtype=torch.bfloat16)
    options = {"max_shard_size": SHARD} if is_sharded else {}
    load_quantized(dense, quantization).save_pretrained(directory, **options)
    return directory


def load_quantized(dense: Path, quantization: str) -> Any:
    config = transformers.BitsAndBytesConfig(**QUANTIZATIONS[quantization])
    return transformers.AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, device_map="cpu")

"""Real models in 16 bits whose linear layers bitsandbytes quantised, as users load them."""

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit

from tests.models import RealModel

REPACKS = getattr(bitsandbytes.functional, "has_avx512bf16", lambda: False)()
"""Whether bitsandbytes repacks 4-bit weights on this CPU, at their first forward pass in evaluation mode."""

needs_repacking = pytest.mark.skipif(not REPACKS, reason="bitsandbytes repacks on CPUs with AVX512-BF16 only")


def quantised(kind: RealModel, directory: Path, *, bits: int = 4, **options: Any) -> transformers.PreTrainedModel:
    """Build a model, write it, and load it in bfloat16 with its linear layers quantised."""
    built = kind.build()
    assert isinstance(built, transformers.PreTrainedModel)
    built.save_pretrained(directory)
    if bits == 4:
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16} | options
    config = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **options)
    model = type(built).from_pretrained(
        directory, quantization_config=config, device_map="cpu", dtype=torch.bfloat16, use_safetensors=True
    )
    return model.requires_grad_(requires_grad=False)


def four_bit_linear(in_features: int = 64, out_features: int = 32, **options: Any) -> Linear4bit:
    """Quantise a layer of random weights."""
    layer = Linear4bit(in_features, out_features, quant_type="nf4", compute_dtype=torch.bfloat16, **options)
    return layer.bfloat16().to("cpu").requires_grad_(requires_grad=False)

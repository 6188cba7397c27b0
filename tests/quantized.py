"""Layers, whole transformers models and their checkpoints that bitsandbytes quantized on a CPU, as users have them."""

import copy
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from torch import nn

from tests.further import further
from tests.model_directories import save_model, write
from tests.models import BERT, GPT2, LLAMA, VIT, RealModel, bert, gpt2, llama, vit

REPACKS = getattr(bitsandbytes.functional, "has_avx512bf16", lambda: False)()
"""Whether bitsandbytes repacks 4-bit weights on this CPU, at their first forward pass in evaluation mode."""

needs_repacking = pytest.mark.skipif(not REPACKS, reason="bitsandbytes repacks on CPUs with AVX512-BF16 only")

SIDES = {"hidden_size": 64, "intermediate_size": 128}
"""Rows that blocks of 64 codes divide: others are misread on CPUs, and refused."""

MODELS = (
    replace(LLAMA, build=partial(llama, **SIDES)),
    replace(GPT2, build=partial(gpt2, n_embd=64)),
    replace(BERT, build=partial(bert, **SIDES)),
    replace(VIT, build=partial(vit, **SIDES)),
)


@dataclass(frozen=True, eq=False)
class Codes:
    name: str
    options: dict[str, Any]
    kind: str = "Linear4bit"
    tolerance: float = 1e-4


_nf4, _fp4 = ({"load_in_4bit": True, "bnb_4bit_quant_type": name} for name in ("nf4", "fp4"))
_8_bits, _twice = {"load_in_8bit": True}, {"bnb_4bit_use_double_quant": True}
_in_float32 = {"bnb_4bit_compute_dtype": torch.float32}
NF4 = Codes("nf4-double", {**_nf4, **_in_float32, **_twice})
FP4 = Codes("fp4", {**_fp4, **_in_float32})
INT8 = Codes("8bit", _8_bits, kind="Linear8bitLt", tolerance=0.05)  # rounds its inputs to 8 bits too
HALF = Codes("nf4-half", {**_nf4, "bnb_4bit_compute_dtype": torch.bfloat16})


@cache
def _loaded(kind: RealModel, codes: Codes, dtype: torch.dtype) -> Any:
    """Build a model, write it, and load it as a user does, which takes longer than to copy it."""
    built: Any = kind.build()
    with TemporaryDirectory() as directory:
        built.save_pretrained(directory)
        model = _quantized_by(codes.options, type(built), directory, dtype=dtype)
    model.name_or_path = model.config._name_or_path = ""  # as of the dense one; a directory's is another each time
    return model


def _quantized_by(options: dict[str, Any], kind: Any, directory: Any, **more: Any) -> Any:
    config = transformers.BitsAndBytesConfig(**options)
    return kind.from_pretrained(directory, quantization_config=config, device_map="cpu", **more)


def quantized_model(kind: RealModel, codes: Codes) -> Any:
    """Load a model in float32 with its linear layers quantized, in evaluation mode, that is not repacked there."""
    model = copy.deepcopy(_loaded(kind, codes, torch.float32))
    for module in quantized_layers(model).values():
        module.support_avx512bf16_for_cpu = False
    return model


def half_precision_model(kind: RealModel, *, bits: int = 4) -> transformers.PreTrainedModel:
    model: Any = copy.deepcopy(_loaded(kind, INT8 if bits == 8 else HALF, torch.bfloat16))
    return model.requires_grad_(requires_grad=False)


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    kinds = bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt
    return {fqn: module for fqn, module in model.named_modules() if isinstance(module, kinds)}


def of_4_bits(in_features: int, out_features: int, *, repacks: bool = False, **options: Any) -> nn.Linear:
    """Quantize one layer of random weights to NF4; let bitsandbytes repack it in evaluation, where the CPU can."""
    options = {"compute_dtype": torch.float32, "quant_type": "nf4", **options}
    layer = bitsandbytes.nn.Linear4bit(in_features, out_features, **options)
    layer.support_avx512bf16_for_cpu = repacks and REPACKS
    quantized: nn.Linear = layer.to("cpu")
    return quantized


# Checkpoints

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": _nf4,
    "nf4 twice": {**_nf4, **_twice},
    "nf4 in floats": {**_nf4, "bnb_4bit_quant_storage": "bfloat16"},
    "fp4": _fp4,
    "8 bits": _8_bits,
}

KINDS = {name: name.split()[0] if name != "8 bits" else name for name in QUANTIZATIONS}

every_quantization = pytest.mark.parametrize(
    ("kind", "quantization"),
    [*((LLAMA, name) for name in ("nf4", "nf4 twice", "8 bits")), further(LLAMA, "nf4 in floats"), (GPT2, "fp4")],
    ids=lambda value: value if isinstance(value, str) else value.name,
)


def quantize(kind: RealModel, quantization: str, directory: Path, *, is_sharded: bool = False) -> Path:
    """Let transformers quantize a model in bfloat16 and write it, before it computes anything.

    Its shards are small enough for what stands beside codes to be in other files.
    """
    dense = save_model(kind, directory.with_name(f"{directory.name} dense"), dtype=torch.bfloat16)
    return write(load_quantized(dense, quantization), directory, is_sharded=is_sharded, shard="8KB")


def load_quantized(dense: Path, quantization: str) -> Any:
    return _quantized_by(QUANTIZATIONS[quantization], transformers.AutoModelForCausalLM, dense)

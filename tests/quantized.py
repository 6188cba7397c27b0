"""Layers and whole transformers models that bitsandbytes quantized on a CPU, as users load them."""

import copy
from dataclasses import dataclass, replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from torch import nn

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


@dataclass(frozen=True)
class Codes:
    """A way to quantize, with options of a ``BitsAndBytesConfig``, and how far two ways to compute may then differ."""

    name: str
    options: dict[str, Any]
    kind: str = "Linear4bit"
    tolerance: float = 1e-4


_4_bit = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
NF4 = Codes("nf4-double", {**_4_bit, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True})
FP4 = Codes("fp4", {**_4_bit, "bnb_4bit_quant_type": "fp4"})
INT8 = Codes("8bit", {"load_in_8bit": True}, kind="Linear8bitLt", tolerance=0.05)  # rounds its inputs to 8 bits too

_LOADED: dict[tuple[object, ...], Any] = {}
"""Models that were loaded before, which takes longer than to copy one."""


def _loaded(kind: RealModel, options: dict[str, Any], **more: Any) -> Any:
    """Build a model, write it, and load it as a user does; the second time, a copy of what was loaded."""
    key = kind.build, str(options), str(more)
    if key not in _LOADED:
        built: Any = kind.build()
        with TemporaryDirectory() as directory:
            built.save_pretrained(directory)
            config = transformers.BitsAndBytesConfig(**options)
            model: Any = type(built).from_pretrained(directory, quantization_config=config, device_map="cpu", **more)
        model.name_or_path = model.config._name_or_path = ""  # as of the dense one; a directory's is another each time
        _LOADED[key] = model
    return copy.deepcopy(_LOADED[key])


def quantized_model(kind: RealModel, codes: Codes) -> Any:
    """Load a model in float32 with its linear layers quantized, in evaluation mode, that is not repacked there."""
    model = _loaded(kind, codes.options)
    for module in quantized_layers(model).values():
        module.support_avx512bf16_for_cpu = False
    return model


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


def half_precision_model(kind: RealModel, *, bits: int = 4) -> transformers.PreTrainedModel:
    """Load a model in bfloat16 with its linear layers quantized, as users who train do."""
    nf4 = {**FP4.options, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    options = INT8.options if bits == 8 else nf4
    model: transformers.PreTrainedModel = _loaded(kind, options, dtype=torch.bfloat16)
    return model.requires_grad_(requires_grad=False)


def checkpoint_activations(model: Any, *, is_reentrant: bool) -> None:
    """Switch checkpointing on under the name that the installed transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": is_reentrant})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})

"""Checkpoints that transformers writes of models it quantized with bitsandbytes, and what their codes stand for.

The codes are read by tables and loops of this file's own, which share nothing with the library but their subject.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.model_directories import save_model
from tests.models import LLAMA, RealModel

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

POSITIVE_NF4 = (
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
NEGATIVE_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
)
POSITIVE_FP4 = tuple(twelfths / 12 for twelfths in (0, 0.0625, 8, 12, 4, 6, 2, 3))
LEVELS = {"nf4": (*NEGATIVE_NF4, *POSITIVE_NF4), "fp4": (*POSITIVE_FP4, *(-level for level in POSITIVE_FP4))}
"""What codes of 4 bits stand for: the quantiles of a normal distribution, and floats of a sign, 2 bits and 1 bit."""


def wide() -> nn.Module:
    """Build a Llama in whose rows blocks of 64 end where rows end, as bitsandbytes on a CPU wants it."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.eval()


WIDE = RealModel("llama", wide, LLAMA.inputs, LLAMA.targets)


def quantize(kind: RealModel, quantization: str, directory: Path, *, is_sharded: bool = False) -> Path:
    """Let transformers quantize a model in bfloat16 and write it, before it computes anything."""
    dense = save_model(kind, directory.with_name(f"{directory.name} dense"), dtype=torch.bfloat16)
    options = {"max_shard_size": SHARD} if is_sharded else {}
    load_quantized(dense, quantization).save_pretrained(directory, **options)
    return directory


def load_quantized(dense: Path, quantization: str) -> Any:
    """Let transformers quantize a model while it loads it."""
    config = transformers.BitsAndBytesConfig(**QUANTIZATIONS[quantization])
    return transformers.AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, device_map="cpu")


def stored(directory: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def written_out(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write all codes of a checkpoint out in float32, ``(out_features, in_features)``, by their tensors' names."""
    found = {}
    for name in tensors:
        weight, _, kind = name.partition(".quant_state.bitsandbytes__")
        if kind:
            found[weight] = _of_4_bits(weight, kind, tensors)
        elif name.endswith(".SCB"):
            weight = f"{name.removesuffix('.SCB')}.weight"
            found[weight] = _of_8_bits(tensors[weight], tensors[name])
    return found


def _of_8_bits(codes: Tensor, scales: Tensor) -> Tensor:
    per_level = scales.numpy() * np.float32(1 / 127)
    rows = [[np.float32(code) * step for code in row] for row, step in zip(codes.tolist(), per_level, strict=True)]
    return torch.from_numpy(np.array(rows, dtype=np.float32))


def _of_4_bits(weight: str, kind: str, tensors: Mapping[str, Tensor]) -> Tensor:
    said = json.loads(bytes(tensors[f"{weight}.quant_state.bitsandbytes__{kind}"].tolist()))
    scales, levels = _scales(weight, said, tensors), np.array(LEVELS[kind], dtype=np.float32)
    values: list[np.float32] = []
    for byte in tensors[weight].contiguous().view(torch.uint8).flatten().tolist():
        for code in divmod(byte, 16):
            values.append(levels[code] * scales[len(values) // said["blocksize"]])
    return torch.from_numpy(np.array(values[: int(np.prod(said["shape"]))], dtype=np.float32)).view(said["shape"])


def _scales(weight: str, said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> NDArray[np.float32]:
    """Read the scales of blocks, which may be codes of 8 bits themselves."""
    scales = tensors[f"{weight}.absmax"].numpy()
    if "nested_offset" not in said:
        return np.append(scales, scales[-1])  # where a last byte holds one number, the other has a scale too
    table, outer = (tensors[f"{weight}.nested_{part}"].numpy() for part in ("quant_map", "absmax"))
    offset = np.float32(said["nested_offset"])
    nested = [table[code] * outer[place // said["nested_blocksize"]] + offset for place, code in enumerate(scales)]
    return np.array([*nested, 0], dtype=np.float32)

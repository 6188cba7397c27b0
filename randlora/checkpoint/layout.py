"""Names and dtypes on disk, PEFT's own: the files, and the keys of the tensors in one of them."""

from collections.abc import Container

import torch
from torch import Tensor

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"

MODEL_PREFIX = "base_model.model."
LAMBDA_SUFFIX = ".randlora_lambda"
GAMMA_SUFFIX = ".randlora_gamma"
BASIS_A = "randlora_A"
BASIS_B = "randlora_B"
TOP_BASIS_A = f"base_model.{BASIS_A}"
TOP_BASIS_B = f"base_model.{BASIS_B}"

BASE_LAYER = ".base_layer."

HEADER_KEY = "randlora"
FORMAT_VERSION = 1


def trained_key(fqn: str, targets: Container[str]) -> str:
    """Name a parameter trained beside an adapter as PEFT does, which sees an adapted layer's own one level down."""
    module, _, attribute = fqn.rpartition(".")
    return f"{MODEL_PREFIX}{module}{BASE_LAYER}{attribute}" if module in targets else f"{MODEL_PREFIX}{fqn}"


def trained_fqn(key: str, targets: Container[str]) -> str:
    """Read a name of `trained_key` back."""
    fqn = key.removeprefix(MODEL_PREFIX)
    module, _, attribute = fqn.rpartition(BASE_LAYER)
    return f"{module}.{attribute}" if module in targets and "." not in attribute else fqn


def master(tensor: Tensor, device: torch.device | str, *, copy: bool = False) -> Tensor:
    """Take Λ or Γ in float32, or in float64 where it is so: never narrower than it is."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.detach().to(device=device, dtype=dtype, copy=copy).contiguous()


def master_copy(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Take it in memory of its own."""
    return master(tensor, device, copy=True)

"""Inspecting the inputs and the output of an adapted module."""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn


def input_of(owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the input of an adapted module, the first argument of its forward, positional or keyword."""
    return args[0] if args else kwargs.get(owner.randlora_input)


def is_plain_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a strided floating tensor and not of a tensor subclass."""
    if type(value) not in (Tensor, nn.Parameter):
        return False
    assert isinstance(value, Tensor)
    return value.is_floating_point() and value.layout == torch.strided and not value.is_nested


def autocast_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that autocast casts a dtype to on the device of ``x``; the dtype itself without autocast."""
    device = x.device.type
    if dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return dtype
    return torch.get_autocast_dtype(device)


def product_dtype(x: object, weight: Tensor, in_features: int) -> torch.dtype | None:
    """Return the dtype of the product of an input, ``(..., in_features)``, and a weight, both plain tensors.

    ``None`` if they are not plain, or have different dtypes that autocast does not cast to one.
    """
    if not is_plain_tensor(x) or not is_plain_tensor(weight) or x.device != weight.device:
        return None
    if x.dim() == 0 or x.shape[-1] != in_features:
        return None
    dtype = autocast_dtype(x, weight.dtype)
    return dtype if x.dtype == weight.dtype or autocast_dtype(x, x.dtype) == dtype else None


def require_product(owner: Any, output: object, out_features: int) -> None:
    """Raise a `TypeError` unless an adapted module's forward returned a tensor of shape ``(..., out_features)``."""
    if isinstance(output, Tensor) and (output.is_nested or output.shape[-1:] == (out_features,)):
        return
    name = owner.randlora_base.__name__
    got = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    raise TypeError(
        f"the forward of an adapted {name} must return a tensor of shape (..., {out_features}), the product with its "
        f"weight, got {got}: give exclude= that matches it, or register an adapter layer for {name} with "
        "randlora.layers.register_layer"
    )

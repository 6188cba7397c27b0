"""Quantizing and dequantizing with the codes of bitsandbytes, 4 and 8 bits."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

OLDEST = (0, 50)
"""The first version that supports every size and type on a CPU, and the oldest that is tested."""
QUANT_TYPES = ("nf4", "fp4")
WRITABLE = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that bitsandbytes can dequantize to; for others it returns uninitialized memory."""


@cache
def missing() -> str | None:
    """Return why bitsandbytes cannot be used and how to install it, or ``None``."""
    try:
        found = version("bitsandbytes")
    except PackageNotFoundError:
        return 'needs bitsandbytes, which is not installed: pip install "randlora[bnb]"'
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        return f'needs bitsandbytes {wanted} or newer, found {found}: pip install --upgrade "randlora[bnb]"'
    return None


def quant_state(layer: nn.Module, weight: Tensor) -> Any:
    """Return the ``QuantState`` of a 4-bit layer's weight. After sharding, only the layer has it."""
    state = getattr(weight, "quant_state", None)
    return getattr(layer, "quant_state", None) if state is None else state


def write_out_4bit(codes: Tensor, state: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dequantize 4-bit codes.

    Args:
        codes: Codes as bitsandbytes stores them, in any storage dtype, or repacked for a CPU.
        state: Their ``QuantState``, which is not changed.
        dtype: The dtype of the result.

    Returns:
        ``(out_features, in_features)``, each entry a level times its block's scale, rounded once.
    """
    codes, scales = _unpacked(codes, state)
    written = torch.ops.bitsandbytes.dequantize_4bit.default(
        codes, scales, state.blocksize, state.quant_type, state.shape, dtype if dtype in WRITABLE else torch.float32
    )
    result: Tensor = written.to(dtype)
    return result


def _unpacked(codes: Tensor, state: Any) -> tuple[Tensor, Tensor]:
    """Return codes in the order they were quantized in, and their scales in float32."""
    import bitsandbytes.functional as bnb  # noqa: PLC0415  # an optional extra

    if _is_packed(state):  # the scales are transposed and no longer quantized
        scales = state.absmax.float().T.reshape(-1)
        return bnb._convert_weight_packed_for_cpu_inverse(codes, copy.copy(state))[0], scales
    if state.nested:
        return codes, bnb.dequantize_blockwise(state.absmax, state.state2).float() + state.offset
    if _is_turned(state):
        return codes, state.absmax.float().T.reshape(-1)
    return codes, state.absmax.float()


def is_out_of_order(layer: Any, *, repacked: bool = True) -> bool:
    """Whether the codes or scales of a 4-bit layer are in another order than they were quantized in.

    Args:
        layer: Any linear layer.
        repacked: Whether to include codes repacked for a CPU, which bitsandbytes reads correctly but without gradients.
            Scales that it left transposed when it saved a repacked layer are always included: it misreads those.
    """
    state = quant_state(layer, layer.weight)
    if _is_packed(state):
        return repacked
    return state is not None and _is_turned(state)


def put_in_order(layer: Any) -> None:
    """Restore the order of a 4-bit layer's codes. Their scales stay rounded to bfloat16.

    This runs in another thread, where no inference mode or `torch.func` transform of the caller is active, because the
    restored codes must belong to neither.
    """
    with ThreadPoolExecutor(max_workers=1) as aside:
        aside.submit(_put_in_order, layer).result()


def _put_in_order(layer: Any) -> None:
    import bitsandbytes.functional as bnb  # noqa: PLC0415  # an optional extra

    weight, state = layer.weight, quant_state(layer, layer.weight)
    _, scales = _unpacked(weight.data, state)
    if _is_packed(state):
        weight.data, _ = bnb._convert_weight_packed_for_cpu_inverse(weight.data, state)
    if not state.nested:  # bitsandbytes leaves unquantized scales transposed
        state.absmax = scales


def _is_packed(state: Any) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def _is_turned(state: Any) -> bool:
    """Whether scales are transposed, as bitsandbytes 0.50 leaves them when it saves a repacked layer."""
    return not state.nested and state.absmax.ndim == 2


def unreadable(codes: Tensor, state: Any, shape: tuple[int, int]) -> str | None:
    """Return why 4-bit codes do not give a weight of a shape, as a phrase that follows a layer's name, or ``None``."""
    if state.quant_type not in QUANT_TYPES:
        return f"has codes of type {state.quant_type!r}, expected one of {', '.join(QUANT_TYPES)}"
    if tuple(state.shape) != shape:
        return f"was quantized as {tuple(state.shape)}, expected (out, in) = {shape}: quantize it again"
    if is_misread(codes, state):
        return (
            f"has rows of {shape[1]} entries and blocks of {state.blocksize}, which the installed bitsandbytes "
            "dequantizes incorrectly on a CPU: use a block size that divides the row length, or exclude the layer"
        )
    return None


def is_misread(codes: Tensor, state: Any) -> bool:
    """Whether bitsandbytes dequantizes 4-bit codes incorrectly, as 0.50 does on CPUs if blocks do not divide rows.

    Its own layer then computes with other weights than were quantized.
    """
    if codes.device.type != "cpu" or state.shape[1] % state.blocksize == 0:
        return False
    count = state.shape.numel()
    in_order, scales = _unpacked(codes, state)
    pairs = in_order.contiguous().view(torch.uint8).flatten()
    levels = state.code[torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()[:count].int()]
    meant = levels * scales.repeat_interleave(state.blocksize)[:count]
    return not torch.allclose(meant.view(state.shape), write_out_4bit(codes, state))


def round_to_4bit(weight: Tensor, like: Any, storage: torch.dtype) -> tuple[Tensor, Any]:
    """Quantize a weight to 4-bit codes.

    Args:
        weight: ``(out_features, in_features)`` float32.
        like: A ``QuantState`` with the type, the block size, and whether scales are quantized too.
        storage: The dtype that codes are stored in.

    Returns:
        The codes and their ``QuantState``.
    """
    import bitsandbytes.functional as bnb  # noqa: PLC0415  # an optional extra

    is_packed = _is_packed(like)
    codes, state = bnb.quantize_4bit(
        weight.contiguous(),
        blocksize=like.blocksize,
        compress_statistics=like.original_nested if is_packed else like.nested,
        quant_type=like.quant_type,
        quant_storage=getattr(like, "original_storage_type", storage),
    )
    state.dtype = like.original_dtype if is_packed else like.dtype
    return codes, state


def step_4bit(state: Any) -> float:
    """Return the widest gap between two neighboring levels, at the largest scale."""
    scales = _unpacked(torch.empty(0), state)[1]
    return float(state.code.sort().values.diff().max() * scales.max())


def write_out_8bit(codes: Tensor, scales: Tensor) -> Tensor:
    """Dequantize 8-bit codes to float32.

    Args:
        codes: ``(out_features, in_features)`` int8; 127 is the row's scale.
        scales: ``(out_features,)`` float32.
    """
    return codes.float() * (scales.float() * (1 / 127)).unsqueeze(1)


def round_to_8bit(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight to 8-bit codes: each row with its own scale, to the nearest of 255 levels.

    Unlike bitsandbytes this does not round to float16 first.

    Args:
        weight: ``(out_features, in_features)`` float32.

    Returns:
        int8 codes of that shape, and the scales of the rows, ``(out_features,)`` float32.
    """
    scales = weight.abs().amax(dim=1)
    per_level = torch.where(scales > 0, 127 / scales, 0)
    return (weight * per_level.unsqueeze(1)).round().to(torch.int8), scales

"""Quantizing and dequantizing with the codes of bitsandbytes, 4 and 8 bits, and 4-bit codes repacked for a CPU.

On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks the codes of a layer in its first forward pass in evaluation mode.
Such a layer gives no gradient of its input, and saving it can leave its scales transposed. The state of repacked codes
is described only by private names of bitsandbytes, which are all in this file; a test fails if one is renamed. This
code can be deleted when the oldest supported bitsandbytes gives gradients of repacked layers, dequantizes their codes,
and restores their scales when it saves them.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from randlora.errors import how_to_install

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
        return f"needs bitsandbytes, which is not installed: {how_to_install('bnb')}"
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        return f"needs bitsandbytes {wanted} or newer, found {found}: python -m pip install --upgrade bitsandbytes"
    return None


def quant_state(layer: nn.Module, weight: Tensor) -> Any:
    """Return the ``QuantState`` of a 4-bit layer's weight. After sharding, only the layer has it."""
    state = getattr(weight, "quant_state", None)
    return getattr(layer, "quant_state", None) if state is None else state


def write_out_4bit(codes: Tensor, state: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dequantize 4-bit codes, in any storage dtype or repacked for a CPU. Their ``QuantState`` is not changed.

    Returns:
        ``(out_features, in_features)``, each entry a level times its block's scale, rounded once to ``dtype``.
    """
    codes, scales = _in_order(codes, state)
    written = torch.ops.bitsandbytes.dequantize_4bit.default(
        codes, scales, state.blocksize, state.quant_type, state.shape, dtype if dtype in WRITABLE else torch.float32
    )
    result: Tensor = written.to(dtype)
    return result


def _in_order(codes: Tensor, state: Any) -> tuple[Tensor, Tensor]:
    """Return codes in the order they were quantized in, and their scales in float32, without changing the state."""
    if not is_out_of_order(state):
        return codes, _scales(state)
    return _original(codes, copy.copy(state)), state.absmax.float().T.reshape(-1)  # transposed, no longer quantized


def _scales(state: Any) -> Tensor:
    import bitsandbytes.functional as bnb  # noqa: PLC0415  # an optional extra

    absmax: Tensor = state.absmax
    return bnb.dequantize_blockwise(absmax, state.state2).float() + state.offset if state.nested else absmax.float()


def nbytes_beside(state: Any) -> int:
    """Return the bytes of what a ``QuantState`` holds, or 0 if there is none."""
    if state is None:
        return 0
    outer = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return sum(int(held.nbytes) for held in (state.absmax, state.code, *outer))


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

    Its own layer then computes with different weights than were quantized.
    """
    if codes.device.type != "cpu" or state.shape[1] % state.blocksize == 0:
        return False
    count = state.shape.numel()
    in_order, scales = _in_order(codes, state)
    pairs = in_order.contiguous().view(torch.uint8).flatten()
    levels = state.code[torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()[:count].int()]
    meant = levels * scales.repeat_interleave(state.blocksize)[:count]
    return not torch.allclose(meant.view(state.shape), write_out_4bit(codes, state))


def round_to_4bit(weight: Tensor, like: Any, storage: torch.dtype) -> tuple[Tensor, Any]:
    """Quantize a float32 weight, ``(out_features, in_features)``, to 4-bit codes as described by a ``QuantState``.

    Returns:
        The codes in the dtype ``storage``, and their ``QuantState``.
    """
    import bitsandbytes.functional as bnb  # noqa: PLC0415  # an optional extra

    nested, dtype, storage = quantization(like, storage)
    codes, state = bnb.quantize_4bit(
        weight.contiguous(),
        blocksize=like.blocksize,
        compress_statistics=nested,
        quant_type=like.quant_type,
        quant_storage=storage,
    )
    state.dtype = dtype
    return codes, state


def step_4bit(state: Any) -> float:
    """Return the widest gap between two neighboring levels, at the largest scale."""
    scales = _in_order(torch.empty(0, device="cpu"), state)[1]
    return float(state.code.sort().values.diff().max() * scales.max())


def write_out_8bit(codes: Tensor, scales: Tensor) -> Tensor:
    """Dequantize int8 codes, ``(out, in)``, to float32. A code of 127 is the row's scale; ``scales`` is ``(out,)``."""
    return codes.float() * (scales.float() * (1 / 127)).unsqueeze(1)


def round_to_8bit(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight to 8-bit codes: each row with its own scale, to the nearest of 255 levels.

    Unlike bitsandbytes this does not round to float16 first.

    Returns:
        int8 codes, ``(out_features, in_features)``, and the scales of the rows, ``(out_features,)`` float32.
    """
    scales = weight.abs().amax(dim=1)
    per_level = torch.where(scales > 0, 127 / scales, 0)
    return (weight * per_level.unsqueeze(1)).round().to(torch.int8), scales


MAY_REPACK = "support_avx512bf16_for_cpu"
"""The attribute of a 4-bit layer that enables repacking of the codes in its forward."""


def is_out_of_order(state: Any, *, repacked: bool = True) -> bool:
    """Whether 4-bit codes or their scales are in a different order than when they were quantized.

    Args:
        state: Their ``QuantState``, or ``None`` for codes without one.
        repacked: Whether to include repacked codes, which bitsandbytes reads correctly but without gradients. Scales
            that it left transposed are always included, because it misreads them.
    """
    if getattr(state, "packing_format_for_cpu", False):
        return repacked
    return state is not None and not state.nested and state.absmax.ndim == 2


def put_in_order(weight: Any, state: Any) -> None:
    """Restore the order of a weight's codes in place. Their scales stay rounded to bfloat16.

    This runs in a different thread, where no inference mode or `torch.func` transform of the caller is active, because
    the restored codes must belong to neither.
    """

    def restore() -> None:
        weight.data = _original(weight.data, state)
        if not state.nested:  # bitsandbytes leaves unquantized scales transposed
            state.absmax = state.absmax.float().T.reshape(-1)

    with ThreadPoolExecutor(max_workers=1) as aside:
        aside.submit(restore).result()


def _original(codes: Tensor, state: Any) -> Tensor:
    """Return codes in their original order, and change the state to one that describes them."""
    import bitsandbytes.functional as bnb  # noqa: PLC0415  # an optional extra

    if not getattr(state, "packing_format_for_cpu", False):
        return codes
    restored: Tensor = bnb._convert_weight_packed_for_cpu_inverse(codes, state)[0]
    return restored


def quantization(state: Any, storage: torch.dtype) -> tuple[bool, torch.dtype, torch.dtype]:
    """Return whether scales were quantized too, and the dtypes of weight and storage, before any repacking."""
    if not getattr(state, "packing_format_for_cpu", False):
        return state.nested, state.dtype, storage
    return state.original_nested, state.original_dtype, getattr(state, "original_storage_type", storage)

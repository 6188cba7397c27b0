"""4-bit codes that bitsandbytes repacked for a CPU: reading them, and restoring their order.

On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks the codes of a layer in its first forward pass in evaluation mode.
Such a layer gives no gradient of its input, and saving it can leave its scales transposed. The state of repacked codes
is described only by private names of bitsandbytes, which are all in this file; tests/test_layers_bnb_codes.py fails
if one is renamed. The file can be deleted when the oldest supported bitsandbytes gives gradients of repacked layers,
dequantizes their codes, and restores their scales when it saves them.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

MAY_REPACK = "support_avx512bf16_for_cpu"
"""The attribute of a 4-bit layer that enables repacking of the codes in its forward."""


def is_out_of_order(state: Any, *, repacked: bool = True) -> bool:
    """Whether 4-bit codes or their scales are in another order than they were quantized in.

    Args:
        state: Their ``QuantState``, or ``None`` for codes without one.
        repacked: Whether to include repacked codes, which bitsandbytes reads correctly but without gradients. Scales
            that it left transposed are always included: it misreads those.
    """
    if getattr(state, "packing_format_for_cpu", False):
        return repacked
    return state is not None and not state.nested and state.absmax.ndim == 2


def in_order(codes: Tensor, state: Any) -> tuple[Tensor, Tensor]:
    """Return codes that `is_out_of_order` in their original order with float32 scales, without changing the state."""
    scales = state.absmax.float().T.reshape(-1)  # transposed, and no longer quantized
    return _original(codes, copy.copy(state)), scales


def put_in_order(weight: Any, state: Any) -> None:
    """Restore the order of a weight's codes in place. Their scales stay rounded to bfloat16.

    This runs in another thread, where no inference mode or `torch.func` transform of the caller is active, because the
    restored codes must belong to neither.
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

"""Adapter layers of bitsandbytes' linear layers, 4 and 8 bits, and quantizing and dequantizing with its codes.

On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks the codes of a layer in its first forward pass in evaluation mode.
Such a layer gives no gradient of its input, and saving it can leave its scales transposed: it is refused, and adapted
layers are not repacked.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from randlora.errors import AdapterError, how_to_install
from randlora.functional.scratch import is_in_transform
from randlora.layers.base import Product, autocast_dtype, is_plain_tensor
from randlora.layers.registry import register_layer
from randlora.quantized.layer import NOT_HERE, QuantizedLayer

MODULE = "bitsandbytes.nn.modules"
OWN_KERNELS_UP_TO = 1536
"""Number of tokens up to which bitsandbytes may multiply by 4-bit codes on a GPU without dequantizing them."""
NOT_YET = "is not quantized yet: move the model to its device first, as in model.to('cuda'), which quantizes it"
MAY_REPACK = "support_avx512bf16_for_cpu"
"""The attribute of a 4-bit layer that enables repacking of the codes in its forward."""
REPACKED = (
    "was repacked by bitsandbytes in an evaluation on this CPU, or saved after one: it gives no gradients, and its "
    "scales may be misread: load the model's weights again, from files that were saved before, and call "
    "randlora.prepare_quantized(model) before it runs"
)
OLDEST = 0, 50  # the first version that supports every size and type on a CPU
QUANT_TYPES = ("nf4", "fp4")
WRITABLE = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that bitsandbytes can dequantize to; for others it returns uninitialized memory."""


@register_layer(f"{MODULE}.Linear4bit")
class Linear4bitAdapter(QuantizedLayer):
    """Adapts a ``Linear4bit``, NF4 or FP4: one operation if gradients may be needed, else the layer's own forward."""

    kept = ("compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", MAY_REPACK)

    @classmethod
    def obstacle(cls, owner: nn.Module) -> str | None:
        """Return why this layer cannot be adapted, or ``None``."""
        weight = owner.get_parameter("weight")
        state = quant_state(owner, weight)
        if (reason := missing()) is not None:
            return reason
        if weight.is_meta:
            return NOT_HERE
        if is_repacked(state):
            return REPACKED
        return NOT_YET if state is None else unreadable(weight.data, state, cls.features(owner)[::-1])

    @classmethod
    def nbytes_of(cls, owner: nn.Module) -> int:
        """Return the bytes of codes, scales and levels."""
        weight = owner.get_parameter("weight")
        if (state := quant_state(owner, weight)) is None:
            return weight.nbytes
        nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
        return weight.nbytes + sum(int(held.nbytes) for held in (state.absmax, state.code, *nested))

    @classmethod
    def plain_forward(cls) -> Callable[..., Tensor] | None:
        """Return ``Linear4bit.forward``, or ``None`` if it was replaced."""
        return _forward_of("Linear4bit")

    def settle(self, owner: nn.Module) -> None:
        """Disable repacking, because it stops gradients."""
        self.may_repack: object = owner.__dict__.get(MAY_REPACK)
        if MAY_REPACK in owner.__dict__:
            owner.__dict__[MAY_REPACK] = False

    def unsettle(self, owner: nn.Module) -> None:
        """Enable repacking again if it was enabled before."""
        if MAY_REPACK in owner.__dict__:
            owner.__dict__[MAY_REPACK] = self.may_repack

    def compute_dtype(self, owner: Any) -> torch.dtype | None:
        """Return the dtype that the layer computes in: as configured, else the dtype of its first input."""
        return owner.compute_dtype  # type: ignore[no-any-return]

    def product(self, owner: Any, x: object) -> Product | None:
        """Return the product if the layer would dequantize its weight to multiply, so that the update can be added.

        ``None`` under a compiler: the layer saves no dequantized weight for backward, but a trace of ours would.
        """
        if not is_plain_tensor(x) or x.device != owner.weight.device or x.dim() == 0 or x.shape[-1] != self.shape[1]:
            return None
        if torch.compiler.is_compiling() or not owner.compute_type_is_set:
            return None
        if not (owner.training or x.requires_grad or is_in_transform()):  # in which requires_grad does not tell
            return None
        if x.device.type != "cpu" and x.numel() <= OWN_KERNELS_UP_TO * self.shape[1]:
            return None
        dtype = owner.compute_dtype or x.dtype
        if autocast_dtype(x, dtype) != dtype:
            return None
        state = copy.copy(quant_state(owner, owner.weight))  # bitsandbytes changes the state when it repacks
        return Product(partial(write_out_4bit, owner.weight.data, state), dtype, x.dtype)

    def stand_in(self, owner: Any, x: Tensor) -> Any:
        """Return a copy of the layer with a cast bias. Raises an error if its codes were repacked nevertheless."""
        if not owner.compute_type_is_set:  # as the layer's forward does with the first input
            owner.set_compute_type(x)
            owner.compute_type_is_set = True
        _require_order(quant_state(owner, owner.weight))
        return super().stand_in(owner, x)

    def written_out(self, owner: Any, held: tuple[Any, Any] | None = None) -> Tensor:
        """Return the dequantized weight in float32."""
        weight, state = held or (owner.weight, quant_state(owner, owner.weight))
        return write_out_4bit(weight.data, state)

    def requantized(self, owner: nn.Module, weight: Tensor) -> tuple[tuple[Any, Any], float]:
        """Quantize a weight to 4-bit codes of the same type, block size and storage dtype."""
        own = owner.get_parameter("weight")
        codes, state = round_to_4bit(weight, quant_state(owner, own), own.dtype)
        parameter = sys.modules[MODULE].Params4bit(
            codes,
            requires_grad=False,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=codes.dtype,
            module=owner,
            bnb_quantized=True,
        )
        return (parameter, state), step_4bit(state)

    def codes(self, owner: Any) -> tuple[Any, Any]:
        """Return the weight and its ``QuantState``, which the layer holds too in case the weight loses it."""
        return owner.weight, owner.quant_state

    def put_in(self, owner: Any, held: tuple[Any, Any]) -> None:
        """Replace the codes of the layer and their ``QuantState``."""
        owner._parameters["weight"], owner.quant_state = held


@register_layer(f"{MODULE}.Linear8bitLt")
class Linear8bitAdapter(QuantizedLayer):
    """Adapts a ``Linear8bitLt``. Its own forward always runs, because it handles outliers of the input separately."""

    kept = ("state", "index")

    @classmethod
    def obstacle(cls, owner: Any) -> str | None:
        """Return why this layer cannot be adapted, or ``None``."""
        if (reason := missing()) is not None:
            return reason
        if owner.state.has_fp16_weights:
            return "has 16-bit weights besides its codes (has_fp16_weights=True): set that to False, or use nn.Linear"
        if owner.weight.is_meta:
            return NOT_HERE
        if owner.weight.dtype != torch.int8 or _scales(owner) is None:
            return NOT_YET
        return None

    @classmethod
    def nbytes_of(cls, owner: nn.Module) -> int:
        """Return the bytes of codes and scales."""
        scales = _scales(owner)
        return super().nbytes_of(owner) + (0 if scales is None else scales.nbytes)

    @classmethod
    def plain_forward(cls) -> Callable[..., Tensor] | None:
        """Return ``Linear8bitLt.forward``, or ``None`` if it was replaced."""
        return _forward_of("Linear8bitLt")

    def product(self, owner: nn.Module, x: object) -> None:
        """Return ``None``: the layer quantizes its inputs and handles outliers separately."""

    def written_out(self, owner: Any, held: tuple[Any, None, None] | None = None) -> Tensor:
        """Return the dequantized weight in float32. A code of 127 is the row's scale."""
        weight, scales = (owner.weight, _scales(owner)) if held is None else (held[0], held[0].SCB)
        assert scales is not None, "obstacle() asks for scales"
        return weight.data.float() * (scales.float() * (1 / 127)).unsqueeze(1)  # type: ignore[no-any-return]

    def requantized(self, owner: nn.Module, weight: Tensor) -> tuple[tuple[Any, None, None], float]:  # noqa: ARG002
        """Quantize a weight to 8-bit codes, row by row. Unlike bitsandbytes this does not round to float16."""
        scales = weight.abs().amax(dim=1)
        codes = (weight * torch.where(scales > 0, 127 / scales, 0).unsqueeze(1)).round().to(torch.int8)
        parameter = sys.modules[MODULE].Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)
        return (parameter, None, None), float(scales.max() / 127)

    def codes(self, owner: Any) -> tuple[Any, Tensor | None, Tensor | None]:
        """Return the weight, and its state's codes and scales, which are ``None`` until the first forward."""
        return owner.weight, owner.state.CB, owner.state.SCB

    def put_in(self, owner: Any, held: tuple[Any, Tensor | None, Tensor | None]) -> None:
        """Replace the codes of the layer and their scales."""
        owner._parameters["weight"], owner.state.CB, owner.state.SCB = held


def _forward_of(kind: str) -> Callable[..., Tensor] | None:
    """Return the forward of a class of bitsandbytes, or ``None`` if it was replaced."""
    forward: Callable[..., Tensor] = getattr(sys.modules[MODULE], kind).forward
    return forward if forward.__module__ == MODULE else None


def _scales(owner: Any) -> Tensor | None:
    scales: Tensor | None = owner.state.SCB
    return getattr(owner.weight, "SCB", None) if scales is None else scales


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
    """Dequantize 4-bit codes, in any storage dtype, to ``(out_features, in_features)``."""
    _require_order(state)
    wide = dtype if dtype in WRITABLE else torch.float32
    dequantize = torch.ops.bitsandbytes.dequantize_4bit.default
    written: Tensor = dequantize(codes, _absmax(state), state.blocksize, state.quant_type, state.shape, wide)
    return written.to(dtype)


def _require_order(state: Any) -> None:
    if is_repacked(state):
        raise AdapterError(f"the weight of an adapted Linear4bit {REPACKED}")


def _absmax(state: Any) -> Tensor:
    import bitsandbytes.functional as bnb  # noqa: PLC0415  # an optional extra

    absmax: Tensor = state.absmax
    return bnb.dequantize_blockwise(absmax, state.state2).float() + state.offset if state.nested else absmax.float()


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
    """Whether bitsandbytes dequantizes 4-bit codes incorrectly, as 0.50 does on CPUs if blocks do not divide rows."""
    if codes.device.type != "cpu" or state.shape[1] % state.blocksize == 0:
        return False
    count = state.shape.numel()
    pairs = codes.contiguous().view(torch.uint8).flatten()
    levels = state.code[torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()[:count].int()]
    expected = levels * _absmax(state).repeat_interleave(state.blocksize)[:count]
    return not torch.allclose(expected.view(state.shape), write_out_4bit(codes, state))


def round_to_4bit(weight: Tensor, like: Any, storage: torch.dtype) -> tuple[Tensor, Any]:
    """Return 4-bit codes of a float32 weight as a ``QuantState`` describes them, in a dtype, and their state."""
    import bitsandbytes.functional as bnb  # noqa: PLC0415  # an optional extra

    codes, state = bnb.quantize_4bit(
        weight.contiguous(),
        blocksize=like.blocksize,
        compress_statistics=like.nested,
        quant_type=like.quant_type,
        quant_storage=storage,
    )
    state.dtype = like.dtype
    return codes, state


def step_4bit(state: Any) -> float:
    """Return the widest gap between two neighboring levels, at the largest scale."""
    return float(state.code.sort().values.diff().max() * _absmax(state).max())


def is_repacked(state: Any) -> bool:
    """Whether 4-bit codes or their scales are in a different order than when they were quantized."""
    is_packed = getattr(state, "packing_format_for_cpu", False)
    return is_packed or (state is not None and not state.nested and state.absmax.ndim == 2)  # as saving leaves scales

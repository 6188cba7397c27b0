"""Adapter layers of bitsandbytes' linear layers, 4 and 8 bits. The weights stay quantized while adapters train.

bitsandbytes is imported only if the model has one of its layers.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from randlora.functional.scratch import is_in_transform
from randlora.layers.base import Product
from randlora.layers.inputs import autocast_dtype, is_plain_tensor
from randlora.layers.registry import register_layer
from randlora.quantized import bnb_codes
from randlora.quantized.bnb_codes import MAY_REPACK
from randlora.quantized.layer import NOT_HERE, QuantizedLayer, twin_of

MODULE = "bitsandbytes.nn.modules"
OWN_KERNELS_UP_TO = 1536
"""Number of tokens up to which bitsandbytes may multiply by 4-bit codes on a GPU without dequantizing them."""
NOT_YET = "is not quantized yet: move the model to its device first, as in model.to('cuda'), which quantizes it"


@register_layer(f"{MODULE}.Linear4bit")
class Linear4bitAdapter(QuantizedLayer):
    """Adapts a ``Linear4bit``, NF4 or FP4.

    If gradients may be needed, the weight is dequantized for one product at a time, and layer and adapter are one
    operation. Otherwise the layer's own forward runs, with the kernels of bitsandbytes.
    """

    kept = ("compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", MAY_REPACK)

    @classmethod
    def obstacle(cls, owner: nn.Module) -> str | None:
        """Return why this layer cannot be adapted, or ``None``."""
        weight = owner.get_parameter("weight")
        state = bnb_codes.quant_state(owner, weight)
        if (reason := bnb_codes.missing()) is not None:
            return reason
        if weight.is_meta:
            return NOT_HERE
        return NOT_YET if state is None else bnb_codes.unreadable(weight.data, state, cls.features(owner)[::-1])

    @classmethod
    def nbytes_of(cls, owner: nn.Module) -> int:
        """Return the bytes of codes, scales and levels."""
        weight = owner.get_parameter("weight")
        return weight.nbytes + bnb_codes.nbytes_beside(bnb_codes.quant_state(owner, weight))

    @classmethod
    def plain_forward(cls) -> Callable[..., Tensor] | None:
        """Return ``Linear4bit.forward``, or ``None`` if it was replaced."""
        return _forward_of("Linear4bit")

    def settle(self, owner: nn.Module) -> None:
        """Restore codes that were repacked for a CPU and disable repacking, because it stops gradients."""
        put_in_order(owner)
        self.may_repack: object = owner.__dict__.get(MAY_REPACK)
        if MAY_REPACK in owner.__dict__:
            owner.__dict__[MAY_REPACK] = False

    def unsettle(self, owner: nn.Module) -> None:
        """Enable repacking again if it was enabled before."""
        if MAY_REPACK in owner.__dict__:
            owner.__dict__[MAY_REPACK] = self.may_repack

    def compute_dtype(self, owner: Any) -> torch.dtype | None:
        """Return the dtype that the layer computes in: as configured, else the dtype of its first input."""
        dtype: torch.dtype | None = owner.compute_dtype
        return dtype

    def product(self, owner: Any, x: object) -> Product | None:
        """Return the product if the layer would dequantize its weight to multiply, so that the update can be added.

        In evaluation the layer may use other kernels. ``None`` under a compiler too: the layer saves no dequantized
        weight for backward, but a trace of our operation would.
        """
        if not is_plain_tensor(x) or x.device != owner.weight.device or x.dim() == 0 or x.shape[-1] != self.shape[1]:
            return None
        if not _may_lead_gradients(owner, x) or not owner.compute_type_is_set or torch.compiler.is_compiling():
            return None
        if x.device.type != "cpu" and x.numel() <= OWN_KERNELS_UP_TO * self.shape[1]:
            return None
        dtype = owner.compute_dtype or x.dtype
        if autocast_dtype(x, dtype) != dtype:
            return None
        state = copy.copy(bnb_codes.quant_state(owner, owner.weight))  # bitsandbytes changes the state when it repacks
        return Product(partial(bnb_codes.write_out_4bit, owner.weight.data, state), dtype, x.dtype)

    def stand_in(self, owner: Any, x: Tensor) -> Any:
        """Return a copy of the layer on which its forward runs, with ordered codes if it would misread the owner's.

        Codes may have been repacked, or scales transposed, after the adapter was added. The owner keeps them.
        """
        if not owner.compute_type_is_set:  # as the layer's forward does with the first input
            owner.set_compute_type(x)
            owner.compute_type_is_set = True
        twin = super().stand_in(owner, x)
        state = bnb_codes.quant_state(owner, owner.weight)
        if bnb_codes.is_out_of_order(state, repacked=_may_lead_gradients(owner, x)):
            weight, state = copy.copy(owner.weight), copy.copy(state)
            bnb_codes.put_in_order(weight, state)
            twin = twin_of(owner) if twin is None else twin
            twin._parameters["weight"], weight.quant_state, twin.quant_state = weight, state, state
            twin.__dict__[MAY_REPACK] = False
        return twin

    def written_out(self, owner: Any, held: tuple[Any, Any] | None = None) -> Tensor:
        """Return the dequantized weight in float32."""
        weight, state = held or (owner.weight, bnb_codes.quant_state(owner, owner.weight))
        return bnb_codes.write_out_4bit(weight.data, state)

    def requantized(self, owner: nn.Module, weight: Tensor) -> tuple[tuple[Any, Any], float]:
        """Quantize a weight to 4-bit codes of the same type, block size and storage dtype."""
        own = owner.get_parameter("weight")
        codes, state = bnb_codes.round_to_4bit(weight, bnb_codes.quant_state(owner, own), own.dtype)
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
        return (parameter, state), bnb_codes.step_4bit(state)

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
        if (reason := bnb_codes.missing()) is not None:
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
        """Return the dequantized weight in float32."""
        weight, scales = (owner.weight, _scales(owner)) if held is None else (held[0], held[0].SCB)
        assert scales is not None, "obstacle() asks for scales"
        return bnb_codes.write_out_8bit(weight.data, scales)

    def requantized(self, owner: nn.Module, weight: Tensor) -> tuple[tuple[Any, None, None], float]:  # noqa: ARG002
        """Quantize a weight to 8-bit codes, row by row."""
        codes, scales = bnb_codes.round_to_8bit(weight)
        parameter = sys.modules[MODULE].Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)
        return (parameter, None, None), float(scales.max() / 127)

    def codes(self, owner: Any) -> tuple[Any, Tensor | None, Tensor | None]:
        """Return the weight, and its state's codes and scales, which are ``None`` until the first forward."""
        return owner.weight, owner.state.CB, owner.state.SCB

    def put_in(self, owner: Any, held: tuple[Any, Tensor | None, Tensor | None]) -> None:
        """Replace the codes of the layer and their scales."""
        owner._parameters["weight"], owner.state.CB, owner.state.SCB = held


def put_in_order(layer: Any) -> bool:
    """Restore codes of a 4-bit layer that were repacked for a CPU, and return whether they were."""
    state = bnb_codes.quant_state(layer, layer.weight)
    if not bnb_codes.is_out_of_order(state):
        return False
    bnb_codes.put_in_order(layer.weight, state)
    return True


def _forward_of(kind: str) -> Callable[..., Tensor] | None:
    forward: Callable[..., Tensor] = getattr(sys.modules[MODULE], kind).forward
    return forward if forward.__module__ == MODULE else None


def _may_lead_gradients(owner: nn.Module, x: Tensor) -> bool:
    """Whether gradients may be needed. Under a `torch.func` transform, ``requires_grad`` of the input does not tell."""
    return owner.training or x.requires_grad or (is_in_transform() and not torch.compiler.is_compiling())


def _scales(owner: Any) -> Tensor | None:
    scales: Tensor | None = owner.state.SCB
    return getattr(owner.weight, "SCB", None) if scales is None else scales

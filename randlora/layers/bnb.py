"""The linear layers of bitsandbytes, 4 and 8 bits: frozen codes that stay codes while adapters train on them.

bitsandbytes is imported where there is a layer of it, and nowhere else.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from randlora.functional.scratch import is_transformed
from randlora.layers import bnb_codes
from randlora.layers.base import Reading
from randlora.layers.inputs import autocast_dtype
from randlora.layers.quantized import QuantizedLayer, twin_of
from randlora.layers.registry import register_layer
from randlora.state import ModelState

MODULE = "bitsandbytes.nn.modules"
MAY_REPACK = "support_avx512bf16_for_cpu"
"""An attribute of a 4-bit layer that its forward asks before it repacks the codes for a CPU."""
OWN_KERNELS_UP_TO = 1536
"""Tokens up to which bitsandbytes may multiply by 4-bit codes as they are, on a GPU, and not write them out first."""
NOT_HERE = "has codes that are not here (meta, offloaded): load the model's weights first"
NOT_YET = "holds no codes yet: move the model to its device first, as in model.to('cuda'), which quantizes it"


class Codes4bit(NamedTuple):
    """What a 4-bit layer computes with: the layer holds the state too, for a weight that loses its own."""

    weight: Any
    quant_state: Any


@register_layer(f"{MODULE}.Linear4bit")
class Linear4bitAdapter(QuantizedLayer):
    """Adapts a ``Linear4bit``, NF4 or FP4.

    Where gradients are wanted, codes are written out for as long as one product takes, and layer and adapter are one
    operation. Elsewhere the layer's own forward runs, with whatever kernels bitsandbytes has.
    """

    kept = ("compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", MAY_REPACK)

    def __init__(self, owner: nn.Module, state: ModelState) -> None:
        """Describe a layer that is about to be adapted."""
        super().__init__(owner, state)
        self.may_repack: object = owner.__dict__.get(MAY_REPACK)

    @classmethod
    def obstacle(cls, owner: nn.Module) -> str | None:
        """Return why this very layer cannot be adapted."""
        weight = owner.get_parameter("weight")
        state = bnb_codes.quant_state(owner, weight)
        if (reason := bnb_codes.missing()) is not None:
            return reason
        if weight.is_meta:
            return NOT_HERE
        return NOT_YET if state is None else bnb_codes.unreadable(weight.data, state, cls.shape_of(owner))

    @classmethod
    def plain_forward(cls) -> Callable[..., Tensor] | None:
        """Return ``Linear4bit.forward``, unless another was put in its place."""
        return _forward_of("Linear4bit")

    def settle(self, owner: nn.Module) -> None:
        """Put codes that were repacked for a CPU in order, and keep them so: no gradient passes repacked ones."""
        if bnb_codes.is_out_of_order(owner):
            bnb_codes.put_in_order(owner)
        if MAY_REPACK in owner.__dict__:
            owner.__dict__[MAY_REPACK] = False

    def unsettle(self, owner: nn.Module) -> None:
        """Let bitsandbytes repack the codes again, if it could before."""
        if MAY_REPACK in owner.__dict__:
            owner.__dict__[MAY_REPACK] = self.may_repack

    def compute_dtype(self, owner: nn.Module) -> torch.dtype | None:
        """Return the dtype that the layer computes in: as set, else that of its first input."""
        base: Any = owner
        dtype: torch.dtype | None = base.compute_dtype
        return dtype

    def only_multiplies(self, owner: nn.Module, x: Tensor) -> bool:
        """Whether the layer would write its codes out and multiply, which can be done with the update added.

        In evaluation it may compute otherwise. Compiled, it keeps no weight for backward; ours, seen through by the
        compiler, would keep the weight written out.
        """
        base: Any = owner
        if x.device != base.weight.device or x.dim() == 0 or x.shape[-1] != self.shape[1]:
            return False
        if not _may_lead_gradients(owner, x) or not base.compute_type_is_set or torch.compiler.is_compiling():
            return False
        if x.device.type != "cpu" and x.numel() <= OWN_KERNELS_UP_TO * self.shape[1]:
            return False
        dtype = base.compute_dtype or x.dtype
        return autocast_dtype(x, dtype) == dtype

    def reading(self, owner: nn.Module, x: Tensor) -> Reading:
        """Return how the codes are written out where `only_multiplies` holds."""
        base: Any = owner
        state = copy.copy(bnb_codes.quant_state(owner, base.weight))  # bitsandbytes changes its own when it repacks
        write_out = partial(bnb_codes.write_out_4bit, base.weight.data, state)
        return Reading(write_out, base.compute_dtype or x.dtype, x.dtype)

    def stand_in(self, owner: nn.Module, x: Tensor) -> Any:
        """Return what the kind's forward runs on: with codes in order, if it would misread the owner's.

        Codes may have been repacked, or scales turned, after the adapter came. The owner keeps them as they are.
        """
        base: Any = owner
        if not base.compute_type_is_set:  # as its own forward does with the first input
            base.set_compute_type(x)
            base.compute_type_is_set = True
        twin = super().stand_in(owner, x)
        if bnb_codes.is_out_of_order(owner, repacked=_may_lead_gradients(owner, x)):
            weight = copy.copy(base.weight)
            weight.quant_state = copy.copy(bnb_codes.quant_state(owner, base.weight))
            twin = twin_of(owner) if twin is None else twin
            twin._parameters["weight"], twin.quant_state = weight, weight.quant_state
            twin.__dict__[MAY_REPACK] = False
            bnb_codes.put_in_order(twin)
        return twin

    def written_out(self, owner: nn.Module, held: Codes4bit | None = None) -> Tensor:
        """Return the weight that 4-bit codes stand for, in float32."""
        weight = owner.get_parameter("weight") if held is None else held.weight
        state = bnb_codes.quant_state(owner, weight) if held is None else held.weight.quant_state
        return bnb_codes.write_out_4bit(weight.data, state)

    def requantized(self, owner: nn.Module, weight: Tensor) -> tuple[Codes4bit, float]:
        """Round a weight to 4-bit codes of the same type, block size and storage."""
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
        return Codes4bit(parameter, state), bnb_codes.step_4bit(state)

    def codes(self, owner: nn.Module) -> Codes4bit:
        """Return the codes that the layer reads now."""
        base: Any = owner
        return Codes4bit(base.weight, base.quant_state)

    def put_in(self, owner: nn.Module, held: Codes4bit) -> None:
        """Let the layer read other codes, with the state they are read by."""
        base: Any = owner
        base._parameters["weight"], base.quant_state = held


class Codes8bit(NamedTuple):
    """What an 8-bit layer computes with: its scales lie at the weight until the first forward, then in the state."""

    weight: Any
    codes: Tensor | None
    scales: Tensor | None


@register_layer(f"{MODULE}.Linear8bitLt")
class Linear8bitAdapter(QuantizedLayer):
    """Adapts a ``Linear8bitLt``, whose own forward always runs: it treats outliers of the input apart."""

    kept = ("state", "index")

    @classmethod
    def obstacle(cls, owner: nn.Module) -> str | None:
        """Return why this very layer cannot be adapted."""
        base: Any = owner
        if (reason := bnb_codes.missing()) is not None:
            return reason
        if base.state.has_fp16_weights:
            return "keeps 16-bit weights beside its codes (has_fp16_weights=True): set that to False, or use nn.Linear"
        if base.weight.is_meta:
            return NOT_HERE
        if base.weight.dtype != torch.int8 or _scales(base) is None:
            return NOT_YET
        return None

    @classmethod
    def plain_forward(cls) -> Callable[..., Tensor] | None:
        """Return ``Linear8bitLt.forward``, unless another was put in its place."""
        return _forward_of("Linear8bitLt")

    def only_multiplies(self, owner: nn.Module, x: Tensor) -> bool:  # noqa: ARG002
        """Return ``False``: the layer rounds its inputs, and treats outliers apart."""
        return False

    def compute_dtype(self, owner: nn.Module) -> None:  # noqa: ARG002
        """Return ``None``: an 8-bit layer computes in the dtype of its input."""
        return

    def written_out(self, owner: nn.Module, held: Codes8bit | None = None) -> Tensor:
        """Return the weight that 8-bit codes stand for, in float32."""
        weight = owner.get_parameter("weight") if held is None else held.weight
        scales = _scales(owner) if held is None else held.weight.SCB
        assert scales is not None, "obstacle() asks for scales"
        return bnb_codes.write_out_8bit(weight.data, scales)

    def requantized(self, owner: nn.Module, weight: Tensor) -> tuple[Codes8bit, float]:  # noqa: ARG002
        """Round a weight to 8-bit codes, row by row."""
        codes, scales = bnb_codes.round_to_8bit(weight)
        parameter = sys.modules[MODULE].Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)
        return Codes8bit(parameter, None, None), float(scales.max() / 127)

    def codes(self, owner: nn.Module) -> Codes8bit:
        """Return the codes that the layer reads now."""
        base: Any = owner
        return Codes8bit(base.weight, base.state.CB, base.state.SCB)

    def put_in(self, owner: nn.Module, held: Codes8bit) -> None:
        """Let the layer read other codes, with their scales."""
        base: Any = owner
        base._parameters["weight"], base.state.CB, base.state.SCB = held


def _forward_of(kind: str) -> Callable[..., Tensor] | None:
    forward: Callable[..., Tensor] = getattr(sys.modules[MODULE], kind).forward
    return forward if forward.__module__ == MODULE else None


def _may_lead_gradients(owner: nn.Module, x: Tensor) -> bool:
    """Whether gradients may be wanted; inside of a transform of torch's, the input does not tell."""
    return owner.training or x.requires_grad or (is_transformed() and not torch.compiler.is_compiling())


def _scales(owner: Any) -> Tensor | None:
    scales: Tensor | None = owner.state.SCB
    return getattr(owner.weight, "SCB", None) if scales is None else scales

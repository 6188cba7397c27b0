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
from randlora.layers.inputs import autocast_dtype, first_of
from randlora.layers.quantized import QuantizedLayer
from randlora.layers.registry import register_layer

MODULE = "bitsandbytes.nn.modules"
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

    Where gradients are wanted, codes are written out for as long as one product takes, and base and adapter are one
    operation. Elsewhere the base layer runs, with whatever kernels bitsandbytes has.
    """

    @classmethod
    def obstacle(cls, base_layer: nn.Module) -> str | None:
        """Say why this very layer cannot be adapted."""
        weight = base_layer.get_parameter("weight")
        state = bnb_codes.quant_state(base_layer, weight)
        if (reason := bnb_codes.missing()) is not None:
            return reason
        if weight.is_meta:
            return NOT_HERE
        in_features, out_features = cls.features(base_layer)
        return NOT_YET if state is None else bnb_codes.unreadable(weight.data, state, (out_features, in_features))

    @classmethod
    def plain_forward(cls) -> Callable[..., Tensor] | None:
        """Return that of ``Linear4bit``, if nobody put another in its place."""
        return _forward_of("Linear4bit")

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype the base layer computes in: as set, else that of its first input."""
        base: Any = self.base_layer
        dtype: torch.dtype | None = base.compute_dtype
        return dtype

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Do what every adapter layer does, with codes in an order through which gradients pass where any may."""
        x = first_of(args, kwargs)
        if bnb_codes.is_out_of_order(self.base_layer, repacked=self._may_lead_gradients(x)):
            bnb_codes.put_in_order(self.base_layer)
        return super().forward(*args, **kwargs)

    def only_multiplies(self, x: Tensor) -> bool:
        """Whether the base layer would write its codes out and multiply, which can be done with the update added.

        In evaluation it may compute otherwise. Compiled, it keeps no weight for backward; ours, seen through by the
        compiler, would keep the weight written out.
        """
        base: Any = self.base_layer
        if not self._may_lead_gradients(x) or not base.compute_type_is_set or torch.compiler.is_compiling():
            return False
        if x.device != self.weight.device or x.dim() == 0 or x.shape[-1] != self.in_features:
            return False
        if x.device.type != "cpu" and x.numel() <= OWN_KERNELS_UP_TO * self.in_features:
            return False
        dtype = self.compute_dtype or x.dtype
        return autocast_dtype(x, dtype) == dtype

    def _may_lead_gradients(self, x: Any) -> bool:
        """Whether gradients may be wanted; inside of a transform of torch's, the input does not tell."""
        is_inside = is_transformed() and not torch.compiler.is_compiling()
        return self.base_layer.training or getattr(x, "requires_grad", False) or is_inside

    def reading(self, x: Tensor) -> Reading:
        """Say how the codes are written out where `only_multiplies` holds."""
        state = copy.copy(self._quant_state)  # bitsandbytes changes its own when it repacks, maybe before backward
        write_out = partial(bnb_codes.write_out_4bit, self.weight.data, state)
        return Reading(write_out, self.compute_dtype or x.dtype, x.dtype)

    @property
    def _quant_state(self) -> Any:
        return bnb_codes.quant_state(self.base_layer, self.weight)

    def written_out(self, held: Codes4bit | None = None) -> Tensor:
        """Write 4-bit codes out in float32."""
        weight, state = (self.weight, self._quant_state) if held is None else (held.weight, held.weight.quant_state)
        return bnb_codes.write_out_4bit(weight.data, state)

    def requantized(self, weight: Tensor) -> tuple[Codes4bit, float]:
        """Round a weight to 4-bit codes of the same type, block size and storage."""
        codes, state = bnb_codes.round_to_4bit(weight, self._quant_state, self.weight.dtype)
        parameter = sys.modules[MODULE].Params4bit(
            codes,
            requires_grad=False,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=codes.dtype,
            module=self.base_layer,
            bnb_quantized=True,
        )
        return Codes4bit(parameter, state), bnb_codes.step_4bit(state)

    def codes(self) -> Codes4bit:
        """Name the codes that the base layer reads now."""
        base: Any = self.base_layer
        return Codes4bit(base.weight, base.quant_state)

    def put_in(self, held: Codes4bit) -> None:
        """Let the base layer read other codes, with the state they are read by."""
        base: Any = self.base_layer
        base._parameters["weight"], base.quant_state = held


class Codes8bit(NamedTuple):
    """What an 8-bit layer computes with: its scales lie at the weight until the first forward, then in the state."""

    weight: Any
    codes: Tensor | None
    scales: Tensor | None


@register_layer(f"{MODULE}.Linear8bitLt")
class Linear8bitAdapter(QuantizedLayer):
    """Adapts a ``Linear8bitLt``, whose own forward always runs: it treats outliers of the input apart."""

    @classmethod
    def obstacle(cls, base_layer: nn.Module) -> str | None:
        """Say why this very layer cannot be adapted."""
        base: Any = base_layer
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
        """Return that of ``Linear8bitLt``, if nobody put another in its place."""
        return _forward_of("Linear8bitLt")

    def only_multiplies(self, x: Tensor) -> bool:  # noqa: ARG002
        """Never: it rounds its inputs, and treats outliers apart."""
        return False

    @property
    def compute_dtype(self) -> None:
        """No dtype of its own: an 8-bit layer computes in that of whatever comes in."""
        return

    def written_out(self, held: Codes8bit | None = None) -> Tensor:
        """Write 8-bit codes out in float32."""
        weight, scales = (self.weight, _scales(self.base_layer)) if held is None else (held.weight, held.weight.SCB)
        assert scales is not None, "obstacle() asks for scales"
        return bnb_codes.write_out_8bit(weight.data, scales)

    def requantized(self, weight: Tensor) -> tuple[Codes8bit, float]:
        """Round a weight to 8-bit codes, row by row."""
        codes, scales = bnb_codes.round_to_8bit(weight)
        parameter = sys.modules[MODULE].Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)
        return Codes8bit(parameter, None, None), float(scales.max() / 127)

    def codes(self) -> Codes8bit:
        """Name the codes that the base layer reads now."""
        base: Any = self.base_layer
        return Codes8bit(base.weight, base.state.CB, base.state.SCB)

    def put_in(self, held: Codes8bit) -> None:
        """Let the base layer read other codes, with their scales."""
        base: Any = self.base_layer
        base._parameters["weight"], base.state.CB, base.state.SCB = held


def _forward_of(kind: str) -> Callable[..., Tensor] | None:
    forward: Callable[..., Tensor] = getattr(sys.modules[MODULE], kind).forward
    return forward if forward.__module__ == MODULE else None


def _scales(base_layer: Any) -> Tensor | None:
    scales: Tensor | None = base_layer.state.SCB
    return getattr(base_layer.weight, "SCB", None) if scales is None else scales

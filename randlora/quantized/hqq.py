"""The adapter layer of layers that HQQ quantized, to 1 to 8 bits. hqq is imported only if the model has one of them.

Written for hqq 0.2.8.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from randlora.layers.registry import register_layer
from randlora.layers.update import Into
from randlora.quantized.layer import QuantizedLayer, twin_of

MODULE = "hqq.core.quantize"


@register_layer(f"{MODULE}.HQQLinear")
class HQQAdapter(QuantizedLayer):
    """Adapts an ``HQQLinear``. Its own forward runs, with any of its backends, and the adapter's output is added."""

    kept: ClassVar[tuple[str, ...]] = (
        *("ready", "in_gpu", "bias", "axis", "channel_wise", "device", "compute_dtype", "quant_config", "del_orig"),
        *("offload_meta", "linear_layer", "meta", "encoded_state_dict"),
    )

    @classmethod
    def plain_forward(cls) -> Callable[..., Tensor] | None:
        """Return ``HQQLinear.forward``, which belongs to the chosen backend."""
        forward: Callable[..., Tensor] = sys.modules[MODULE].HQQLinear.forward
        return forward

    @classmethod
    def nbytes_of(cls, owner: Any) -> int:
        """Return the bytes of codes, scales and zeros."""
        return super().nbytes_of(owner) + sum(held.nbytes for held in owner.meta.values() if isinstance(held, Tensor))

    def product(self, owner: nn.Module, x: object) -> None:
        """Return ``None``: the layer's own forward dequantizes and multiplies."""

    def compute_dtype(self, owner: Any) -> torch.dtype | None:
        """Return the dtype that the layer computes in."""
        dtype: torch.dtype | None = owner.compute_dtype
        return dtype

    def merge_obstacle(self, owner: Any, into: Into | None) -> str | None:
        """Return why the owner cannot be quantized again, or become a plain layer, or ``None``."""
        if into is not None and into.quantized == "requantize" and "scale" not in owner.meta:
            return "has scales that are quantized or offloaded: merge with quantized='dequantize'"
        return super().merge_obstacle(owner, into)

    def written_out(self, owner: Any, held: tuple[nn.Parameter, dict[str, Any]] | None = None) -> Tensor:
        """Return the dequantized weight in float32."""
        twin = twin_of(owner)
        codes, meta = held or self.codes(owner)
        twin._parameters["W_q"], twin.meta = codes, dict(meta)  # dequantizing adds to it, and removes
        weight: Tensor = twin.dequantize().float()
        return weight

    def requantized(self, owner: Any, weight: Tensor) -> tuple[tuple[nn.Parameter, dict[str, Any]], float]:
        """Quantize a weight to codes of as many bits, with a scale for as many entries."""
        options = copy.deepcopy(owner.quant_config)
        layer = type(owner).randlora_base(
            None, {**options, "offload_meta": False}, compute_dtype=owner.compute_dtype, device=str(weight.device)
        )
        layer.quantize(weight, **options)
        return (layer.W_q, layer.meta), float(layer.meta["scale"].abs().max())

    def codes(self, owner: Any) -> tuple[nn.Parameter, dict[str, Any]]:
        """Return the codes with their scales and the way in which they are packed."""
        return owner.W_q, owner.meta

    def put_in(self, owner: Any, held: tuple[nn.Parameter, dict[str, Any]]) -> None:
        """Replace the codes of the layer and their scales."""
        owner._parameters["W_q"], owner.meta = held

    def write_state(self, layer: nn.Module, destination: dict[str, Any], prefix: str) -> None:
        """Write the entries that the layer itself writes, which torch's own saving leaves out."""
        layer.state_dict(destination=destination, prefix=prefix)

    def move(self, owner: Any, device: torch.device) -> None:
        """Move the owner. Its ``to`` does nothing."""
        owner.cuda(str(device))

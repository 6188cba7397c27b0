"""Layers whose weight is stored as codes: what merging makes of them, whatever the codes are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from randlora.layers.base import AdapterLayer
from randlora.layers.folding import Into, Merged, RoundingLoss
from randlora.layers.inputs import first_of, is_autocast


class QuantizedLayer(AdapterLayer):
    """Adapts a layer that computes with a weight it stores as codes and scales.

    A subclass is final and says how its kind writes codes out and rounds a weight to codes.

    Attributes:
        input_dtype: That of the last input outside of autocast, if there was one; such a layer casts what it is given,
            and a plain one would not.
    """

    input_dtype: torch.dtype | None = None

    @staticmethod
    def features(base_layer: nn.Module) -> tuple[int, int]:
        """Read ``(in_features, out_features)``, which the shape of the codes need not show."""
        assert isinstance(base_layer, nn.Linear)
        return base_layer.in_features, base_layer.out_features

    @staticmethod
    def in_storage_layout(delta: Tensor) -> Tensor:
        """Return ``(out_features, in_features)`` as it is: that is how codes are written out."""
        return delta

    @property
    @abstractmethod
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype the base layer computes in, ``None`` for that of whatever comes in."""

    @abstractmethod
    def written_out(self, held: Any = None) -> Tensor:
        """Write the weight out, ``(out_features, in_features)`` float32: the base layer's, or that of what is held."""

    @abstractmethod
    def requantized(self, weight: Tensor) -> tuple[Any, float]:
        """Round a weight, ``(out_features, in_features)`` float32, to codes of the base layer's kind.

        Returns:
            What `put_in` takes, and the widest gap between neighboring levels at the largest scale.
        """

    @abstractmethod
    def codes(self) -> Any:
        """Name the codes that the base layer reads now, with all they are read by."""

    @abstractmethod
    def put_in(self, held: Any) -> None:
        """Let the base layer read other codes, with all they are read by."""

    def merge_obstacle(self, into: Into) -> str | None:
        """Refuse to put a plain layer where the base layer does more than a plain layer can take over."""
        if into.quantized == "requantize" or self.runs_plain_forward():
            return None
        return (
            "has hooks or a forward of its own, as of a subclass or of accelerate, which an nn.Linear would lose: "
            "remove them first, or merge with quantized='requantize'"
        )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Do what every adapter layer does, and note the dtype of the input."""
        x = first_of(args, kwargs)
        if isinstance(x, Tensor) and x.dtype != self.input_dtype and not is_autocast(x):
            self.input_dtype = x.dtype
        return super().forward(*args, **kwargs)

    def base_output(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer, with a copy of a bias that is trained: it would cast that in its place."""
        bias, x = self.base_layer._parameters.get("bias"), first_of(args, kwargs)
        is_plain = type(self.base_layer) is nn.Linear  # while it is merged so
        if bias is None or not bias.requires_grad or is_plain or not isinstance(x, Tensor):
            return super().base_output(*args, **kwargs)
        cast = {"bias": bias.to(self.compute_dtype or x.dtype)}
        output: Tensor = torch.func.functional_call(self.base_layer, cast, args, kwargs)
        return output

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002  # torch's
        """Convert as torch does; inputs are expected to be converted as the model is."""
        if self.input_dtype is not None:
            self.input_dtype = fn(torch.empty(0, dtype=self.input_dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @torch.no_grad()
    def merged(self, weights: dict[str, float], into: Into) -> Merged:
        """Compute the layer with some adapters folded in, added in float32: new codes, or a plain layer."""
        delta = self.delta_weight(weights)
        weight = self.written_out().add_(delta)
        if into.quantized == "dequantize":
            dtype = into.dtype or self.input_dtype or into.model_dtype or self.compute_dtype or torch.float32
            weight = weight.to(dtype)
            return Merged(weight, self._plain_layer(weight))
        merged_in = torch.linalg.vector_norm(delta)
        if merged_in == 0:  # rounding nothing would change scales that are codes themselves
            return Merged(weight, self.codes())
        held, step = self.requantized(weight)
        error = self.written_out(held).sub_(weight)
        relative = torch.linalg.vector_norm(error) / merged_in
        return Merged(weight, held, RoundingLoss(float(error.abs().max()), step, float(relative)))

    def _plain_layer(self, weight: Tensor) -> nn.Linear:
        """Make a linear layer that stands where the base layer did."""
        base, bias = self.base_layer, self.bias
        linear = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = (
                bias if bias.dtype == weight.dtype else nn.Parameter(bias.to(weight.dtype), bias.requires_grad)
            )
        linear.training = base.training
        return linear

    def exchange(self, held: Any) -> Any:
        """Let other codes be read, or another layer, and return what was read until now."""
        if isinstance(held, nn.Module):
            own, self.base_layer = self.base_layer, held
            return own
        own_codes = self.codes()
        self.put_in(held)
        return own_codes

    @torch.inference_mode(mode=False)  # the codes outlive the mode the caller is in
    def unfold(self) -> None:
        """Let the base layer be read again as it was, byte for byte, where it was moved to meanwhile."""
        if self.unmerged is not None:
            device = self.weight.device
            self.exchange(self.unmerged[0])
            self.unmerged = None
            if self.weight.device != device:
                self.base_layer.to(device)

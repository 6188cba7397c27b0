"""Base classes of adapter layers of quantized layers: with codes to merge into, or with only a forward."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from randlora.errors import AdapterError
from randlora.layers.base import AdapterLayer, input_of
from randlora.layers.in_place import change_class, detach_obstacle, plain_class
from randlora.layers.linear import LinearAdapter
from randlora.layers.weight import Into, Merged, RoundingLoss
from randlora.places import Kept, Place, place_at

NOT_HERE = "has no values (its weight is on the meta device or offloaded): load the model's weights first"


class Form(NamedTuple):
    """The class of a layer, with its parameters, its buffers and the other attributes that the class sets on it."""

    kind: type[nn.Module]
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]
    attributes: dict[str, Any]


class ForwardOnly(LinearAdapter):
    """Adapts a linear layer of which only the forward is known, by adding the adapter's output to the layer's output.

    This is the base class for layers with codes that a kernel multiplies by. Register a subclass with
    `randlora.layers.register_layer`, and define `features` if the layer has no ``in_features`` and ``out_features``.
    What needs the weight, such as merging, is refused. For codes that can be dequantized, use `QuantizedLayer`.
    """

    is_quantized: ClassVar[bool] = True
    is_forward_only: ClassVar[bool] = True
    as_read: ClassVar[type[AdapterLayer] | None] = None  # what reads codes cannot be given weight + update

    @staticmethod
    def features(owner: Any) -> tuple[int, int]:
        """Return ``(in_features, out_features)`` of a layer."""
        try:
            return int(owner.in_features), int(owner.out_features)
        except AttributeError as error:
            kind = plain_class(owner).__name__
            raise AdapterError(f"{error}: define features in the adapter layer of {kind}") from None

    @classmethod
    def find_weight(cls, owner: nn.Module) -> Tensor | None:
        """Return the codes: the ``weight``, else the first matrix, else the first tensor except the bias."""
        if (own := super().find_weight(owner)) is not None:
            return own
        named = {**owner._parameters, **owner._buffers}
        held = [tensor for name, tensor in named.items() if tensor is not None and name != "bias"]
        return next((tensor for tensor in held if tensor.dim() > 1), held[0] if held else None)

    @classmethod
    def place_in(cls, owner: nn.Module) -> Place:
        """Return the place of the codes."""
        codes = cls.find_weight(owner)
        return super().place_in(owner) if codes is None or "weight" in owner._parameters else place_at(codes)

    @classmethod
    def obstacle(cls, owner: nn.Module) -> str | None:
        """Return why this layer cannot be adapted, or ``None``."""
        if (codes := cls.find_weight(owner)) is None:
            return (
                "has no codes in its parameters and buffers: load the model's weights first, or define find_weight in "
                f"{cls.__name__} if codes are elsewhere"
            )
        return NOT_HERE if codes.is_meta else None

    @classmethod
    def plain_forward(cls) -> Callable[..., Tensor] | None:
        """Return ``None``: the layer's own forward always runs."""
        return None

    def merge_obstacle(self, owner: nn.Module, into: Into | None) -> str | None:  # noqa: ARG002  # whatever it would become
        """Return why nothing can be merged into the owner."""
        return (
            f"has codes that only the forward of {plain_class(owner).__name__} reads, so nothing can be merged into "
            "it: leave the adapter unmerged, or merge it into the checkpoint that the model was quantized from, with "
            "randlora.files.merge"
        )


class QuantizedLayer(ForwardOnly):
    """Adapts a linear layer with a quantized weight, stored as codes and scales.

    A subclass is final and implements quantization and dequantization for its kind.
    """

    is_forward_only: ClassVar[bool] = False
    kept: ClassVar[tuple[str, ...]] = ()  # attributes of such a layer that a plain one does not need

    @classmethod
    def bias_of(cls, owner: Any) -> Tensor | None:
        """Return the bias, which may be a parameter, a buffer or another attribute."""
        bias = getattr(owner, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @classmethod
    def beside(cls, owner: nn.Module) -> list[object]:
        """Return the quantization state."""
        held = (owner.__dict__.get(name) for name in cls.kept)
        return [each for each in held if hasattr(each, "__dict__") and not callable(each)]

    @abstractmethod
    def written_out(self, owner: nn.Module, held: Any = None) -> Tensor:
        """Return a new tensor: the owner's codes, or those given, as ``(out_features, in_features)`` float32."""

    @abstractmethod
    def requantized(self, owner: nn.Module, weight: Tensor) -> tuple[Any, float]:
        """Quantize a weight, ``(out_features, in_features)`` float32, in the same way as the owner's.

        Return codes for `put_in`, and their `RoundingLoss.step`.
        """

    @abstractmethod
    def codes(self, owner: nn.Module) -> Any:
        """Return the owner's current codes with their scales and quantization state."""

    @abstractmethod
    def put_in(self, owner: nn.Module, held: Any) -> None:
        """Replace the owner's codes with their scales and quantization state."""

    def merge_obstacle(self, owner: nn.Module, into: Into | None) -> str | None:
        """Return why the owner cannot become a plain layer, or ``None``."""
        if into is None or into.quantized == "requantize":
            return None
        if not self.runs_plain_forward(owner):
            return (
                "has its own forward, as of a subclass, which an nn.Linear would not run: "
                "merge with quantized='requantize'"
            )
        return detach_obstacle(owner)  # because its class will be replaced

    def base_output(self, owner: nn.Module, base_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the owner without adapters, computed by `stand_in` if its class's forward runs."""
        kind, x = plain_class(owner), input_of(owner, args, kwargs)
        runs_own = kind is not nn.Linear and self.own_forward is None and isinstance(x, Tensor)
        if runs_own and (twin := self.stand_in(owner, x)) is not None:
            return kind.forward(twin, *args, **kwargs)  # type: ignore[no-any-return]
        return super().base_output(owner, base_forward, *args, **kwargs)

    def stand_in(self, owner: nn.Module, x: Tensor) -> Any:
        """Return a copy of the owner on which the kind's forward runs for ``x``, or ``None`` to run it on the owner.

        bitsandbytes casts the layer's bias in place in every forward, even if it is trained. The copy has a cast bias.
        """
        bias, dtype = owner._parameters.get("bias"), self.compute_dtype(owner) or x.dtype
        return None if bias is None or bias.dtype == dtype else twin_of(owner, bias=bias.to(dtype))

    @torch.no_grad()
    def compute_merged(self, owner: nn.Module, weights: dict[str, float], into: Into) -> Merged:
        """Return the layer merged with some adapters, added in float32: new codes, or a plain layer."""
        delta = self.delta_weight(owner, weights)
        weight = self.written_out(owner).add_(delta)
        if into.quantized == "dequantize":
            dtype = into.dtype or self.compute_dtype(owner) or torch.float32
            weight = weight.to(dtype)
            bias = self.bias_of(owner)
            if bias is not None and (bias.dtype != dtype or not isinstance(bias, nn.Parameter)):
                bias = nn.Parameter(bias.to(dtype), requires_grad=False)  # as it is put in for the time of the merge
            plain = {"weight": nn.Parameter(weight, requires_grad=False), "bias": bias}
            return Merged(weight, Form(nn.Linear, plain, {}, {}))
        merged_in = torch.linalg.vector_norm(delta)
        if merged_in == 0:  # requantizing would change scales that are quantized themselves
            return Merged(weight, self.codes(owner))
        held, step = self.requantized(owner, weight)
        difference = self.written_out(owner, held).sub_(weight)
        relative = torch.linalg.vector_norm(difference) / merged_in
        return Merged(weight, held, RoundingLoss(float(difference.abs().max()), step, float(relative)))

    def exchange(self, owner: nn.Module, held: Any) -> Any:
        """Replace the owner's codes, or its class and parameters, and return the previous ones."""
        if not isinstance(held, Form):
            own_codes = self.codes(owner)
            self.put_in(owner, held)
            return own_codes
        attributes = {name: owner.__dict__.pop(name) for name in self.kept if name in owner.__dict__}
        own = Form(plain_class(owner), dict(owner._parameters), dict(owner._buffers), attributes)
        owner._parameters.clear()  # codes may be held under other names
        owner._parameters.update(held.parameters)
        owner._buffers.clear()
        owner._buffers.update(held.buffers)
        owner.__dict__.update(held.attributes)
        change_class(owner, held.kind)
        return own

    def write_merged(self, owner: nn.Module, merged: Merged) -> None:
        """Exchange the owner's codes for merged ones, or the layer for a plain one, and keep those in `original`."""
        assert self.original is None, "codes are merged into from the original ones"
        self.original = Kept(self.exchange(owner, merged.held))

    def keep_merged(self, owner: nn.Module) -> None:  # noqa: ARG002  # which has the new codes, or is plain
        """Make a merge permanent."""
        self.original = None

    def save_original(self, owner: nn.Module, destination: dict[str, Any], prefix: str) -> None:
        """Write the original codes into a state dict that has merged ones, or a plain layer's weight."""
        assert self.original is not None, "it was merged into"
        held = self.original.values
        if isinstance(held, Form):
            for name in owner._parameters.keys() - held.parameters.keys():  # of the plain layer
                destination.pop(f"{prefix}{name}", None)
            twin: Any = object.__new__(held.kind)
            twin.__dict__.update(owner.__dict__, _parameters=held.parameters, _buffers=held.buffers, **held.attributes)
        else:
            twin, beside = twin_of(owner), {name: own for name, own in vars(owner).items() if name in self.kept}
            twin.__dict__.update({name: copy.copy(own) for name, own in beside.items() if not callable(own)})
            self.put_in(twin, held)
        self.write_state(twin, destination, prefix)

    def write_state(self, layer: nn.Module, destination: dict[str, Any], prefix: str) -> None:
        """Write the entries of a layer of the quantized class into a state dict."""
        layer._save_to_state_dict(destination, prefix, keep_vars=False)

    @torch.inference_mode(mode=False)  # the codes must not be inference tensors
    def restore_original(self, owner: nn.Module) -> None:
        """Restore the original codes byte for byte, on the device that the owner is on now."""
        if self.original is not None:
            device = self.device_beside(owner)
            self.exchange(owner, self.original.values)
            self.original = None
            if self.device_beside(owner) != device:
                self.move(owner, device)

    def move(self, owner: Any, device: torch.device) -> None:
        """Move the owner, with its codes, to a device."""
        owner.to(device)


def twin_of(owner: nn.Module, **parameters: Tensor) -> Any:
    """Return a shallow copy of an adapted module in its original class, with some parameters replaced."""
    twin: Any = object.__new__(plain_class(owner))
    twin.__dict__.update(owner.__dict__, _parameters={**owner._parameters, **parameters})
    return twin

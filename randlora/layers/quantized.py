"""Layers whose weight is stored as codes: what merging makes of them, whatever the codes are."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from randlora.layers.base import AdapterLayer
from randlora.layers.folding import Into, Merged, RoundingLoss
from randlora.layers.in_place import change_class, detach_obstacle, plain_class
from randlora.layers.inputs import input_of


class Form(NamedTuple):
    """What makes a layer one of its kind: its class, and what its class keeps on it.

    Attributes:
        kind: The class.
        parameters: The parameters by name.
        attributes: What else the class keeps on the layer.
    """

    kind: type[nn.Module]
    parameters: dict[str, nn.Parameter | None]
    attributes: dict[str, Any]


class QuantizedLayer(AdapterLayer):
    """Adapts a layer that computes with a weight it stores as codes and scales.

    A subclass is final and tells how its kind writes codes out and rounds a weight to codes.

    Attributes:
        kept: Names of the attributes that its kind keeps on the layer, which a plain layer has no use for.
    """

    kept: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def features(owner: nn.Module) -> tuple[int, int]:
        """Return ``(in_features, out_features)``, which the shape of the codes need not show."""
        assert isinstance(owner, nn.Linear)
        return owner.in_features, owner.out_features

    @staticmethod
    def in_storage_layout(delta: Tensor) -> Tensor:
        """Return ``(out_features, in_features)`` as it is: that is how codes are written out."""
        return delta

    @abstractmethod
    def compute_dtype(self, owner: nn.Module) -> torch.dtype | None:
        """Return the dtype that the layer computes in, or ``None`` for that of its input."""

    @abstractmethod
    def written_out(self, owner: nn.Module, held: Any = None) -> Tensor:
        """Return what the owner's codes, or those given, stand for, ``(out_features, in_features)`` float32."""

    @abstractmethod
    def requantized(self, owner: nn.Module, weight: Tensor) -> tuple[Any, float]:
        """Round a weight, ``(out_features, in_features)`` float32, to codes of the owner's kind.

        Returns:
            What `put_in` takes, and the widest gap between neighboring levels at the largest scale.
        """

    @abstractmethod
    def codes(self, owner: nn.Module) -> Any:
        """Return the codes that the owner reads now, with all they are read by."""

    @abstractmethod
    def put_in(self, owner: nn.Module, held: Any) -> None:
        """Let the owner read other codes, with all they are read by."""

    def merge_obstacle(self, owner: nn.Module, into: Into) -> str | None:
        """Return why the owner, which does more than a plain layer, cannot become one."""
        if into.quantized == "requantize":
            return None
        if not self.runs_plain_forward(owner):
            return (
                "has a forward of its own, as of a subclass, which an nn.Linear would lose: "
                "merge with quantized='requantize'"
            )
        return detach_obstacle(owner)  # another class is about to take the place of whatever it became

    def base_output(self, owner: nn.Module, base_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the owner without adapters, of a stand-in where its own forward would spoil something.

        A forward that was set on the owner itself reads the owner, and an owner that is merged into a plain layer
        spoils nothing.
        """
        kind, x = plain_class(owner), input_of(owner, args, kwargs)
        if kind is not nn.Linear and self.own_forward is None and isinstance(x, Tensor):
            twin = self.stand_in(owner, x)
            if twin is not None:
                output: Tensor = kind.forward(twin, *args, **kwargs)
                return output
        return super().base_output(owner, base_forward, *args, **kwargs)

    def stand_in(self, owner: nn.Module, x: Tensor) -> Any:
        """Return what the kind's forward is to run on in the owner's place, or ``None`` for the owner itself.

        bitsandbytes casts the bias in its place, in evaluation too, under the optimizer's feet if it is trained: here
        it sees a copy.

        Args:
            owner: The adapted module.
            x: Its input, ``(..., in_features)``.
        """
        bias, dtype = owner._parameters.get("bias"), self.compute_dtype(owner) or x.dtype
        return None if bias is None or bias.dtype == dtype else twin_of(owner, bias=bias.to(dtype))

    @torch.no_grad()
    def merged(self, owner: nn.Module, weights: dict[str, float], into: Into) -> Merged:
        """Return the layer with some adapters folded in, added in float32: new codes, or a plain layer."""
        delta = self.delta_weight(owner, weights)
        weight = self.written_out(owner).add_(delta)
        if into.quantized == "dequantize":
            dtype = into.dtype or into.model_dtype or self.compute_dtype(owner) or torch.float32
            weight = weight.to(dtype)
            return Merged(weight, self._plain_form(owner, weight))
        merged_in = torch.linalg.vector_norm(delta)
        if merged_in == 0:  # rounding nothing would change scales that are codes themselves
            return Merged(weight, self.codes(owner))
        held, step = self.requantized(owner, weight)
        difference = self.written_out(owner, held).sub_(weight)
        relative = torch.linalg.vector_norm(difference) / merged_in
        return Merged(weight, held, RoundingLoss(float(difference.abs().max()), step, float(relative)))

    def _plain_form(self, owner: nn.Module, weight: Tensor) -> Form:
        """Return what makes a plain linear layer of the owner."""
        bias = owner._parameters.get("bias")
        if bias is not None and bias.dtype != weight.dtype:
            bias = nn.Parameter(bias.to(weight.dtype), bias.requires_grad)
        return Form(nn.Linear, {"weight": nn.Parameter(weight, requires_grad=False), "bias": bias}, {})

    def exchange(self, owner: nn.Module, held: Any) -> Any:
        """Put other codes in the place of the owner's, or another form of layer, and return what stood there."""
        if not isinstance(held, Form):
            own_codes = self.codes(owner)
            self.put_in(owner, held)
            return own_codes
        attributes = {name: owner.__dict__.pop(name) for name in self.kept if name in owner.__dict__}
        own = Form(plain_class(owner), dict(owner._parameters), attributes)
        owner._parameters.update(held.parameters)
        owner.__dict__.update(held.attributes)
        change_class(owner, held.kind)
        return own

    def save_unmerged(self, owner: nn.Module, destination: dict[str, Any], prefix: str) -> None:
        """Write the owner's own codes into a state dict that holds merged ones, or a plain layer."""
        twin = unmerged_twin(owner, self)
        type(twin)._save_to_state_dict(twin, destination, prefix, False)  # noqa: FBT003  # torch's signature

    @torch.inference_mode(mode=False)  # the codes outlive the mode the caller is in
    def unfold(self, owner: nn.Module) -> None:
        """Put the owner's codes back, byte for byte, on the device it was moved to meanwhile."""
        if self.unmerged is not None:
            device = owner.get_parameter("weight").device
            self.exchange(owner, self.unmerged[0])
            self.unmerged = None
            if owner.get_parameter("weight").device != device:
                owner.to(device)


def unmerged_twin(owner: nn.Module, layer: QuantizedLayer) -> Any:
    """Return an object of the owner's class and codes as they were before the merge, which shares the rest with it."""
    assert layer.unmerged is not None, "it was merged into"
    held = layer.unmerged[0]
    if isinstance(held, Form):
        twin: Any = object.__new__(held.kind)
        twin.__dict__.update(owner.__dict__, _parameters=held.parameters, **held.attributes)
        return twin
    twin = twin_of(owner)
    twin.__dict__.update({name: copy.copy(owner.__dict__[name]) for name in layer.kept if name in owner.__dict__})
    layer.put_in(twin, held)
    return twin


def twin_of(owner: nn.Module, **parameters: Tensor) -> Any:
    """Return an object of an adapted module's own class that shares all it holds but some parameters."""
    twin: Any = object.__new__(plain_class(owner))
    twin.__dict__.update(owner.__dict__, _parameters={**owner._parameters, **parameters})
    return twin

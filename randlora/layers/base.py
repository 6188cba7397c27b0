"""The adapter layer: a frozen base layer, and what the adapters of a model add to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from randlora.bases.spec import count_bases
from randlora.errors import MergeError
from randlora.functional import Diagonals, Pair, WriteOut, adapted_linear, delta_weight
from randlora.layers.folding import Into, Merged
from randlora.layers.inputs import autocast_dtype, first_of, is_plain_tensor, is_traced
from randlora.state import Adapter, ModelState


class Reading(NamedTuple):
    """How a layer's weight enters one operation with an adapter.

    Attributes:
        weight: ``(out_features, in_features)``, or what writes it out.
        dtype: The dtype to compute in.
        output_dtype: The dtype the base layer gives.
    """

    weight: Tensor | WriteOut
    dtype: torch.dtype
    output_dtype: torch.dtype


class AdapterLayer(nn.Module, ABC):
    """Stands in a linear layer's place and adds the active adapters' deltas to its output.

    A subclass is final and says how its kind of layer stores a weight, nothing more. For every subclass

        ``layer(x) - base_layer(x) == x @ layer.delta_weight(...).T``

    The wrapper answers for ``weight``, ``bias``, ``in_features`` and ``out_features``, which model code reads.

    Attributes:
        base_layer: The original module object.
        randlora_lambda: Λ by adapter, ``(r, num_bases)`` float32.
        randlora_gamma: Γ by adapter, ``(num_bases, min_dim)`` float32.
        adapters: The adapters this layer belongs to.
        unmerged: While a merged weight stands in its place, the base's own as `exchange` gave it, in a tuple.
    """

    def __init__(self, base_layer: nn.Module, state: ModelState) -> None:
        """Wrap a layer; adapters are added one by one.

        Args:
            base_layer: The layer to adapt.
            state: The state of the model it belongs to.
        """
        super().__init__()
        self.base_layer = base_layer
        self.randlora_lambda = nn.ParameterDict()
        self.randlora_gamma = nn.ParameterDict()
        self.state = state
        self.adapters: dict[str, Adapter] = {}
        self.unmerged: tuple[Any] | None = None  # in a tuple, torch does not take it for a part of this module
        for module in (self, self.randlora_lambda, self.randlora_gamma):
            module.training = base_layer.training
        self.register_forward_pre_hook(_decline_fast_paths)
        self.register_state_dict_post_hook(_write_own_weight)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_refuse_while_merged)  # type: ignore[no-untyped-call]

    @staticmethod
    @abstractmethod
    def features(base_layer: nn.Module) -> tuple[int, int]:
        """Read ``(in_features, out_features)`` off a base layer, whether or not its weight holds values."""

    @staticmethod
    @abstractmethod
    def in_storage_layout(delta: Tensor) -> Tensor:
        """Turn ``(out_features, in_features)`` into the layout of the base layer's weight."""

    @classmethod
    def plain_forward(cls) -> Callable[..., Tensor] | None:
        """Return the forward of the kind itself, which a plain linear layer can take over, if the kind has one.

        Where a base layer runs this very forward and `only_multiplies`, base and adapter are computed as one operation.
        """
        return None

    @classmethod
    def obstacle(cls, base_layer: nn.Module) -> str | None:
        """Say why this very layer cannot be adapted, to be read after its name, or ``None``."""
        dtype = base_layer.get_parameter("weight").dtype
        if dtype.is_floating_point:
            return None
        return f"has a weight of {dtype}, expected a floating dtype: dequantize it first"

    @property
    def weight(self) -> nn.Parameter:
        """The base layer's weight."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        """The base layer's input width."""
        return self.features(self.base_layer)[0]

    @property
    def out_features(self) -> int:
        """The base layer's output width."""
        return self.features(self.base_layer)[1]

    def dims(self, r: int) -> tuple[int, int, int]:
        """Return ``(max_dim, min_dim, num_bases)`` of this layer at a rank."""
        sides = self.features(self.base_layer)
        return max(sides), min(sides), count_bases(min(sides), r)

    @classmethod
    def device_beside(cls, base_layer: nn.Module) -> torch.device:
        """Say where Λ and Γ live: beside the weight, or on the CPU where accelerate offloads that."""
        weight = base_layer._parameters["weight"]
        assert weight is not None, "a target has a weight of its own"
        return torch.device("cpu") if cls.is_offloaded(base_layer) else weight.device

    @staticmethod
    def is_offloaded(base_layer: nn.Module) -> bool:
        """Whether accelerate keeps the layer's weight elsewhere and brings it in for each forward."""
        weight = base_layer._parameters.get("weight")
        return weight is not None and weight.is_meta and "_hf_hook" in base_layer.__dict__

    def fresh_parameters(self, r: int) -> tuple[Tensor, Tensor]:
        """Make Λ and Γ of an adapter that changes nothing yet, beside the weight.

        Returns:
            Λ = 0, ``(r, num_bases)``, and Γ = 1 / max(num_bases, min_dim), ``(num_bases, min_dim)``, both float32.
        """
        _, min_dim, num_bases = self.dims(r)
        options: dict[str, Any] = {"dtype": torch.float32, "device": self.device_beside(self.base_layer)}
        gamma = torch.full((num_bases, min_dim), 1 / max(num_bases, min_dim), **options)
        return torch.zeros((r, num_bases), **options), gamma

    def add(self, adapter: Adapter, lam: Tensor, gamma: Tensor, *, trainable: bool) -> None:
        """Take an adapter in, with its Λ, ``(r, num_bases)``, and Γ, ``(num_bases, min_dim)``."""
        self.randlora_lambda[adapter.name] = nn.Parameter(lam, requires_grad=trainable)
        self.randlora_gamma[adapter.name] = nn.Parameter(gamma, requires_grad=trainable)
        self.adapters[adapter.name] = adapter

    def drop(self, name: str) -> None:
        """Let an adapter go."""
        del self.randlora_lambda[name], self.randlora_gamma[name], self.adapters[name]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every adapter of this layer back to the state that changes nothing, as after ``model.to_empty(...)``."""
        for name, adapter in self.adapters.items():
            fresh_lambda, fresh_gamma = self.fresh_parameters(adapter.config.r)
            self.randlora_lambda[name].copy_(fresh_lambda)
            self.randlora_gamma[name].copy_(fresh_gamma)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer and add what the active adapters make of the input.

        Args:
            *args: Passed on to the base layer; the first is its input, ``(..., in_features)``.
            **kwargs: Passed on to the base layer; the input may be the first of them.

        Returns:
            ``(..., out_features)`` in the dtype the base layer gave.
        """
        active = [] if self.state.is_disabled or self.state.is_merged else self._active()
        x = first_of(args, kwargs)
        if active and len(args) + len(kwargs) == 1 and self._can_be_one_operation(active[0][0], x):
            (adapter, factor), *active = active
            output = self._adapted_output(adapter, factor, x)
        else:
            output = self.base_output(*args, **kwargs)
        for adapter, factor in active:
            output = output + self._adapter_output(adapter, factor, x, output.dtype)
        return output

    def base_output(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer as it is."""
        output: Tensor = self.base_layer(*args, **kwargs)
        return output

    def _active(self) -> list[tuple[Adapter, float]]:
        """List the adapters whose deltas are added, with their factors."""
        return [(adapter, adapter.weight) for adapter in self.adapters.values() if adapter.weight is not None]

    def _can_be_one_operation(self, adapter: Adapter, x: object) -> bool:
        """Whether base layer and adapter can be computed as one, which reads the base layer's weight past the layer.

        Not where the layer is more than its weight and bias, or its input another than the adapter's.
        """
        has_own_input = adapter.config.dropout and self.training
        is_plain = self.runs_plain_forward() and not _has_any_global_hook() and not has_own_input
        return is_plain and is_plain_tensor(x) and self.only_multiplies(x)

    def runs_plain_forward(self) -> bool:
        """Whether calling the base layer runs its kind's own forward and nothing else."""
        base = self.base_layer
        return (
            type(base).forward is self.plain_forward()
            and "forward" not in base.__dict__  # accelerate's way
            and not (base._forward_pre_hooks or base._forward_hooks or base._backward_pre_hooks or base._backward_hooks)
        )

    def only_multiplies(self, x: Tensor) -> bool:
        """Whether the base layer's forward does nothing to this input but multiply by the weight and add the bias."""
        weight = self.base_layer._parameters.get("weight")
        if not is_plain_tensor(weight):
            return False
        has_autocast = autocast_dtype(x, x.dtype) == autocast_dtype(x, weight.dtype)
        return x.device == weight.device and has_autocast and x.dim() > 0 and x.shape[-1] == self.in_features

    def reading(self, x: Tensor) -> Reading:
        """Say how the weight is read where `only_multiplies` holds."""
        dtype = autocast_dtype(x, self.weight.dtype)
        return Reading(self.in_storage_layout(self.weight), dtype, dtype)

    def _adapted_output(self, adapter: Adapter, factor: float, x: Tensor) -> Tensor:
        """Compute base layer and adapter as one operation."""
        weight, dtype, output_dtype = self.reading(x)
        pair, diagonals = self._parts(adapter, factor, x.device, dtype, is_traced=is_traced(x))
        compute, keep = self.state.compute, self.state.keep
        output = adapted_linear(x.to(dtype), pair, diagonals, weight=weight, bias=self.bias, compute=compute, keep=keep)
        return output.to(output_dtype)

    def _adapter_output(self, adapter: Adapter, factor: float, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute one adapter's part in the dtype that the base layer gave, which is autocast's where that is on."""
        x = F.dropout(x.to(dtype), adapter.config.dropout, self.training)
        pair, diagonals = self._parts(adapter, factor, x.device, dtype, is_traced=is_traced(x))
        if x.is_nested:  # a nested tensor has sizes and no shape
            return F.linear(x, delta_weight(pair, diagonals, in_features=self.in_features))
        return adapted_linear(x, pair, diagonals, compute=self.state.compute)

    def _parts(
        self, adapter: Adapter, factor: float, device: torch.device, dtype: torch.dtype, *, is_traced: bool
    ) -> tuple[Pair, Diagonals]:
        """Gather the bases, Λ and Γ of one adapter."""
        max_dim, min_dim, _ = self.dims(adapter.config.r)
        pair = adapter.basis.pair(max_dim, min_dim, device=device, dtype=dtype, is_traced=is_traced)
        lam, gamma = self.randlora_lambda[adapter.name], self.randlora_gamma[adapter.name]
        return pair, Diagonals(lam.to(device), gamma.to(device), adapter.config.scaling * factor)

    def delta_weight(self, weights: dict[str, float]) -> Tensor:
        """Sum the updates of some adapters.

        Args:
            weights: Adapters' names and factors; those this layer has not are passed over.

        Returns:
            ``(out_features, in_features)`` on the weight's device, in float32, or in float64 where the weight is.
        """
        in_features, out_features = self.features(self.base_layer)
        device = self.device_beside(self.base_layer)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        total = torch.zeros((out_features, in_features), dtype=dtype, device=device)
        with torch.autocast(device.type, enabled=False) if device.type != "meta" else nullcontext():
            for name, factor in weights.items():  # in their order, which is part of the sum's bits
                if (adapter := self.adapters.get(name)) is not None:
                    pair, diagonals = self._parts(adapter, factor, device, dtype, is_traced=True)
                    total = total + delta_weight(pair, diagonals, in_features=in_features)
        return total

    def merge_obstacle(self, into: Into) -> str | None:  # noqa: ARG002  # for quantized layers
        """Say why nothing can be merged into this layer so, to be read after its name, or ``None``."""
        return None

    @torch.no_grad()
    def merged(self, weights: dict[str, float], into: Into) -> Merged:  # noqa: ARG002  # for quantized layers
        """Compute the layer with some adapters folded in, added in float32 or wider and rounded once; change nothing.

        Args:
            weights: Adapters' names and factors.
            into: What becomes of a quantized layer.
        """
        delta = self.in_storage_layout(self.delta_weight(weights))
        weight = (self.weight.to(delta.dtype) + delta).to(self.weight.dtype).contiguous()
        return Merged(weight, weight)

    def exchange(self, held: Any) -> Any:
        """Let the base layer read what is held instead of its own weight, and return what it read until now."""
        own, self.weight.data = self.weight.data, held
        return own

    def fold(self, merged: Merged) -> None:
        """Let the base layer read a merged weight; its own is kept as it is."""
        self.unmerged = (self.exchange(merged.held),)

    @torch.inference_mode(mode=False)  # the weight outlives the mode the caller is in
    def unfold(self) -> None:
        """Let the base layer read its own weight again, bit for bit, where it was moved to meanwhile."""
        if self.unmerged is not None:
            self.exchange(self.unmerged[0].to(device=self.weight.device, dtype=self.weight.dtype))
            self.unmerged = None

    def extra_repr(self) -> str:
        """Name the adapters in ``print(model)``."""
        return ", ".join(
            f"{name}: r={adapter.config.r}, num_bases={self.dims(adapter.config.r)[2]}, {adapter.config.basis}"
            for name, adapter in self.adapters.items()
        )


def _decline_fast_paths(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """Do nothing: torch's fused transformer layers read weights past their modules, but call those that have a hook."""


def _write_own_weight(layer: nn.Module, state_dict: dict[str, Any], prefix: str, _local_metadata: object) -> None:
    """Save the weight as it is without the adapters: a merged one beside Λ and Γ would count them twice."""
    assert isinstance(layer, AdapterLayer)
    if layer.unmerged is None:
        return
    merged = layer.exchange(layer.unmerged[0])
    state_dict.update(layer.base_layer.state_dict(prefix=f"{prefix}base_layer."))
    layer.exchange(merged)


def _refuse_while_merged(layer: nn.Module, *_: object) -> None:
    """Refuse to load what unmerging would undo."""
    assert isinstance(layer, AdapterLayer)
    if layer.unmerged is not None:
        raise MergeError("cannot load a state dict while the adapters are merged: call randlora.unmerge(model) first")

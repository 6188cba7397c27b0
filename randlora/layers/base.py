"""The adapter layer: a frozen base layer, and what the adapters of a model add to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora import functional
from randlora.bases.spec import count_bases
from randlora.errors import MergeError
from randlora.state import Adapter, ModelState


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
        unmerged_weight: The base's own weight while a merged one stands in its place, else ``None``.
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
        self.unmerged_weight: Tensor | None = None
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
        output: Tensor = self.base_layer(*args, **kwargs)
        if self.state.is_disabled or self.state.is_merged:
            return output
        x = args[0] if args else next(iter(kwargs.values()))
        for adapter in self.adapters.values():
            if adapter.weight is not None:
                output = output + self._adapter_output(adapter, adapter.weight, x, output.dtype)
        return output

    def _adapter_output(self, adapter: Adapter, weight: float, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute one adapter's part in the dtype that the base layer gave, which is autocast's where that is on."""
        x = F.dropout(x, adapter.config.dropout, self.training)
        return functional.adapter_output(x, *self._parts(adapter, x.device, dtype), adapter.config.scaling * weight)

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
            for name, weight in weights.items():  # in their order, which is part of the sum's bits
                if (adapter := self.adapters.get(name)) is not None:
                    parts, scaling = self._parts(adapter, device, dtype), adapter.config.scaling * weight
                    total = total + functional.delta_weight(*parts, scaling, in_features=in_features)
        return total

    def _parts(
        self, adapter: Adapter, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gather A, B, Λ and Γ of one adapter, as `functional` takes them."""
        max_dim, min_dim, _ = self.dims(adapter.config.r)
        bases = adapter.basis.slices(max_dim, min_dim, device=device, dtype=dtype)
        lam, gamma = self.randlora_lambda[adapter.name], self.randlora_gamma[adapter.name]
        return bases.A, bases.B, lam.to(device), gamma.to(device)

    @torch.no_grad()
    def merged_weight(self, weights: dict[str, float]) -> Tensor:
        """Compute the weight with some adapters folded in: added in float32 or wider, rounded once.

        Args:
            weights: Adapters' names and factors.

        Returns:
            A new tensor in the layout and dtype of the base layer's weight.
        """
        delta = self.in_storage_layout(self.delta_weight(weights))
        return (self.weight.to(delta.dtype) + delta).to(self.weight.dtype).contiguous()

    def fold(self, weight: Tensor) -> None:
        """Let the base layer read ``weight`` instead of its own, which is kept as it is."""
        self.unmerged_weight = self.weight.data
        self.weight.data = weight

    @torch.inference_mode(mode=False)  # the weight outlives the mode the caller is in
    def unfold(self) -> None:
        """Let the base layer read its own weight again, bit for bit, where it was moved to meanwhile."""
        if self.unmerged_weight is not None:
            self.weight.data = self.unmerged_weight.to(device=self.weight.device, dtype=self.weight.dtype)
            self.unmerged_weight = None

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
    if layer.unmerged_weight is not None:
        state_dict[f"{prefix}base_layer.weight"] = layer.unmerged_weight


def _refuse_while_merged(layer: nn.Module, *_: object) -> None:
    """Refuse to load what unmerging would undo."""
    assert isinstance(layer, AdapterLayer)
    if layer.unmerged_weight is not None:
        raise MergeError("cannot load a state dict while the adapters are merged: call randlora.unmerge(model) first")

"""What adapts one weight of a module: how its kind stores the weight, and what all kinds share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.bases.spec import count_bases
from randlora.functional import WriteOut, adapted_linear, delta_weight
from randlora.layers.folding import Into, Merged
from randlora.layers.inputs import autocast_dtype, input_of, is_plain_tensor
from randlora.layers.update import Update, folded, sum_updates
from randlora.state import Adapter, ModelState


class Reading(NamedTuple):
    """How a layer's weight enters one operation with an adapter.

    Attributes:
        weight: ``(out_features, in_features)``, or a function that writes it out.
        dtype: The dtype to compute in.
        output_dtype: The dtype that the layer returns.
    """

    weight: Tensor | WriteOut
    dtype: torch.dtype
    output_dtype: torch.dtype


class AdapterLayer(ABC):
    """Adapts one weight of a module, its owner, in place.

    The owner stays the object it is, with its place, its parameters and its hooks; its class becomes a subclass of
    itself that asks its adapter layer what to return. A subclass of this class tells how a kind of layer stores its
    weight, and nothing more. For every kind

        ``layer(x) with adapters - layer(x) without == x @ delta_weight.T``

    Attributes:
        attribute: The name of the parameter that is adapted.
        state: The state of the model that the owner belongs to.
        shape: ``(out_features, in_features)`` of the weight.
        adapters: The adapters that this weight belongs to, by name.
        own_forward: A ``forward`` that was set on the owner itself rather than on its class, if there is one.
        unmerged: While a merged weight stands in its place, the owner's weight as `exchange` returned it, in a tuple.
    """

    attribute: ClassVar[str] = "weight"

    def __init__(self, owner: nn.Module, state: ModelState) -> None:
        """Describe a weight that is about to be adapted; the owner is not touched.

        Args:
            owner: The module that holds the weight.
            state: The state of the model it belongs to.
        """
        self.state = state
        self.shape = self.shape_of(owner)
        self.adapters: dict[str, Adapter] = {}
        self.own_forward: Callable[..., Any] | None = None
        self.unmerged: tuple[Any] | None = None

    @staticmethod
    @abstractmethod
    def features(owner: nn.Module) -> tuple[int, int]:
        """Return ``(in_features, out_features)`` of a module, whether or not its weight holds values."""

    @staticmethod
    @abstractmethod
    def in_storage_layout(delta: Tensor) -> Tensor:
        """Return an update, ``(out_features, in_features)``, in the layout of the owner's weight."""

    @classmethod
    def plain_forward(cls) -> Callable[..., Tensor] | None:
        """Return the ``forward`` of the kind itself, or ``None`` if the kind has none that can be taken over.

        Where an owner's class has this very forward and `only_multiplies`, layer and adapter are computed as one
        operation.
        """
        return None

    @classmethod
    def obstacle(cls, owner: nn.Module) -> str | None:
        """Return why this very module cannot be adapted, to be read after its name, or ``None``."""
        weight = cls.weight_of(owner)  # and not what reading it gives, which adapters may form
        assert weight is not None, "obstacles() asks for a weight"
        if weight.dtype.is_floating_point:
            return None
        return f"has a weight of {weight.dtype}, expected a floating dtype: dequantize it first"

    @classmethod
    def shape_of(cls, owner: nn.Module) -> tuple[int, int]:
        """Return ``(out_features, in_features)`` of a module."""
        in_features, out_features = cls.features(owner)
        return out_features, in_features

    @classmethod
    def weight_of(cls, owner: nn.Module) -> nn.Parameter | None:
        """Return the owner's own parameter, without any update; ``None`` where it computes it from others."""
        return owner._parameters.get(cls.attribute)

    @classmethod
    def site_fqn(cls, owner_fqn: str) -> str:
        """Return the name of the weight on disk, given its owner's: here the owner's own."""
        return owner_fqn

    @classmethod
    def parameter_names(cls) -> tuple[str, str]:
        """Return the names under which the owner holds Λ and Γ."""
        return "randlora_lambda", "randlora_gamma"

    def diagonals_of(self, owner: nn.Module, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Return Λ, ``(r, num_bases)``, and Γ, ``(num_bases, min_dim)``, of one adapter."""
        lambdas, gammas = self.parameter_names()
        return _value_of(owner._modules[lambdas], name), _value_of(owner._modules[gammas], name)

    @classmethod
    def device_beside(cls, owner: nn.Module) -> torch.device:
        """Return where Λ and Γ live: beside the weight, or on the CPU if accelerate offloads it."""
        weight = cls.weight_of(owner)
        assert weight is not None, "obstacles() asks for a weight"
        return torch.device("cpu") if cls.is_offloaded(owner) else weight.device

    @classmethod
    def is_offloaded(cls, owner: nn.Module) -> bool:
        """Whether accelerate keeps the weight elsewhere and brings it in for each forward."""
        weight = cls.weight_of(owner)
        return weight is not None and weight.is_meta and "_hf_hook" in owner.__dict__

    @classmethod
    def fresh_diagonals(cls, owner: nn.Module, r: int) -> tuple[Tensor, Tensor]:
        """Return Λ and Γ of an adapter that changes nothing yet, beside the weight.

        Returns:
            Λ = 0, ``(r, num_bases)``, and Γ = 1 / max(num_bases, min_dim), ``(num_bases, min_dim)``, both float32.
        """
        min_dim = min(cls.features(owner))
        num_bases = count_bases(min_dim, r)
        options: dict[str, Any] = {"dtype": torch.float32, "device": cls.device_beside(owner)}
        gamma = torch.full((num_bases, min_dim), 1 / max(num_bases, min_dim), **options)
        return torch.zeros((r, num_bases), **options), gamma

    def settle(self, owner: nn.Module) -> None:  # noqa: B027  # most kinds have nothing to do
        """Bring the owner into the state that its kind is adapted in; it cannot fail."""

    def unsettle(self, owner: nn.Module) -> None:  # noqa: B027  # most kinds have nothing to do
        """Undo what `settle` set."""

    def forward(self, owner: nn.Module, base_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what the owner's own forward returns, with what the active adapters add to it.

        Args:
            owner: The adapted module.
            base_forward: Its forward without adapters.
            *args: Passed on to it; the first is the input, ``(..., in_features)``.
            **kwargs: Passed on to it; the input may be the first of them.

        Returns:
            ``(..., out_features)`` in the dtype that the owner returns.
        """
        if self.own_forward is not None:
            base_forward = self.own_forward
        active = self.active()
        if not active:
            return self.base_output(owner, base_forward, *args, **kwargs)
        x: Any = input_of(owner, args, kwargs)
        if len(args) + len(kwargs) == 1 and self._is_one_operation(owner, active[0][0], x):
            (adapter, factor), *active = active
            output = self._adapted_output(owner, adapter, factor, x)
        else:
            output = self.base_output(owner, base_forward, *args, **kwargs)
        if active and not isinstance(x, Tensor):
            raise TypeError(
                f"expected the input of an adapted {type(owner).__name__} as a tensor, got {type(x).__name__}"
            )
        for adapter, factor in active:
            output = output + self._adapter_output(owner, adapter, factor, x, output.dtype)
        return output

    def active(self) -> list[tuple[Adapter, float]]:
        """Return the adapters that act at this moment, with their factors."""
        if self.state.is_disabled or self.state.is_merged:
            return []
        return [(adapter, adapter.weight) for adapter in self.adapters.values() if adapter.weight is not None]

    def base_output(self, owner: nn.Module, base_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002  # for quantized layers
        """Return the output of the owner without adapters."""
        output: Tensor = base_forward(*args, **kwargs)
        return output

    def runs_plain_forward(self, owner: nn.Module) -> bool:
        """Whether the owner's own forward is its kind's and nothing else."""
        base: Any = type(owner)
        return self.own_forward is None and base.randlora_base.forward is self.plain_forward()

    def _is_one_operation(self, owner: nn.Module, adapter: Adapter, x: object) -> bool:
        """Whether layer and adapter can be computed as one, which reads the weight without running the layer's forward.

        Not where the forward is more than that product, or the layer's input another than the adapter's.
        """
        if not self.runs_plain_forward(owner) or (adapter.config.dropout and owner.training):
            return False
        return is_plain_tensor(x) and self.only_multiplies(owner, x)

    def only_multiplies(self, owner: nn.Module, x: Tensor) -> bool:
        """Whether the kind's forward does nothing to this input but multiply by the weight and add the bias."""
        weight = self.weight_of(owner)
        if not is_plain_tensor(weight) or x.device != weight.device:
            return False
        has_autocast = x.dtype == weight.dtype or autocast_dtype(x, x.dtype) == autocast_dtype(x, weight.dtype)
        return has_autocast and x.dim() > 0 and x.shape[-1] == self.shape[1]

    def reading(self, owner: nn.Module, x: Tensor) -> Reading:
        """Return how the weight is read where `only_multiplies` holds."""
        weight = self.weight_of(owner)
        assert weight is not None, "only_multiplies() asks for a weight"
        dtype = autocast_dtype(x, weight.dtype)
        return Reading(self.in_storage_layout(weight), dtype, dtype)

    def update(self, owner: nn.Module, adapter: Adapter, factor: float) -> Update:
        """Return one adapter's update of this weight, not formed yet."""
        return Update(adapter.basis, *self.diagonals_of(owner, adapter.name), adapter.config.scaling * factor)

    def _adapted_output(self, owner: nn.Module, adapter: Adapter, factor: float, x: Tensor) -> Tensor:
        """Return the output of layer and adapter, computed as one operation."""
        weight, dtype, output_dtype = self.reading(owner, x)
        pair, diagonals = self.update(owner, adapter, factor).parts(self.shape, x.device, dtype)
        bias: Any = owner.bias
        x = x if x.dtype == dtype else x.to(dtype)
        output = adapted_linear(x, pair, diagonals, weight=weight, bias=bias, compute=self.state.compute)
        return output if output.dtype == output_dtype else output.to(output_dtype)

    def _adapter_output(
        self, owner: nn.Module, adapter: Adapter, factor: float, x: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Return one adapter's part in the dtype that the layer returned, which is autocast's where that is on."""
        x = F.dropout(x.to(dtype), adapter.config.dropout, owner.training)
        pair, diagonals = self.update(owner, adapter, factor).parts(self.shape, x.device, dtype)
        if x.is_nested:  # a nested tensor has sizes and no shape
            return F.linear(x, delta_weight(pair, diagonals, in_features=self.shape[1]))
        return adapted_linear(x, pair, diagonals, compute=self.state.compute)

    def delta_weight(self, owner: nn.Module, weights: dict[str, float]) -> Tensor:
        """Return the sum of the updates of some adapters.

        Args:
            owner: The adapted module.
            weights: Adapters' names and factors; those that this weight does not belong to are passed over.

        Returns:
            ``(out_features, in_features)`` on the weight's device, in float32, or in float64 where the weight is.
        """
        weight = self.weight_of(owner)
        assert weight is not None, "obstacles() asks for a weight"
        updates = (
            self.update(owner, self.adapters[name], factor) for name, factor in weights.items() if name in self.adapters
        )
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return sum_updates(updates, self.shape, device=self.device_beside(owner), dtype=dtype)

    def merge_obstacle(self, owner: nn.Module, into: Into) -> str | None:  # noqa: ARG002  # for quantized layers
        """Return why nothing can be merged into this weight so, to be read after its name, or ``None``."""
        return None

    @torch.no_grad()
    def merged(self, owner: nn.Module, weights: dict[str, float], into: Into) -> Merged:  # noqa: ARG002  # for quantized layers
        """Return the weight with some adapters folded in, added in float32 or wider and rounded once.

        Args:
            owner: The adapted module, which is not changed.
            weights: Adapters' names and factors.
            into: What becomes of a quantized layer.
        """
        weight = self.weight_of(owner)
        assert weight is not None, "merge() asks for a weight"
        merged = folded(weight, self.in_storage_layout(self.delta_weight(owner, weights)))
        return Merged(merged, merged)

    def exchange(self, owner: nn.Module, held: Any) -> Any:
        """Put another weight in the place of the owner's, and return what stood there."""
        weight = self.weight_of(owner)
        assert weight is not None, "merge() asks for a weight"
        own, weight.data = weight.data, held
        return own

    def fold(self, owner: nn.Module, merged: Merged) -> None:
        """Put a merged weight in the place of the owner's own, which is kept as it is."""
        self.unmerged = (self.exchange(owner, merged.held),)

    def save_unmerged(self, owner: nn.Module, destination: dict[str, Any], prefix: str) -> None:
        """Write the owner's own weight into a state dict that holds the merged one."""
        weight = self.weight_of(owner)
        assert weight is not None, "it was merged into"
        assert self.unmerged is not None, "it was merged into"
        destination[f"{prefix}{self.attribute}"] = self.unmerged[0].to(device=weight.device, dtype=weight.dtype)

    @torch.inference_mode(mode=False)  # the weight outlives the mode the caller is in
    def unfold(self, owner: nn.Module) -> None:
        """Put the owner's own weight back, bit for bit, on the device and in the dtype it was moved to meanwhile."""
        if self.unmerged is not None:
            weight = self.weight_of(owner)
            assert weight is not None, "it was merged into"
            self.exchange(owner, self.unmerged[0].to(device=weight.device, dtype=weight.dtype))
            self.unmerged = None

    def description(self) -> str:
        """Return the adapters in words, for ``print(model)``."""
        return ", ".join(
            f"{name}: r={adapter.config.r}, num_bases={count_bases(min(self.shape), adapter.config.r)}, "
            f"{adapter.config.basis}"
            for name, adapter in self.adapters.items()
        )


def _value_of(held: nn.Module | None, name: str) -> nn.Parameter:
    """Return one adapter's Λ or Γ."""
    assert held is not None, "the weight is adapted"
    parameter = held._parameters.get(name)
    if parameter is None:  # in a replica of DataParallel's, which holds it as an attribute
        return getattr(held, name)  # type: ignore[no-any-return]
    if parameter.is_meta and "_hf_hook" in held.__dict__:  # accelerate brings values in for a call and no longer
        return held.forward(name)  # type: ignore[no-any-return]
    return parameter

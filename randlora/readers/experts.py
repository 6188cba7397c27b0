"""Stacks of experts' weights, ``(experts, out, in)`` or ``(experts, in, out)``, as in transformers.

Reading an adapted stack returns an `AdaptedStack`, which forms no update of an expert that no token visits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from randlora.bases.spec import Shape
from randlora.blocks import BatchRows
from randlora.config import RandLoRAConfig
from randlora.errors import AdapterError
from randlora.functional import Compute
from randlora.functional.region import Region
from randlora.functional.scratch import is_transformed
from randlora.layers.linear import LinearAdapter
from randlora.layers.registry import FORMS, register_layer, register_parameter
from randlora.layers.weight import Update, split_of
from randlora.readers.adapted_stack import AdaptedStack, Own, Parts, Shared
from randlora.readers.read_weight import ReadWeight


class Experts(ReadWeight):
    """Adapts a stack of weights ``(experts, out_features, in_features)``.

    To adapt the stack of a different class, subclass this with the name of the parameter as ``attribute``, and register
    the subclass for that class with `randlora.layers.register_layer`.
    """

    kind = "experts"
    is_read_once = True  # code that takes one expert after the other reads the stack for each

    @classmethod
    def fits(cls, owner: nn.Module, weight: Tensor) -> bool:
        """Whether a parameter is a stack that is stored in this way: transformers marks owners of transposed ones."""
        is_marked = bool(owner.__dict__.get("is_transposed", False))
        return not is_lazy(weight) and len(_shape(weight)) == 3 and is_marked is cls.is_transposed

    @classmethod
    def obstacle(cls, owner: nn.Module) -> str | None:
        """Return why this stack cannot be adapted, as a phrase that follows its name, or ``None``."""
        weight = cls.weight_of(owner)
        if len(_shape(weight)) != 3:
            return f"has shape {tuple(weight.shape)}, expected a stack of matrices, (experts, rows, columns)"
        return super().obstacle(owner)

    @classmethod
    def features(cls, owner: nn.Module) -> tuple[int, int]:
        """Return ``(in_features, out_features)`` of one expert."""
        *_, rows, columns = _shape(cls.weight_of(owner))
        return (rows, columns) if cls.is_transposed else (columns, rows)

    @classmethod
    def shape_of(cls, owner: nn.Module, config: RandLoRAConfig) -> Shape:
        """Return ``(experts, out_features, in_features)``, or ``(out_features, in_features)`` for a shared update."""
        matrix = super().shape_of(owner, config)
        return matrix if config.experts == "shared" else (_shape(cls.weight_of(owner))[0], *matrix)

    @classmethod
    def rows_of(cls, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchRows:
        """Return which arguments have the rows: the tokens in order, and the experts that each token goes to."""
        rows = super().rows_of(owner, args, kwargs)
        given = [*args, *kwargs.values()]
        if not any(isinstance(each, Tensor) and each.dim() == 2 and len(each) == rows.size for each in given[1:]):
            raise AdapterError(
                f"an adapted {owner.randlora_base.__name__} is given tokens sorted by expert, so routed cannot tell "
                "the rows of the batch: exclude it when the adapter is made, or activate one adapter at a time"
            )
        return rows

    in_storage_layout = staticmethod(LinearAdapter.in_storage_layout)  # a shared one is broadcast to all experts

    def value(self, owner: nn.Module) -> Tensor:
        """Return the stack with its updates. For compiled and transformed code the sum is formed at once."""
        weight, active = self.weight_of(owner), self.active()
        if not active or split_of(type(self), weight) is not None:
            return super().value(owner)
        updates = self.here([self.update(owner, site_adapter, factor) for site_adapter, factor in active])
        if is_transformed():
            return super().with_updates(weight, updates)
        return AdaptedStack(self._parts(weight, updates, self.state.compute))

    @classmethod
    def with_updates(cls, weight: Tensor, updates: Sequence[Update], region: Region | None = None) -> Tensor:
        """Return the stack plus some updates, one matrix after the other. Any number of matrices may be given."""
        within = updates if region is None else [update.within(region) for update in updates]
        parts = cls._parts(weight, within, "auto")
        merged = torch.empty_like(weight)
        for index in range(len(weight)):
            merged[index] = parts.at(index).formed()
        return merged

    @classmethod
    def _parts(cls, weight: Tensor, updates: Sequence[Update], compute: Compute) -> Parts:
        own = Own(update for update in updates if len(update.shape) == 3)
        shared = Shared(update for update in updates if len(update.shape) == 2)
        return Parts(weight, not cls.is_transposed, own, shared, compute)


class TransposedExperts(Experts):
    """Adapts a stack of weights ``(experts, in_features, out_features)``."""

    is_transposed = True

    @staticmethod
    def in_storage_layout(delta: Tensor) -> Tensor:
        """Return the transposes."""
        return delta.mT


FORMS.update({"stack": Experts, "transposed stack": TransposedExperts})
LLAMA_4 = "transformers.models.llama4.modeling_llama4.Llama4TextExperts"  # does not say that it is transposed


@register_parameter(Experts.fits)
class _GateUpProj(Experts):
    attribute = "gate_up_proj"


@register_parameter(Experts.fits)
class _GateProj(Experts):
    attribute = "gate_proj"


@register_parameter(Experts.fits)
class _UpProj(Experts):
    attribute = "up_proj"


@register_parameter(Experts.fits)
class _DownProj(Experts):
    attribute = "down_proj"


@register_layer(LLAMA_4)
@register_parameter(TransposedExperts.fits)
class _TransposedGateUpProj(TransposedExperts):
    attribute = "gate_up_proj"


@register_parameter(TransposedExperts.fits)
class _TransposedUpProj(TransposedExperts):
    attribute = "up_proj"


@register_layer(LLAMA_4)
@register_parameter(TransposedExperts.fits)
class _TransposedDownProj(TransposedExperts):
    attribute = "down_proj"


register_layer("transformers.models.jetmoe.modeling_jetmoe.JetMoeParallelExperts")(Experts)


def _shape(weight: Tensor) -> tuple[int, ...]:
    """Return the shape of a weight, from ``ds_shape`` if DeepSpeed's ZeRO-3 emptied it."""
    return tuple(map(int, getattr(weight, "ds_shape", weight.shape)))

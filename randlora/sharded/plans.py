"""Weights that a plan of transformers (``tp_plan``, ``ep_plan``) splits over processes.

transformers sets a forward on the layer. It places the input, calls the layer's own forward, and places the output.
Adapters belong inside this forward, where input and output belong to the process's part of the weight. The parameters
are `DTensor` objects, but during this forward transformers replaces them with their local tensors: for layers without
gradients, and always for stacks of experts and packed layers. The local tensor of a packed weight has several pieces of
it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.layers.base import AdapterLayer
from randlora.layers.scopes import forward_of
from randlora.layers.split import Splitter, register_splitter
from randlora.sharded.mesh import is_dtensor
from randlora.sharded.products import LocalPiece, local_product

STYLES = {
    "transformers.distributed.tensor_parallel": "TensorParallelLayer",
    "transformers.distributed.expert_parallel": "ExpertParallelLayer",
}
"""The modules that split weights (not imported here), and the base classes of their styles."""


class Plan(NamedTuple):
    """How transformers splits a layer.

    Attributes:
        style: The object that set the layer's forward.
        mesh: The mesh that it splits weights over.
        shares_batch: Whether the processes have the same batch.
    """

    style: Any
    mesh: Any
    shares_batch: bool


def plan_of(forward: object) -> Plan | None:
    """Return how transformers splits the layer that it set a forward on, or ``None`` if it did not set it.

    The layer has no public name for this; it is in variables of the forward, a closure.
    """
    if not inspect.isfunction(forward) or forward.__module__ not in STYLES:
        return None
    kind = getattr(sys.modules[forward.__module__], STYLES[forward.__module__])
    held = inspect.getclosurevars(forward).nonlocals
    if not isinstance(style := held.get("self"), kind):
        return None
    mesh = held["mesh"] if "mesh" in held else held.get("ep_mesh")
    return Plan(style, mesh, getattr(held.get("implementation"), "shares_batch", True))


@register_splitter
class Plans(Splitter):
    """Plans of transformers."""

    def obstacle(self, owner: nn.Module, weight: Tensor, *, is_quantized: bool) -> str | None:
        """Return why a weight that a plan split cannot be adapted, as a phrase after its name, or ``None``."""
        plan = plan_of(owner.__dict__.get("forward")) if is_dtensor(weight) else None
        if plan is None:
            return None
        if is_quantized:
            return (
                f"is a quantized {type(owner).__name__} whose weight {type(plan.style).__name__} of transformers has "
                "split, which leaves it without codes, so it cannot compute: load the model without a plan, or "
                "unquantized"
            )
        if plan.shares_batch:
            return None
        return (
            f"is split by {type(plan.style).__name__} of transformers over processes with different batches, and an "
            "adapter cannot sum their gradients: set ep_size to tp_size, or exclude it"
        )

    def adopt(self, owner: Any, layer: AdapterLayer, held_as: str) -> bool:
        """Have an adapter layer computed within the forward that a plan set on its owner; ``False`` without a plan."""
        others = [other.adopted for other in owner.randlora.values() if other.adopted is not None]
        inner, around = others[0] if others else (owner.__dict__[held_as], None)
        plan, weight = plan_of(inner), layer.weight_of(owner)
        if plan is None or not is_dtensor(weight):
            return False
        if weight.device_mesh.ndim == 1:  # else fully_shard splits it too
            layer.piece = LocalPiece.of(weight, layer.region_here(weight))
        if around is None:
            adds = layer.is_called and layer.adds_to_output(owner)
            within = _within(owner, layer, plan, held_as) if adds else inner
            around = _around(owner, within)
        layer.adopted = inner, around
        owner.__dict__[held_as] = around
        return True


def _within(owner: Any, layer: AdapterLayer, plan: Plan, held_as: str) -> Callable[..., Any]:
    """Return the forward of a plan with the layer's own and its adapters in it."""

    def forward(x: Any) -> Any:
        active, piece = layer.active(), layer.piece
        if not active or not isinstance(piece, LocalPiece) or is_dtensor(layer.weight_of(owner)):
            return type(owner).forward(owner, x)
        output = layer.base_output(owner, partial(owner.randlora_base.forward, owner), x)
        for part, factor in active:
            update = piece.part(layer.update(owner, part, factor))
            own = F.dropout(x.to(output.dtype), part.adapter.config.dropout, owner.training)
            output = output + local_product(update, own, piece.region, layer.state.compute)
        return output

    del owner.__dict__[held_as]
    owner.__dict__["forward"] = forward
    plan.style.install_forward(owner, plan.mesh)
    made: Callable[..., Any] = owner.__dict__.pop("forward")
    return made


def _around(owner: Any, planned: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that tells adapter layers what the local tensors are part of that a plan's forward has used.

    It computes each weight that is read a single time, and has this process take part in the sums of gradients of
    those that its tokens do not need.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return planned(*args, **kwargs)
        for layer in owner.randlora.values():
            if is_dtensor(weight := layer.weight_of(owner)):  # fully_shard, if any, has gathered it for this forward
                layer.piece = LocalPiece.of(weight, layer.region_here(weight))
        with forward_of(owner) as values:
            output = planned(*args, **kwargs)
            read = {(reader, attribute) for reader, attribute, with_grad, *_ in values if with_grad}
            for layer in owner.randlora.values() if torch.is_grad_enabled() else ():
                if not layer.is_called and (id(owner), layer.attribute) not in read:
                    output = _taking_part(owner, layer, output)
        return output

    return forward


def _taking_part(owner: Any, layer: AdapterLayer, output: Tensor) -> Tensor:
    """Return an output that no update is in, whose backward takes part in the sums over processes nevertheless."""
    assert layer.piece is not None, "its owner's forward is a plan's"
    for part, factor in layer.active():
        update = layer.piece.part(layer.update(owner, part, factor))
        output = output + 0 * (update.lam.sum() + update.gamma.sum()).to(output.dtype)
    return output

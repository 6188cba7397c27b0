"""Layers that a plan of transformers (``tp_plan``) splits over processes.

transformers sets a forward on such a layer, which places the input, has the layer's own forward compute, and places the
output. Adapters belong inside of it: there input and output are those of a process's part of the weight. The parameters
are `DTensor` objects, but during a forward without gradients transformers puts their local tensors in their place.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.layers.sharded import local_product
from randlora.placement.dtensor import is_dtensor

if TYPE_CHECKING:
    from randlora.layers.base import AdapterLayer

PLANS = "transformers.distributed.tensor_parallel"
"""The module that splits layers, which is not imported here."""


def style_behind(forward: object) -> Any:
    """Return the `TensorParallelLayer` of transformers that set a forward, or ``None`` if none did.

    It has no public name on the layer: it is a variable of the forward, a closure.
    """
    kind = getattr(sys.modules.get(PLANS), "TensorParallelLayer", None)
    if kind is None or not inspect.isfunction(forward) or forward.__module__ != PLANS:
        return None
    style = inspect.getclosurevars(forward).nonlocals.get("self")
    return style if isinstance(style, kind) else None


def plan_obstacle(owner: nn.Module, weight: Tensor, *, is_called: bool) -> str | None:
    """Return why a weight that is split over processes cannot be adapted, or ``None``; a phrase after its name."""
    if not is_dtensor(weight):
        return None
    placements = ", ".join(map(str, weight.placements))
    if weight.device_mesh.ndim == 1 and any(type(each).__name__ == "_StridedShard" for each in weight.placements):
        return f"is split so that each process has several pieces of it ({placements}): exclude it"
    if (style := style_behind(owner.__dict__.get("forward"))) is None:
        return None
    with torch.enable_grad():
        is_local = style.should_use_local_tensors(owner)
    if is_called and not is_local:
        return None
    return f"is split by {type(style).__name__} of transformers, which computes with plain tensors: exclude it"


def forward_within(owner: Any, layer: AdapterLayer, planned: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return the forward for an adapted layer that a plan splits, or ``None`` if no plan set the one that it has.

    Args:
        owner: The layer, which must not have a forward of its own now.
        layer: The adapter layer.
        planned: The forward that was set on the layer.
    """
    style, weight = style_behind(planned), layer.weight_of(owner)
    if style is None or not is_dtensor(weight):
        return None
    mesh, region = weight.device_mesh, layer.region_here(weight)

    def forward(x: Any) -> Any:
        active = layer.active()
        if not active or is_dtensor(layer.weight_of(owner)):
            return type(owner).forward(owner, x)
        output = owner.randlora_base.forward(owner, x)
        for part, factor in active:
            update = layer.update(owner, part, factor).within(region)
            own = F.dropout(x.to(output.dtype), part.adapter.config.dropout, owner.training)
            output = output + local_product(update, own, region, layer.state.compute)
        return output

    owner.__dict__["forward"] = forward
    style.install_forward(owner, mesh)
    made: Callable[..., Any] = owner.__dict__.pop("forward")
    return made

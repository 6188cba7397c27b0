"""Products with weights that tensor parallelism splits, by device meshes or by a plan of transformers.

A process computes only with its part of the bases; all that is sent besides are the gradients of Λ and Γ, whole on all.
For a plan (``tp_plan``, ``ep_plan``), transformers sets a forward on the layer, in which a process has the input and
output of its part of the weight, and local tensors in place of parameters: adapters belong inside of it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.functional import Compute, adapted_linear, update_rows
from randlora.functional.region import Region, entries_of
from randlora.layers.base import AdapterLayer
from randlora.layers.scopes import forward_of
from randlora.layers.weight import SPLITTERS, Split, Splitter, StoredWeight, Update
from randlora.sharded.places import Sharded, is_dtensor, is_split, sharded_like


class LocalPiece(NamedTuple):
    """A process's part of a weight whose products are computed with plain tensors."""

    mesh: Any
    grads: list[Any]  # the placements of the gradients of Λ and Γ that a process computes
    region: Region  # the part of the update for this process's part of the weight

    @classmethod
    def of(cls, weight: Any, region: Region) -> LocalPiece:
        """Describe a weight, a `DTensor`."""
        return cls(weight.device_mesh, sums_of(weight), region)

    def part(self, update: Update) -> Update:
        """Return the part of an update for this process, with Λ and Γ whose gradients are summed over the mesh."""
        if torch.is_grad_enabled() and (update.lam.requires_grad or update.gamma.requires_grad):
            update = on_mesh(update, self.mesh, self.grads)
        return update.within(self.region)


def sums_of(weight: Any) -> list[Any]:
    """Return the placements of the gradients of Λ and Γ that a process computes with its part and all tokens."""
    from torch.distributed.tensor import Partial, Replicate  # noqa: PLC0415  # takes long, and is there already

    return [Partial() if is_split(placement) else Replicate() for placement in weight.placements]


def layout_of(weight: Any, x: Any, inputs: int) -> tuple[list[Any], ...]:
    """Return the placements of a product's operands on the mesh of a weight, by dimension of the mesh.

    These are of x, of the output, and of the gradients of x, Λ and Γ (as one) that a process computes. ``inputs`` is
    the dimension of the weight that has its inputs.
    """
    from torch.distributed.tensor import Partial, Replicate  # noqa: PLC0415  # see above

    last = x.dim() - 1
    rows: list[tuple[Any, ...]] = []
    given = x.placements if is_dtensor(x) else [Replicate()] * weight.device_mesh.ndim
    for of_weight, of_x in zip(weight.placements, given, strict=True):
        if is_split(of_weight) and of_weight.dim == inputs:
            along = _split_at(of_weight, last)
            rows.append((along, Partial(), along, Partial()))
        elif is_split(of_weight):
            rows.append((Replicate(), _split_at(of_weight, last), Partial(), Partial()))
        elif is_split(of_x) and of_x.dim != last:  # each process has some of the tokens
            rows.append((of_x, of_x, of_x, Partial()))
        else:
            rows.append((Replicate(),) * 4)
    return tuple([*of_one] for of_one in zip(*rows, strict=True))


def _split_at(placement: Any, dim: int) -> Any:
    """Return a placement that splits a different dimension in the same way."""
    pieces = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(dim, **pieces)


def on_mesh(update: Update, mesh: Any, grads: list[Any]) -> Update:
    """Return an update with Λ and Γ as plain tensors, whole, whose gradients are summed over a mesh."""
    from torch.distributed.tensor import DTensor, Replicate  # noqa: PLC0415

    def local(diagonal: Any) -> Tensor:
        if is_dtensor(diagonal):
            replicated = diagonal.redistribute(placements=[Replicate()] * diagonal.device_mesh.ndim)
        else:
            replicated = DTensor.from_local(diagonal, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return replicated.to_local(grad_placements=grads)  # type: ignore[no-any-return]

    return update._replace(lam=local(update.lam), gamma=local(update.gamma))


def region_here(layer: type[StoredWeight] | StoredWeight, weight: Any) -> Region:
    """Return the part of the update for this process's part of a `DTensor`, a weight of a kind of layer."""
    return layer.region_of(tuple(weight.shape), Sharded(weight).part)


def local_product(update: Update, x: Tensor, region: Region, compute: Compute) -> Tensor:
    """Return the product of an input with the part of an update for a part of a weight, or a summand of it."""
    if not (entries_of(region.rows) and entries_of(region.columns)):  # it takes part in the sums nevertheless
        nothing = x.sum() + update.lam.sum() + update.gamma.sum()
        return x.new_zeros((*x.shape[:-1], entries_of(region.rows))) + 0 * nothing.to(x.dtype)
    return adapted_linear(x, *update.parts(x.device, x.dtype), is_wide=update.is_wide, compute=compute)


class SplitOnMesh(Split):
    """A weight that is a `DTensor`. Results of computations with it are placed on its mesh too."""

    def __init__(self, layer: type[StoredWeight], weight: Any) -> None:
        """Take a weight of a kind of layer."""
        self._layer, self._weight = layer, weight

    def product(self, update: Update, x: Any, compute: Compute) -> Any:
        """Return the product of an input, a `DTensor` on the mesh or whole in every process, with an update."""
        from torch.distributed.tensor import DTensor  # noqa: PLC0415

        mesh, inputs = self._weight.device_mesh, 0 if self._layer.is_transposed else 1
        of_x, of_output, of_grad_x, of_diagonals = layout_of(self._weight, x, inputs)
        if not is_dtensor(x):
            x = DTensor.from_local(x, mesh, of_x, run_check=False)
        elif list(x.placements) != of_x:
            x = x.redistribute(placements=of_x)
        local = x.to_local(grad_placements=of_grad_x)
        shape = (*x.shape[:-1], update.shape[-2])
        region = region_here(self._layer, self._weight)
        output = local_product(on_mesh(update, mesh, of_diagonals).within(region), local, region, compute)
        return _placed(output, mesh, of_output, shape)

    def rows(self, updates: Iterable[Update], ids: Any, padding_idx: int | None) -> Any:
        """Return the rows of a table with updates, ``(*ids.shape, columns)``, placed like the base's lookup."""
        from torch.distributed.tensor import Partial, Replicate  # noqa: PLC0415

        weight, mesh, region = self._weight, self._weight.device_mesh, region_here(self._layer, self._weight)
        ids = ids.full_tensor() if is_dtensor(ids) else ids

        def placed(placement: Any) -> Any:
            if not is_split(placement):
                return Replicate()
            return Partial() if placement.dim == 0 else _split_at(placement, ids.dim())

        own, is_here, before = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool), 0
        for start, stop in region.rows:
            is_inside = (ids >= start) & (ids < stop)
            own, is_here = torch.where(is_inside, ids - start + before, own), is_here | is_inside
            before += stop - start
        local = F.embedding(own, weight.to_local())
        for update in updates:
            part = on_mesh(update, mesh, sums_of(weight)).within(region)
            pair, of_part = part.parts(local.device, local.dtype)
            rows = update_rows(own, pair, of_part, num_rows=before, is_wide=part.is_wide)
            if padding_idx is not None:  # which gets no gradient, as in torch
                rows = torch.where((ids == padding_idx).unsqueeze(-1), rows.detach(), rows)
            local = local + rows
        local = local * is_here.unsqueeze(-1).to(local.dtype)
        return _placed(local, mesh, [*map(placed, weight.placements)], (*ids.shape, weight.shape[1]))

    def value(self, updates: Iterable[Update]) -> Any:
        """Return the weight with updates, split in the same way."""
        weight = self._weight
        parts = [on_mesh(update, weight.device_mesh, sums_of(weight)) for update in updates]
        own, part = weight.to_local(), Sharded(weight).part
        return sharded_like(weight, self._layer.part_with_updates(own, part, tuple(weight.shape), parts))


def _placed(local: Tensor, mesh: Any, placements: list[Any], shape: tuple[int, ...]) -> Any:
    """Return a `DTensor` of a shape."""
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides)


STYLES = {
    "transformers.distributed.tensor_parallel": "TensorParallelLayer",
    "transformers.distributed.expert_parallel": "ExpertParallelLayer",
}
"""The modules that split weights (not imported here), and the base classes of their styles."""


class SplitPlan(NamedTuple):
    """How transformers splits a layer: by which object, and with which options that has set its forward."""

    style: Any
    options: dict[str, Any]  # a mesh, and as of transformers 5.25 the config of the model
    shares_batch: bool  # whether the processes have the same batch


def plan_of(forward: object) -> SplitPlan | None:
    """Return how transformers splits the layer that it set a forward on: only variables of a closure tell."""
    if not inspect.isfunction(forward) or forward.__module__ not in STYLES:
        return None
    kind = getattr(sys.modules[forward.__module__], STYLES[forward.__module__])
    held = inspect.getclosurevars(forward).nonlocals
    if not isinstance(style := held.get("self"), kind):
        return None
    options = {name: held[name] for name in ("mesh", "config") if name in held}
    return SplitPlan(style, options, getattr(held.get("implementation"), "shares_batch", True))


class Meshes(Splitter):
    """Device meshes, over which tensor parallelism, plans of transformers and `fully_shard` split weights."""

    def split(self, layer: type[StoredWeight], weight: Tensor) -> SplitOnMesh | None:
        """Return how to compute with a weight that is a `DTensor`."""
        return SplitOnMesh(layer, weight) if is_dtensor(weight) else None

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

    def adopt(self, owner: Any, layer: AdapterLayer, forward_name: str) -> bool:
        """Have an adapter layer computed within the forward that a plan set on its owner; ``False`` without a plan."""
        others = [other.adopted for other in owner.randlora.values() if other.adopted is not None]
        inner, around = others[0] if others else (owner.__dict__[forward_name], None)
        plan, weight = plan_of(inner), layer.find_weight(owner)
        adds = layer.is_called and layer.adds_to_output(owner)
        if plan is None or not (adds or is_dtensor(weight)):
            return False
        if is_dtensor(weight) and weight.device_mesh.ndim == 1:  # else fully_shard splits it too
            layer.piece = LocalPiece.of(weight, region_here(layer, weight))
        if around is None:
            around = _around(owner, _within(owner, layer, plan, forward_name) if adds else inner)
        layer.adopted = inner, around
        owner.__dict__[forward_name] = around
        return True


SPLITTERS.append(Meshes())


def _within(owner: Any, layer: AdapterLayer, plan: SplitPlan, forward_name: str) -> Callable[..., Any]:
    """Return the forward of a plan with the layer's own and its adapters in it."""

    def forward(x: Any) -> Any:
        active, piece = layer.active(), layer.piece
        if not active or not isinstance(piece, LocalPiece) or is_dtensor(layer.find_weight(owner)):
            return type(owner).forward(owner, x)
        output = layer.base_output(owner, partial(owner.randlora_base.forward, owner), x)
        for site_adapter, factor in active:
            update = piece.part(layer.update(owner, site_adapter, factor))
            own = F.dropout(x.to(output.dtype), site_adapter.adapter.config.dropout, owner.training)
            output = output + local_product(update, own, piece.region, layer.state.compute)
        return output

    del owner.__dict__[forward_name]
    owner.__dict__["forward"] = forward
    plan.style.install_forward(owner, **plan.options)
    return owner.__dict__.pop("forward")  # type: ignore[no-any-return]


def _around(owner: Any, planned: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that tells adapter layers what the local tensors of a plan's forward are part of.

    This process takes part in the sums of gradients of the weights that its tokens do not need, too.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return planned(*args, **kwargs)
        for layer in owner.randlora.values():
            if is_dtensor(weight := layer.find_weight(owner)):  # fully_shard, if any, has gathered it for this forward
                layer.piece = LocalPiece.of(weight, region_here(layer, weight))
        with forward_of(owner) as values:
            output = planned(*args, **kwargs)
            read = {(reader, attribute) for reader, attribute, with_grad, *_ in values if with_grad}
            for layer in owner.randlora.values() if torch.is_grad_enabled() else ():
                if layer.piece is not None and not layer.is_called and (id(owner), layer.attribute) not in read:
                    output = _taking_part(owner, layer, output)
        return output

    return forward


def _taking_part(owner: Any, layer: AdapterLayer, output: Tensor) -> Tensor:
    """Return an output that no update is in, whose backward takes part in the sums over processes nevertheless."""
    for site_adapter, factor in layer.active():
        update = layer.piece.part(layer.update(owner, site_adapter, factor))
        output = output + 0 * (update.lam.sum() + update.gamma.sum()).to(output.dtype)
    return output

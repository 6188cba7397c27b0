"""Products with weights that tensor parallelism splits. Each process computes its part of the update.

A process slices its part of the bases and computes only with this part. The output is placed like the base's output:
split if the weight's outputs are split, a sum over processes if its inputs are. The only additional communication is
the sum of the gradients of Λ and Γ, which are whole on every process.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.functional import Compute, adapted_linear, update_rows
from randlora.functional.region import Region, entries_of
from randlora.layers.split import Split, Splitter, register_splitter
from randlora.layers.stored import StoredWeight
from randlora.layers.update import Update
from randlora.sharded.mesh import Shard, is_dtensor, is_split


class LocalPiece(NamedTuple):
    """A process's part of a weight whose products are computed with plain tensors.

    Attributes:
        mesh: The mesh that the weight is split over.
        grads: The gradients of Λ and Γ that a process computes, dimension by dimension of the mesh.
        region: The part of the update for this process's part of the weight.
    """

    mesh: Any
    grads: list[Any]
    region: Region

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


class Layout(NamedTuple):
    """How the operands of a product are placed on the mesh of a weight, dimension by dimension of the mesh.

    Attributes:
        x: The input.
        output: The output.
        grad_x: The gradient of the input that a process computes.
        diagonals: The gradients of Λ and Γ that a process computes.
    """

    x: list[Any]
    output: list[Any]
    grad_x: list[Any]
    diagonals: list[Any]


def layout_of(weight: Any, x: Any, inputs: int) -> Layout:
    """Return the layout of a product; ``inputs`` is the dimension of the weight that has its inputs."""
    from torch.distributed.tensor import Partial, Replicate  # noqa: PLC0415  # see above

    last = x.dim() - 1
    layout = Layout([], [], [], [])
    given = x.placements if is_dtensor(x) else [Replicate()] * weight.device_mesh.ndim
    for of_weight, of_x in zip(weight.placements, given, strict=True):
        if is_split(of_weight) and of_weight.dim == inputs:
            along = _split_at(of_weight, last)
            each: tuple[Any, ...] = along, Partial(), along, Partial()
        elif is_split(of_weight):
            each = Replicate(), _split_at(of_weight, last), Partial(), Partial()
        elif is_split(of_x) and of_x.dim != last:  # each process has some of the tokens
            each = of_x, of_x, of_x, Partial()
        else:
            each = (Replicate(),) * 4
        for placements, one in zip(layout, each, strict=True):
            placements.append(one)
    return layout


def _split_at(placement: Any, dim: int) -> Any:
    """Return a placement that splits a different dimension in the same way."""
    pieces = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(dim, **pieces)


def on_mesh(update: Update, mesh: Any, grads: list[Any]) -> Update:
    """Return an update with Λ and Γ as plain tensors, whole, whose gradients are summed over a mesh."""
    from torch.distributed.tensor import DTensor, Replicate  # noqa: PLC0415

    def local(diagonal: Any) -> Tensor:
        whole = [Replicate()] * mesh.ndim
        if is_dtensor(diagonal):
            replicated = diagonal.redistribute(placements=[Replicate()] * diagonal.device_mesh.ndim)
        else:
            replicated = DTensor.from_local(diagonal, mesh, whole, run_check=False)
        plain: Tensor = replicated.to_local(grad_placements=grads)
        return plain

    return update._replace(lam=local(update.lam), gamma=local(update.gamma))


def local_product(update: Update, x: Tensor, region: Region, compute: Compute) -> Tensor:
    """Return the product of an input, for a part of a weight, with that part of an update, ``(..., rows)``.

    If the part does not have all inputs, this is a summand of the output.
    """
    if not (entries_of(region.rows) and entries_of(region.columns)):  # it takes part in the sums nevertheless
        nothing = x.sum() + update.lam.sum() + update.gamma.sum()
        return x.new_zeros((*x.shape[:-1], entries_of(region.rows))) + 0 * nothing.to(x.dtype)
    return adapted_linear(x, *update.parts(x.device, x.dtype), is_wide=update.is_wide, compute=compute)


class SplitOnMesh(Split):
    """A weight that is a `DTensor`. Results of computations with it are placed on its mesh too."""

    def __init__(self, layer: type[StoredWeight], weight: Any) -> None:
        """Take a weight of a kind of layer."""
        self._layer, self._weight = layer, weight

    @property
    def _region(self) -> Region:
        """The part of an update for this process's part, which those who ask whether a weight is split do not need."""
        return self._layer.region_here(self._weight)

    def product(self, update: Update, x: Any, compute: Compute) -> Any:
        """Return the product of an input, a `DTensor` on the mesh or whole in every process, with an update."""
        from torch.distributed.tensor import DTensor  # noqa: PLC0415

        mesh, layout = self._weight.device_mesh, layout_of(self._weight, x, 0 if self._layer.is_transposed else 1)
        if not is_dtensor(x):
            x = DTensor.from_local(x, mesh, layout.x, run_check=False)
        elif list(x.placements) != layout.x:
            x = x.redistribute(placements=layout.x)
        local = x.to_local(grad_placements=layout.grad_x)
        shape = (*x.shape[:-1], update.shape[-2])
        region = self._region
        output = local_product(on_mesh(update, mesh, layout.diagonals).within(region), local, region, compute)
        return _placed(output, mesh, layout.output, shape)

    def rows(self, updates: Iterable[Update], ids: Any, padding_idx: int | None) -> Any:
        """Return the rows of a table with updates, ``(*ids.shape, columns)``, placed like the base's lookup."""
        from torch.distributed.tensor import Partial, Replicate  # noqa: PLC0415

        weight, mesh, region = self._weight, self._weight.device_mesh, self._region
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
        from torch.distributed.tensor import DTensor  # noqa: PLC0415  # there already

        weight, mesh, shape = self._weight, self._weight.device_mesh, self._weight.shape
        parts = [on_mesh(update, mesh, sums_of(weight)) for update in updates]
        local = self._layer.part_with_updates(weight.to_local(), Shard(weight).part, tuple(shape), parts)
        return DTensor.from_local(local, mesh, weight.placements, run_check=False, shape=shape, stride=weight.stride())


@register_splitter
class Meshes(Splitter):
    """Device meshes, over which tensor parallelism and `fully_shard` split weights."""

    def split(self, layer: type[StoredWeight], weight: Tensor) -> SplitOnMesh | None:
        """Return how to compute with a weight that is a `DTensor`."""
        return SplitOnMesh(layer, weight) if is_dtensor(weight) else None


def _placed(local: Tensor, mesh: Any, placements: list[Any], shape: tuple[int, ...]) -> Any:
    """Return a `DTensor` of a shape."""
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides)

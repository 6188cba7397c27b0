"""Rows of a table that adapters train: of an embedding, and of the heads that share it, which stays as it is.

An embedding looks up the trained rows beside the others, and a head multiplies by them too. Only code that reads the
weight itself gets a copy of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.bases.spec import Shape
from randlora.errors import AdapterError
from randlora.functional.region import Region, take_spans
from randlora.functional.scratch import is_transformed
from randlora.layers.base import AdapterLayer, input_of, product_dtype
from randlora.layers.diagonals import Diagonal
from randlora.layers.in_place import FORWARDS, plain_class
from randlora.layers.linear import FORWARD, LinearAdapter
from randlora.layers.scopes import run_forward
from randlora.layers.weight import split_of
from randlora.places import place_of, whole
from randlora.ranks import run_collectives
from randlora.replaced import whole_shape
from randlora.state import Adapter, ModelState

LOOKUP = nn.Embedding.forward  # read on import, in case it is replaced later


class Rows(Diagonal):
    """The trained rows of a table, ``(rows, width)``, float32 or wider per adapter; tied where the table is."""

    def reset_parameters(self) -> None:
        """Raise an `AdapterError`, because rows begin with the values that the table had."""
        raise AdapterError("trained rows have no initial values without those of the table: load the adapter again")


@dataclass(eq=False)
class SiteRows:
    """The rows of one table that one adapter trains, with what a `SiteAdapter` has too."""

    adapter: Adapter
    fqn: str  # of the parameter
    shape: Shape  # of the table
    numbers: Tensor  # of the rows, in order
    position: int | None = None

    @property
    def weight(self) -> float | None:
        """1 if the rows act, whatever the factor of the adapter's updates, else ``None``."""
        return None if self.adapter.weight is None else 1.0

    def on(self, device: torch.device) -> Tensor:
        """Return the numbers on a device, where they stay."""
        if self.numbers.device != device and not torch.compiler.is_compiling():
            with torch.inference_mode(mode=False):
                self.numbers = self.numbers.to(device)
        return self.numbers.to(device)


def _tied(method: Callable[..., None]) -> Callable[..., None]:
    """Have modules that share a weight share what a method puts in its place."""

    def change(layer: RowsAdapter, owner: nn.Module, *args: Any) -> None:
        own = owner._parameters
        tied = [each for each in layer.tied if each._parameters["weight"] is own["weight"]]
        method(layer, owner, *args)
        for each in tied:
            each._parameters["weight"] = own["weight"]

    return change


class RowsAdapter(AdapterLayer):
    """Replaces rows of the weight of an embedding or a linear layer; the same object in all modules that share it."""

    kind: ClassVar[str] = "embedding"
    is_read: ClassVar[bool] = True
    is_rows: ClassVar[bool] = True
    diagonal_classes: ClassVar[tuple[type[Diagonal], ...]] = (Rows,)
    in_storage_layout = staticmethod(LinearAdapter.in_storage_layout)  # unchanged, (rows, width)

    def __init__(self, owner: nn.Module, state: ModelState, tied: Sequence[nn.Module] = ()) -> None:
        """Create it for a module, and all that share its weight."""
        super().__init__(owner, state)
        self.adapters: dict[str, Any] = {}
        self.tied = tuple(tied)

    @staticmethod
    def features(owner: nn.Module) -> tuple[int, int]:
        """Return the sizes of a row and of a column of the table."""
        rows, width = whole_shape(RowsAdapter.weight_of(owner))
        return width, rows

    @classmethod
    def parameter_names(cls) -> tuple[str, ...]:
        """Return the name under which the owner holds the rows."""
        return ("randlora_rows",)

    @classmethod
    def obstacle(cls, owner: nn.Module) -> str | None:
        """Return why rows of this module cannot be trained, as a phrase that follows its name, or ``None``."""
        if not isinstance(owner, nn.Embedding | nn.Linear):
            return f"is a {plain_class(owner).__name__}: expected an embedding, or a linear layer such as a head"
        own, held = plain_class(owner).forward, [owner.__dict__[name] for name in FORWARDS if name in owner.__dict__]
        if any(getattr(each, "__func__", None) not in (own, type(owner).forward) for each in held[:1]):
            return "has a forward that was set on it: set it on its class, or after this call"
        if isinstance(owner, nn.Embedding) and (owner.max_norm is not None or owner.scale_grad_by_freq):
            return "changes its rows or their gradients by max_norm or scale_grad_by_freq: set them to None and False"
        return super().obstacle(owner)

    def forward(self, owner: nn.Module, base_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the output of the owner's forward with the rows of the active adapters."""
        x, weight, active = input_of(owner, args, kwargs), self.weight_of(owner), self.active()
        if active and (weight.shape != self.shape or split_of(type(self), weight) is not None):
            advice = "was resized, or split by tensor parallelism: resize it before inject or load, or use train_also"
            raise AdapterError(f"the table, of which rows are trained, had the shape {self.shape} and {advice}")
        if active and len(args) + len(kwargs) == 1:
            forward: object = plain_class(owner).forward
            if forward is LOOKUP and type(x) is Tensor and x.layout == torch.strided and not x.is_nested:
                return self._looked_up(owner, x, weight, active)
            if forward is FORWARD and product_dtype(x, weight, weight.shape[1]) is not None:
                return self._multiplied(owner, x, weight, active)
        return run_forward(owner, base_forward, *args, **kwargs)

    def _looked_up(self, owner: Any, ids: Tensor, weight: Tensor, active: Sequence[Any]) -> Tensor:
        output = F.embedding(ids, weight)
        for site_rows, _ in active:
            numbers = site_rows.on(ids.device)
            places = torch.searchsorted(numbers, ids.long().contiguous()).clamp(max=len(numbers) - 1)
            rows = F.embedding(places, self.rows(owner, site_rows)).to(output.dtype)
            if owner.padding_idx is not None:  # which gets no gradient, as in torch
                rows = torch.where((ids == owner.padding_idx).unsqueeze(-1), rows.detach(), rows)
            output = torch.where((numbers[places] == ids).unsqueeze(-1), rows, output)
        return output

    def _multiplied(self, owner: Any, x: Tensor, weight: Tensor, active: Sequence[Any]) -> Tensor:
        output = F.linear(x, weight, owner.bias)
        put = torch.index_copy if is_transformed() else Tensor.index_copy_  # in place: it is as wide as the vocabulary
        for site_rows, _ in active:
            numbers = site_rows.on(x.device)
            bias = None if owner.bias is None else owner.bias[numbers]
            columns = F.linear(x, self.rows(owner, site_rows).to(weight.dtype), bias)
            output = put(output, -1, numbers, columns.to(output.dtype))
        return output

    def rows(self, owner: nn.Module, site_rows: Any) -> Tensor:
        """Return the trained rows of one adapter."""
        return self.diagonals_at(owner, site_rows)[0]

    def read(self, owner: nn.Module) -> Tensor:
        """Return the table with the rows of the active adapters, a copy."""
        active: list[Any] = self.active()
        updates = [(site_rows.numbers, self.rows(owner, site_rows)) for site_rows, _ in active]
        return self.with_updates(self.weight_of(owner), updates)

    @classmethod
    def with_updates(cls, weight: Tensor, updates: Sequence[Any], region: Region | None = None) -> Tensor:
        """Return a table, or its part in a region, with rows replaced, given their numbers and values."""
        for numbers, rows in updates:
            places, values = numbers.to(weight.device), rows.to(weight)
            if region is not None:
                here = torch.cat([torch.arange(*span, device=weight.device) for span in region.rows])
                values = take_spans(values[torch.isin(places, here)], region.columns, 1)
                places = torch.isin(here, places).nonzero().flatten()
            weight = weight.index_copy(0, places, values)
        return weight

    def whole_updates(self, owner: nn.Module, weights: dict[str, float]) -> list[Any]:
        """Return the rows of some adapters, with all values; a collective if these are sharded."""
        replacing = [self.adapters[name] for name in weights if name in self.adapters]
        values = run_collectives(partial(whole, self.rows(owner, site_rows)) for site_rows in replacing)
        return [(site_rows.numbers, rows) for site_rows, rows in zip(replacing, values, strict=True)]

    def is_changed(self, owner: nn.Module, name: str) -> bool:
        """Whether rows of an adapter differ from those of the table, if this process has all of both."""
        weight, site_rows = self.weight_of(owner), self.adapters[name]
        return not torch.equal(self.rows(owner, site_rows).to(weight), weight[site_rows.on(weight.device)])

    def delta_weight(self, owner: nn.Module, weights: dict[str, float]) -> Tensor:
        """Return the difference from the table, in float32 or wider; a collective if anything is sharded."""
        place = place_of(owner, self.attribute)
        own = place.whole() if self.original is None else whole(self.original.stored(place))  # type: ignore[arg-type]
        dtype = torch.promote_types(own.dtype, torch.float32)
        return self.with_updates(own, self.whole_updates(owner, weights)).to(dtype) - own.to(dtype)

    write_merged, keep_merged = _tied(AdapterLayer.write_merged), _tied(AdapterLayer.keep_merged)
    restore_original = _tied(AdapterLayer.restore_original)

    def description(self) -> str:
        """Return a description of the adapters for ``print(model)``."""
        return ", ".join(f"{name}: {len(site_rows.numbers)} rows" for name, site_rows in self.adapters.items())

"""What adapted modules do in a block of `routed`: their rows, or tokens, go through different adapters.

A layer whose input is known computes the base for the whole batch once and adds to each token the update of its
adapter. What that takes besides the products is prepared in the first forward of a block. The forward of a module that
reads its weight, such as a convolution or attention, runs once for each adapter, with the rows of that one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.blocks import Run
from randlora.errors import AdapterError
from randlora.functional import Compute, Diagonals, Pair, update_rows
from randlora.layers.base import AdapterLayer
from randlora.layers.inputs import input_of, require_product
from randlora.layers.read_weight import ReadWeight, base_class
from randlora.layers.rows import Rows
from randlora.layers.split import split_of
from randlora.layers.update import Update
from randlora.serving.routing import Layout, Routing, Sorted, follow, layout_of, layout_of_rows, unfollowed
from randlora.serving.stacked import (
    Find,
    Stack,
    Way,
    cacheable_parameters,
    goes_together,
    kept_stack,
    one_by_one,
    stacked_update,
)
from randlora.state import SiteAdapter


class Routes(NamedTuple):
    """A weight whose adapters tokens go through.

    Attributes:
        module: The name of the class of its module, for messages.
        parts: The adapters here, by name.
        update: Returns the update of one.
        parameters: Returns every Λ of some adapters, then every Γ, or ``None`` where their values are elsewhere.
        compute: How to compute.
    """

    module: str
    parts: Mapping[str, SiteAdapter]
    update: Callable[[SiteAdapter], Update]
    parameters: Callable[[Find], list[nn.Parameter] | None]
    compute: Compute


class Routed(NamedTuple):
    """The tokens of adapters that share bases.

    Attributes:
        positions: Where in the batch they are, sorted by adapter; ``None`` if that is the whole batch in its order.
        find: Finds what the adapters have in a mapping by name; ``None`` if it is one adapter.
        parts: The adapters.
        counts: The number of tokens of each.
    """

    positions: Tensor | None
    find: Find | None
    parts: list[SiteAdapter]
    counts: tuple[int, ...]

    def of(self, rows: Tensor) -> Tensor:
        """Return their rows of the rows of the batch."""
        return rows if self.positions is None else rows.index_select(0, self.positions)

    def onto(self, output: Tensor, update: Tensor) -> Tensor:
        """Return the rows of the batch plus their updates."""
        return output + update if self.positions is None else output.index_add(0, self.positions, update)


def routed_output(
    routes: Routes, routing: Routing, layout: Layout, x: Tensor, output: Tensor, *, has_dropout: bool
) -> Tensor:
    """Return the output of a layer plus, for each token, the product with the update of its adapter.

    Args:
        routes: The adapters of the layer.
        routing: Which of them each row goes through.
        layout: Where the rows are in the input.
        x: The input, ``(batch, ..., in_features)``.
        output: The output of the base, ``(batch, ..., out_features)``.
        has_dropout: Whether the dropout of the adapters applies, as in training.
    """
    rows, total = x.reshape(-1, x.shape[-1]), output.reshape(-1, output.shape[-1])
    for group in _by_bases(routes, routing, layout, x.device):
        own = group.of(rows).to(output.dtype)
        if has_dropout and any(part.adapter.config.dropout for part in group.parts):
            split = zip(own.split(group.counts), group.parts, strict=True)
            own = torch.cat([F.dropout(each, part.adapter.config.dropout) for each, part in split])
        total = group.onto(total, _product(routes, routing, group, own))
    return total.view(output.shape)


def routed_rows(
    routes: Routes,
    routing: Routing,
    layout: Layout,
    ids: Tensor,
    output: Tensor,
    *,
    num_rows: int,
    padding_idx: int | None,
) -> Tensor:
    """Return rows of a table plus, for each, the same row of the update of its adapter; as `routed_output`."""
    flat, total = ids.reshape(-1), output.reshape(-1, output.shape[-1])
    for group in _by_bases(routes, routing, layout, ids.device):
        pair, diagonals, is_wide = _factors(routes, group.parts, output)
        own = group.of(flat)
        each = zip(own.split(group.counts), diagonals, strict=True)
        rows = torch.cat([update_rows(part, pair, one, num_rows=num_rows, is_wide=is_wide) for part, one in each])
        if padding_idx is not None:  # which gets no gradient, as in torch
            rows = torch.where((own == padding_idx).unsqueeze(-1), rows.detach(), rows)
        total = group.onto(total, rows)
    return total.view(output.shape)


def routed_forward(routing: Routing, layout: Layout, rows: Rows, forward: Callable[..., Any], module: str) -> Any:
    """Return the output of the forward of a module that reads its weights, run once for each adapter.

    Args:
        routing: Which adapter each row goes through.
        layout: Where these are among the rows of the module.
        rows: The arguments of the forward.
        forward: The forward.
        module: The name of the module's class, for messages.
    """
    order, groups, *_ = routing.sorted(layout, rows.device, module)
    outputs, start = [], 0
    for adapter, count in groups:
        args, kwargs = rows.select(order[start : start + count])
        with routing.choosing(adapter):
            outputs.append(forward(*args, **kwargs))
        start += count
    return rows.joined(outputs, order.argsort())


def _by_bases(routes: Routes, routing: Routing, layout: Layout, device: torch.device) -> list[Routed]:
    """Return the tokens that have an update here, those of adapters on the same bases together."""
    ordered = routing.sorted(layout, device, routes.module)
    find: Any = routes.parts.get  # which finds nothing for None, the base
    parts: list[SiteAdapter | None] = [*map(find, ordered.adapters)]
    key = id(routes.parts), id(ordered)
    known = routing.by_bases.get(key)
    if known is None or known[0] is not routes.parts or known[1] != parts:
        known = routing.by_bases[key] = routes.parts, parts, _found_by_bases(parts, ordered)
    groups: list[Routed] = known[2]
    return groups


def _found_by_bases(parts: list[SiteAdapter | None], ordered: Sorted) -> list[Routed]:
    found: dict[int, tuple[list[Tensor], list[str], list[SiteAdapter], list[int]]] = {}
    start = 0
    for part, (_, count) in zip(parts, ordered.groups, strict=True):
        if part is not None:
            positions, names, own, counts = found.setdefault(id(part.basis), ([], [], [], []))
            positions.append(ordered.order[start : start + count])
            names.append(part.adapter.name)
            own.append(part)
            counts.append(count)
        start += count
    groups = []
    for positions, names, own, counts in found.values():
        is_all = sum(counts) == len(ordered.order)
        where = (None if ordered.is_in_order else ordered.order) if is_all else torch.cat(positions)
        groups.append(Routed(where, itemgetter(*names) if names[1:] else None, own, tuple(counts)))
    return groups


def _product(routes: Routes, routing: Routing, group: Routed, own: Tensor) -> Tensor:
    """Return the product of tokens, ``(tokens, in_features)``, with the updates of their adapters."""
    parameters = routes.parameters(group.find) if routing.keeps and group.find is not None else None
    pair, first, is_wide = _factors(routes, group.parts if parameters is None else group.parts[:1], own)
    needed = [part for one in first for part in one[:2]] if parameters is None else parameters
    options: dict[str, Any] = {"is_wide": is_wide, "compute": routes.compute}
    if not goes_together(own, needed, pair, group.counts, **options):
        return one_by_one(own, pair, _factors(routes, group.parts, own)[1], group.counts, **options)
    stack = (
        Stack.of(pair, first)
        if parameters is None
        else kept_stack(routing.kept, routes.parts, group.parts, parameters, pair)
    )
    way: Way | None = None if routes.compute == "auto" else "whole"
    return stacked_update(own, pair, stack, group.counts, is_wide=is_wide, way=way)


def _factors(routes: Routes, parts: list[SiteAdapter], like: Tensor) -> tuple[Pair, list[Diagonals], bool]:
    """Return the bases that some adapters share, and Λ, Γ and the scaling of each."""
    updates = [routes.update(part) for part in parts]
    pair, _ = updates[0].parts(like.device, like.dtype)
    return pair, [update.diagonals(like.device) for update in updates], updates[0].is_wide


class RowByRow(Routing, Run):
    """Runs adapted layers with the adapter of each row."""

    words: ClassVar[str] = "randlora.serving.routed"

    @property
    def takes_over(self) -> bool:
        """Whether no adapter is chosen: a module that runs for the rows of one runs as with that one active."""
        return self.chosen is None

    def concerns(self, layer: AdapterLayer) -> bool:
        """Return whether any adapter that rows go through adapts this weight."""
        return any(name in layer.adapters for name in self.adapters)

    def acting(self, layer: AdapterLayer) -> list[tuple[SiteAdapter, float]]:
        """Return the adapter that a module runs with now, for its rows; see `randlora.serving.run`."""
        if self.chosen is None:
            if not self.concerns(layer):
                return []
            raise AdapterError(
                f"code reads an adapted {layer.attribute} outside of the forward of the module that it is in, where "
                "routed cannot tell the rows of the batch: exclude it when the adapter is made, or activate one "
                "adapter at a time"
            )
        part = layer.adapters.get(self.chosen[0] or "")
        return [] if part is None else [(part, 1.0)]

    def product(
        self,
        layer: AdapterLayer,
        owner: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Return the output of the base plus, for each token, the product with the update of its adapter."""
        output, x = layer.base_output(owner, forward, *args, **kwargs), input_of(owner, args, kwargs)
        require_product(owner, output, layer.shape[0])
        if not self.concerns(layer):
            return output
        routes = _routes(layer, owner)
        if not isinstance(x, Tensor) or x.is_nested:
            raise AdapterError(
                f"routed needs a tensor with a batch, and an adapted {routes.module} was given another input"
            )
        layout = layout_of(self, layer, x, routes.module)
        with unfollowed(self):
            result = routed_output(routes, self, layout, x, output, has_dropout=owner.training)
        follow(self, result, layout)
        return result

    def rows(
        self,
        layer: AdapterLayer,
        owner: Any,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Return the rows of the base plus, for each, the same row of the update of its adapter."""
        with self.choosing(None):
            output: Tensor = forward(*args, **kwargs)
        if not self.concerns(layer):
            return output
        ids, routes, padding = input_of(owner, args, kwargs), _routes(layer, owner), owner.padding_idx
        layout = layout_of(self, layer, ids, routes.module, features=0)
        with unfollowed(self):
            result = routed_rows(routes, self, layout, ids, output, num_rows=layer.shape[0], padding_idx=padding)
        follow(self, result, layout)
        return result

    def reading(
        self,
        layer: ReadWeight,
        owner: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Return the output of the forward of a module that reads its weights, run once for each adapter."""
        module = base_class(owner).__name__
        layout, rows = layout_of_rows(self, layer, layer.rows_of(owner, args, kwargs), module)
        with unfollowed(self):
            output = routed_forward(self, layout, rows, forward, module)
        for index, each in enumerate(output if isinstance(output, tuple) else [output]):
            follow(self, each, layout, rows.output_axes[min(index, 1)])
        return output


def _routes(layer: AdapterLayer, owner: Any) -> Routes:
    """Return the adapters of a weight, for tokens that go through different ones."""
    module = owner.randlora_base.__name__
    if (weight := layer.weight_of(owner)) is not None and split_of(type(layer), weight) is not None:
        raise AdapterError(
            f"an adapted {module} is split by tensor parallelism, with which routed does not work: activate one "
            "adapter at a time"
        )
    return Routes(
        module,
        layer.adapters,
        lambda part: layer.update(owner, part, 1.0),
        lambda find: cacheable_parameters(owner, [owner._modules[name] for name in layer.parameter_names()], find),
        layer.state.compute,
    )

"""Adapted modules whose rows, or tokens, go through different adapters: `randlora.routed`.

A layer whose input is known computes the base for the whole batch once and adds to each token the update of its
adapter. The forward of a module that reads its weight, such as a convolution or attention, runs once for each adapter,
with the rows of that one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.errors import AdapterError
from randlora.functional import Compute, Diagonals, Pair, update_rows
from randlora.functional.routed import routed_update
from randlora.layers.rows import Rows
from randlora.layers.update import Update
from randlora.routing import Routing
from randlora.state import SiteAdapter


class Routes(NamedTuple):
    """A weight whose adapters tokens go through.

    Attributes:
        module: The name of the class of its module, for messages.
        parts: The adapters here, by name.
        update: Returns the update of one.
        compute: How to compute.
    """

    module: str
    parts: Mapping[str, SiteAdapter]
    update: Callable[[SiteAdapter], Update]
    compute: Compute


class Routed(NamedTuple):
    """The tokens of adapters that share bases.

    Attributes:
        positions: Where in the batch they are, sorted by adapter; ``None`` if that is the whole batch in its order.
        parts: The adapters.
        counts: The number of tokens of each.
    """

    positions: Tensor | None
    parts: list[SiteAdapter]
    counts: list[int]

    def of(self, rows: Tensor) -> Tensor:
        """Return their rows of the rows of the batch."""
        return rows if self.positions is None else rows.index_select(0, self.positions)

    def onto(self, output: Tensor, update: Tensor) -> Tensor:
        """Return the rows of the batch plus their updates."""
        return output + update if self.positions is None else output.index_add(0, self.positions, update)


def routed_output(routes: Routes, routing: Routing, x: Any, output: Tensor, *, has_dropout: bool) -> Tensor:
    """Return the output of a layer plus, for each token, the product with the update of its adapter.

    Args:
        routes: The adapters of the layer.
        routing: Which of them each row goes through.
        x: The input, ``(batch, ..., in_features)``.
        output: The output of the base, ``(batch, ..., out_features)``.
        has_dropout: Whether the dropout of the adapters applies, as in training.
    """
    if not isinstance(x, Tensor) or x.is_nested:
        raise AdapterError(
            f"routed needs a tensor with a batch, and an adapted {routes.module} was given another input"
        )
    rows, total = x.reshape(-1, x.shape[-1]), output.reshape(-1, output.shape[-1])
    for group in _by_bases(routes, routing, x.shape[:-1], x.device):
        own = group.of(rows).to(output.dtype)
        if has_dropout and any(part.adapter.config.dropout for part in group.parts):
            split = zip(own.split(group.counts), group.parts, strict=True)
            own = torch.cat([F.dropout(each, part.adapter.config.dropout) for each, part in split])
        pair, diagonals, is_wide = _factors(routes, group.parts, own)
        update = routed_update(own, pair, diagonals, group.counts, is_wide=is_wide, compute=routes.compute)
        total = group.onto(total, update)
    return total.view(output.shape)


def routed_rows(
    routes: Routes, routing: Routing, ids: Tensor, output: Tensor, *, num_rows: int, padding_idx: int | None
) -> Tensor:
    """Return rows of a table plus, for each, the same row of the update of its adapter; as `routed_output`."""
    flat, total = ids.reshape(-1), output.reshape(-1, output.shape[-1])
    for group in _by_bases(routes, routing, ids.shape, ids.device):
        pair, diagonals, is_wide = _factors(routes, group.parts, output)
        own = group.of(flat)
        each = zip(own.split(group.counts), diagonals, strict=True)
        rows = torch.cat([update_rows(part, pair, one, num_rows=num_rows, is_wide=is_wide) for part, one in each])
        if padding_idx is not None:  # which gets no gradient, as in torch
            rows = torch.where((own == padding_idx).unsqueeze(-1), rows.detach(), rows)
        total = group.onto(total, rows)
    return total.view(output.shape)


def routed_forward(routing: Routing, rows: Rows, forward: Callable[..., Any], module: str) -> Any:
    """Return the output of the forward of a module that reads its weights, run once for each adapter.

    Args:
        routing: Which adapter each row goes through.
        rows: The arguments of the forward.
        forward: The forward.
        module: The name of the module's class, for messages.
    """
    order, groups, _ = routing.sorted(torch.Size([rows.size]), rows.device, module)
    outputs, start = [], 0
    for adapter, count in groups:
        args, kwargs = rows.select(order[start : start + count])
        with routing.choosing(adapter):
            outputs.append(forward(*args, **kwargs))
        start += count
    return rows.joined(outputs, order.argsort())


def _by_bases(routes: Routes, routing: Routing, shape: torch.Size, device: torch.device) -> Iterator[Routed]:
    """Yield the tokens that have an update here, those of adapters on the same bases together."""
    order, groups, is_in_order = routing.sorted(shape, device, routes.module)
    found: dict[int, tuple[list[Tensor], list[SiteAdapter], list[int]]] = {}
    start = 0
    for adapter, count in groups:
        part = None if adapter is None else routes.parts.get(adapter)
        if part is not None:
            positions, parts, counts = found.setdefault(id(part.basis), ([], [], []))
            positions.append(order[start : start + count])
            parts.append(part)
            counts.append(count)
        start += count
    for positions, parts, counts in found.values():
        is_all = is_in_order and sum(counts) == len(order)
        yield Routed(None if is_all else torch.cat(positions), parts, counts)


def _factors(routes: Routes, parts: list[SiteAdapter], like: Tensor) -> tuple[Pair, list[Diagonals], bool]:
    """Return the bases that some adapters share, and Λ, Γ and the scaling of each."""
    updates = [routes.update(part) for part in parts]
    pair, _ = updates[0].parts(like.device, like.dtype)
    return pair, [update.diagonals(like.device) for update in updates], updates[0].is_wide

"""Running adapted modules in a block of `routed`, whose rows go through different adapters.

A product with a weight computes the base once for the whole batch and adds to each token the update of its adapter. The
forward of a module that reads its weight, such as a convolution, runs once for each adapter, with its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.blocks import BatchRows, ForwardCall, Run
from randlora.errors import AdapterError
from randlora.functional import Diagonals, Pair, update_rows
from randlora.layers.base import AdapterLayer, input_of, require_product
from randlora.layers.in_place import plain_class
from randlora.layers.weight import split_of
from randlora.serving.routing import Layout, Routing, Sorted, follow, layout_of, layout_of_rows, unfollowed
from randlora.serving.stacked import (
    Stack,
    Way,
    cacheable_parameters,
    goes_together,
    kept_stack,
    one_by_one,
    stacked_update,
)
from randlora.state import SiteAdapter

SPLIT = "is split by tensor parallelism, which routed does not support: activate one adapter at a time"


class Routed(NamedTuple):
    """The tokens of adapters that share bases, sorted by adapter."""

    positions: Tensor | None  # in the batch; the whole batch in its order for None
    names: list[str]
    site_adapters: list[SiteAdapter]
    counts: tuple[int, ...]  # the number of tokens of each adapter

    def of(self, rows: Tensor) -> Tensor:
        """Return these tokens' rows from the rows of the batch."""
        return rows if self.positions is None else rows.index_select(0, self.positions)

    def onto(self, output: Tensor, update: Tensor) -> Tensor:
        """Return the rows of the batch plus their updates."""
        return output + update if self.positions is None else output.index_add(0, self.positions, update)


class RowByRow(Routing, Run):
    """Runs adapted layers with the adapter of each row."""

    words: ClassVar[str] = "randlora.serving.routed"

    @property
    def takes_over(self) -> bool:
        """Whether no adapter is chosen. A module that runs for the rows of one adapter runs as if it were active."""
        return (call := self.call) is None or call.chosen is None

    def concerns(self, layer: AdapterLayer) -> bool:
        """Whether any adapter that rows go through adapts this weight."""
        return any(name in layer.adapters for name in self.adapters)

    def acting(self, layer: AdapterLayer) -> list[tuple[SiteAdapter, float]]:
        """Return the adapter that a module runs with now, for its rows."""
        if (call := self.call) is None or call.chosen is None:
            if not self.concerns(layer):
                return []
            if layer.adopted is not None:  # a plan of transformers, whose forward runs in place of the module's
                raise AdapterError(f"an adapted {layer.attribute} {SPLIT}")
            raise AdapterError(
                f"code reads an adapted {layer.attribute} outside of the forward of its module, where routed cannot "
                "tell the rows of the batch: exclude it when the adapter is made, or activate one adapter at a time"
            )
        site_adapter = layer.adapters.get(call.chosen[0] or "")
        return [] if site_adapter is None else [(site_adapter, 1.0)]

    def product(self, layer: AdapterLayer, forward: ForwardCall) -> Tensor:
        """Return the output of the base plus, for each token, the product with the update of its adapter."""
        owner, call, args, kwargs = forward
        x, concerns = input_of(owner, args, kwargs), self.concerns(layer)
        if concerns and (not isinstance(x, Tensor) or x.is_nested or x.layout != torch.strided):
            raise AdapterError(
                f"routed needs a tensor with a batch, neither nested nor sparse, but an adapted "
                f"{plain_class(owner).__name__} was given a different input: give it x.to_dense(), or a padded batch"
            )
        output = layer.base_output(owner, call, *args, **kwargs)
        require_product(owner, output, layer.shape[0])
        if not concerns:
            return output
        module = _module_name(layer, owner)
        layout = layout_of(self, layer, x, module)
        with unfollowed(self):
            rows, total = x.reshape(-1, x.shape[-1]), output.reshape(-1, output.shape[-1])
            for group in self._by_bases(layer, layout, x.device):
                own = group.of(rows).to(output.dtype)
                if owner.training and any(rates := [each.adapter.config.dropout for each in group.site_adapters]):
                    own = torch.cat([*map(F.dropout, own.split(group.counts), rates)])
                total = group.onto(total, self._product(layer, owner, group, own))
            result = total.view(output.shape)
        follow(self, layer, result, layout)
        return result

    def rows(self, layer: AdapterLayer, forward: ForwardCall) -> Tensor:
        """Return the rows of the base, plus for each the same row of its adapter's update."""
        owner: Any = forward.owner
        with self.choosing(None):
            output: Tensor = forward.call(*forward.args, **forward.kwargs)
        if not self.concerns(layer):
            return output
        ids = input_of(owner, forward.args, forward.kwargs)
        module, padding_idx = _module_name(layer, owner), owner.padding_idx
        layout = layout_of(self, layer, ids, module, features=0)
        with unfollowed(self):
            flat, total = ids.reshape(-1), output.reshape(-1, output.shape[-1])
            for group in self._by_bases(layer, layout, ids.device):
                pair, diagonals, is_wide = _factors(layer, owner, group.site_adapters, output)
                own = group.of(flat)
                rows = torch.cat([
                    update_rows(part, pair, one, num_rows=layer.shape[0], is_wide=is_wide)
                    for part, one in zip(own.split(group.counts), diagonals, strict=True)
                ])
                if padding_idx is not None:  # which gets no gradient, as in torch
                    rows = torch.where((own == padding_idx).unsqueeze(-1), rows.detach(), rows)
                total = group.onto(total, rows)
            result = total.view(output.shape)
        follow(self, layer, result, layout)
        return result

    def reading(self, layer: Any, forward: ForwardCall) -> Any:
        """Return the output of the forward of a module that reads its weights, run once for each adapter."""
        module = plain_class(forward.owner).__name__
        given = layer.rows_of(forward.owner, forward.args, forward.kwargs)
        layout, rows = layout_of_rows(self, layer, given, module)
        with unfollowed(self):
            ordered = self.sorted(layout, rows.device)
            outputs = []
            for adapter, positions in zip(ordered.adapters, ordered.order.split(ordered.counts), strict=True):
                args, kwargs = _select(rows, positions)
                with self.choosing(adapter):
                    outputs.append(forward.call(*args, **kwargs))
            output = _join(rows, outputs, ordered.order.argsort())
        for index, each in enumerate(output if isinstance(output, tuple) else [output]):
            follow(self, layer, each, layout, rows.output_axes[min(index, 1)])
        return output

    def _by_bases(self, layer: AdapterLayer, layout: Layout, device: torch.device) -> list[Routed]:
        """Return the tokens that have an update here, grouped by adapters on the same bases."""
        ordered = self.sorted(layout, device)
        key = id(layer.adapters), id(ordered)  # both live as long as the block
        if key not in self.by_bases:
            self.by_bases[key] = layer.adapters, _found_by_bases(layer.adapters, ordered)
        return self.by_bases[key][1]

    def _product(self, layer: AdapterLayer, owner: nn.Module, group: Routed, own: Tensor) -> Tensor:
        """Return the product of tokens, ``(tokens, in_features)``, with the updates of their adapters."""
        held: list[Any] = [owner._modules[name] for name in layer.parameter_names()]
        may_keep = self.keeps and len(group.names) > 1
        parameters = cacheable_parameters(owner, held, group.names) if may_keep else None
        to_factor = group.site_adapters if parameters is None else group.site_adapters[:1]
        pair, first, is_wide = _factors(layer, owner, to_factor, own)
        needed = [part for one in first for part in one[:2]] if parameters is None else parameters
        compute = layer.state.compute
        options: dict[str, Any] = {"is_wide": is_wide, "compute": compute}
        if not goes_together(own, needed, pair, group.counts, **options):
            return one_by_one(own, pair, _factors(layer, owner, group.site_adapters, own)[1], group.counts, **options)
        if parameters is None:
            stack = Stack.of(pair, first)
        else:
            stack = kept_stack(self.kept, layer.adapters, group.site_adapters, parameters, pair)
        way: Way | None = None if compute == "auto" else "whole"
        return stacked_update(own, pair, stack, group.counts, is_wide=is_wide, way=way)


def _module_name(layer: AdapterLayer, owner: Any) -> str:
    """Return the class of an adapted module, for messages, unless its weight is split."""
    module = str(owner.randlora_base.__name__)
    if (weight := layer.find_weight(owner)) is not None and split_of(type(layer), weight) is not None:
        raise AdapterError(f"an adapted {module} {SPLIT}")
    return module


def _factors(
    layer: AdapterLayer, owner: nn.Module, site_adapters: list[SiteAdapter], like: Tensor
) -> tuple[Pair, list[Diagonals], bool]:
    """Return the bases that some adapters share, Λ, Γ and the scaling of each, and whether the layer is wide."""
    updates = [layer.update(owner, site_adapter, 1.0) for site_adapter in site_adapters]
    pair, _ = updates[0].parts(like.device, like.dtype)
    return pair, [update.diagonals(like.device) for update in updates], updates[0].is_wide


def _select(rows: BatchRows, positions: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a forward for some of the rows."""

    def selected(key: int | str, value: Any) -> Any:
        if key not in rows.axes:
            return value
        axis, entries = rows.axes[key]
        within = torch.arange(entries, device=rows.device)
        return value.index_select(axis, (positions.unsqueeze(1) * entries + within).flatten())

    args = tuple(selected(position, value) for position, value in enumerate(rows.args))
    return args, {name: selected(name, value) for name, value in rows.kwargs.items()}


def _join(rows: BatchRows, outputs: list[Any], order: Tensor) -> Any:
    """Return the output for the whole batch, given the outputs for parts of it and where each row is in them."""

    def joined(parts: Sequence[Any], axis: int) -> Any:
        return torch.cat([*parts], axis).index_select(axis, order) if isinstance(parts[0], Tensor) else parts[0]

    if not isinstance(outputs[0], tuple):
        return joined(outputs, rows.output_axes[0])
    entries = enumerate(zip(*outputs, strict=True))
    return tuple(joined(parts, rows.output_axes[min(index, 1)]) for index, parts in entries)


@torch.inference_mode(mode=False)  # a later call may need gradients
def _found_by_bases(site_adapters: Mapping[str, SiteAdapter], ordered: Sorted) -> list[Routed]:
    found: dict[int, tuple[list[Tensor], list[SiteAdapter]]] = {}
    for name, some in zip(ordered.adapters, ordered.order.split(ordered.counts), strict=True):
        if name is not None and (site_adapter := site_adapters.get(name)) is not None:
            positions, own = found.setdefault(id(site_adapter.basis), ([], []))
            positions.append(some)
            own.append(site_adapter)
    groups = []
    for positions, own in found.values():
        counts = tuple(map(len, positions))
        is_all = sum(counts) == len(ordered.order)
        where = (None if ordered.is_in_order else ordered.order) if is_all else torch.cat(positions)
        groups.append(Routed(where, [site_adapter.adapter.name for site_adapter in own], own, counts))
    return groups

"""Running adapted modules in a block of `routed`: their rows, or tokens, go through different adapters.

A layer whose input is known computes the base once for the whole batch and adds the update of its adapter to each
token. Everything but the products is prepared in the first forward of a block. The forward of a module that reads its
weight, such as a convolution or attention, runs once for each adapter, with the rows of this adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from randlora.blocks import ForwardCall, Run
from randlora.errors import AdapterError
from randlora.functional import Diagonals, Pair, update_rows
from randlora.layers.base import AdapterLayer, input_of, require_product
from randlora.layers.in_place import plain_class
from randlora.layers.scopes import in_call
from randlora.layers.weight import split_of
from randlora.serving.routing import CALL, Layout, Routing, Sorted, follow, layout_of, layout_of_rows, unfollowed
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
    """A weight with adapters that tokens go through.

    Attributes:
        module: The name of the class of its module, for messages.
        layer: Its adapter layer.
        owner: The module.
    """

    module: str
    layer: AdapterLayer
    owner: nn.Module

    @classmethod
    def of(cls, layer: AdapterLayer, owner: Any) -> Routes:
        """Return the routes of a weight, unless it is split."""
        module = owner.randlora_base.__name__
        if (weight := layer.find_weight(owner)) is not None and split_of(type(layer), weight) is not None:
            raise AdapterError(
                f"an adapted {module} is split by tensor parallelism, which routed does not support: activate one "
                "adapter at a time"
            )
        return cls(module, layer, owner)

    @property
    def parts(self) -> Mapping[str, SiteAdapter]:
        """The adapters of the weight, by name."""
        return self.layer.adapters

    def parameters(self, find: Find) -> list[nn.Parameter] | None:
        """Return every Λ of some adapters, then every Γ, or ``None`` if their values are elsewhere."""
        held: list[Any] = [self.owner._modules[name] for name in self.layer.parameter_names()]
        return cacheable_parameters(self.owner, held, find)

    def factors(self, parts: list[SiteAdapter], like: Tensor) -> tuple[Pair, list[Diagonals], bool]:
        """Return the bases that some adapters share, Λ, Γ and the scaling of each, and whether the layer is wide."""
        updates = [self.layer.update(self.owner, part, 1.0) for part in parts]
        pair, _ = updates[0].parts(like.device, like.dtype)
        return pair, [update.diagonals(like.device) for update in updates], updates[0].is_wide


class Routed(NamedTuple):
    """The tokens of adapters that share bases.

    Attributes:
        positions: Their positions in the batch, sorted by adapter; ``None`` means the whole batch in its order.
        find: Looks the adapters up in a mapping by name; ``None`` if there is only one adapter.
        parts: The adapters.
        counts: The number of tokens of each.
    """

    positions: Tensor | None
    find: Find | None
    parts: list[SiteAdapter]
    counts: tuple[int, ...]

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
            raise AdapterError(
                f"code reads an adapted {layer.attribute} outside of the forward of its module, where routed cannot "
                "tell the rows of the batch: exclude it when the adapter is made, or activate one adapter at a time"
            )
        part = layer.adapters.get(call.chosen[0] or "")
        return [] if part is None else [(part, 1.0)]

    def product(self, layer: AdapterLayer, forward: ForwardCall) -> Tensor:
        """Return the output of the base plus, for each token, the product with the update of its adapter."""
        owner, call, args, kwargs = forward
        output, x = layer.base_output(owner, call, *args, **kwargs), input_of(owner, args, kwargs)
        require_product(owner, output, layer.shape[0])
        if not self.concerns(layer):
            return output
        routes = Routes.of(layer, owner)
        if not isinstance(x, Tensor) or x.is_nested or x.layout != torch.strided:
            raise AdapterError(
                f"routed needs a tensor with a batch, neither nested nor sparse, but an adapted {routes.module} was "
                "given a different input: give it x.to_dense()"
            )
        layout = layout_of(self, layer, x, routes.module)
        with unfollowed(self):
            rows, total = x.reshape(-1, x.shape[-1]), output.reshape(-1, output.shape[-1])
            for group in self._by_bases(routes, layout, x.device):
                own = group.of(rows).to(output.dtype)
                if owner.training and any(part.adapter.config.dropout for part in group.parts):
                    split = zip(own.split(group.counts), group.parts, strict=True)
                    own = torch.cat([F.dropout(each, part.adapter.config.dropout) for each, part in split])
                total = group.onto(total, self._product(routes, group, own))
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
        routes, padding_idx = Routes.of(layer, owner), owner.padding_idx
        layout = layout_of(self, layer, ids, routes.module, features=0)
        with unfollowed(self):
            flat, total = ids.reshape(-1), output.reshape(-1, output.shape[-1])
            for group in self._by_bases(routes, layout, ids.device):
                pair, diagonals, is_wide = routes.factors(group.parts, output)
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
            ordered = self.sorted(layout, rows.device, module)
            outputs, start = [], 0
            for adapter, count in zip(ordered.adapters, ordered.counts, strict=True):
                args, kwargs = rows.select(ordered.order[start : start + count])
                with self.choosing(adapter):
                    outputs.append(forward.call(*args, **kwargs))
                start += count
            output = rows.joined(outputs, ordered.order.argsort())
        for index, each in enumerate(output if isinstance(output, tuple) else [output]):
            follow(self, layer, each, layout, rows.output_axes[min(index, 1)])
        return output

    def _by_bases(self, routes: Routes, layout: Layout, device: torch.device) -> list[Routed]:
        """Return the tokens that have an update here, grouped by adapters on the same bases."""
        ordered = self.sorted(layout, device, routes.module)
        key = id(routes.parts), id(ordered)  # both live as long as the block
        if (known := self.by_bases.get(key)) is None:
            known = self.by_bases[key] = routes.parts, _found_by_bases(routes.parts, ordered)
        groups: list[Routed] = known[1]
        return groups

    def _product(self, routes: Routes, group: Routed, own: Tensor) -> Tensor:
        """Return the product of tokens, ``(tokens, in_features)``, with the updates of their adapters."""
        parameters = routes.parameters(group.find) if self.keeps and group.find is not None else None
        pair, first, is_wide = routes.factors(group.parts if parameters is None else group.parts[:1], own)
        needed = [part for one in first for part in one[:2]] if parameters is None else parameters
        compute = routes.layer.state.compute
        options: dict[str, Any] = {"is_wide": is_wide, "compute": compute}
        if not goes_together(own, needed, pair, group.counts, **options):
            return one_by_one(own, pair, routes.factors(group.parts, own)[1], group.counts, **options)
        stack = (
            Stack.of(pair, first)
            if parameters is None
            else kept_stack(self.kept, routes.parts, group.parts, parameters, pair)
        )
        way: Way | None = None if compute == "auto" else "whole"
        return stacked_update(own, pair, stack, group.counts, is_wide=is_wide, way=way)


@torch.inference_mode(mode=False)  # a later call may need gradients
def _found_by_bases(parts: Mapping[str, SiteAdapter], ordered: Sorted) -> list[Routed]:
    found: dict[int, tuple[list[Tensor], list[SiteAdapter], list[int]]] = {}
    start = 0
    for name, count in zip(ordered.adapters, ordered.counts, strict=True):
        if name is not None and (part := parts.get(name)) is not None:
            positions, own, counts = found.setdefault(id(part.basis), ([], [], []))
            positions.append(ordered.order[start : start + count])
            own.append(part)
            counts.append(count)
        start += count
    groups = []
    for positions, own, counts in found.values():
        is_all = sum(counts) == len(ordered.order)
        where = (None if ordered.is_in_order else ordered.order) if is_all else torch.cat(positions)
        find = itemgetter(*(part.adapter.name for part in own)) if own[1:] else None
        groups.append(Routed(where, find, own, tuple(counts)))
    return groups


class Hook:
    """A hook of a module. In a copy or a pickle of the module it does nothing."""

    def __init__(self, call: Any) -> None:
        """Call a function."""
        self.call = call

    def __call__(self, *args: Any) -> Any:
        """Call it, as torch calls a hook."""
        return self.call(*args) if self.call is not None else None

    def __reduce__(self) -> tuple[type[Hook], tuple[None]]:
        """Return how a copy is made."""
        return Hook, (None,)


class RowsOfAttention:
    """Runs attention with only ``out_proj`` adapted, once for each adapter of `routed`.

    Nothing on the module itself is adapted, so this is done by hooks. The module's own forward runs with the base.
    """

    def __init__(self, layer: AdapterLayer, routing: RowByRow) -> None:
        """Run attention by the adapters of its ``out_proj``."""
        self.layer, self.routing = layer, routing

    @classmethod
    def watch(cls, module: nn.Module, routing: RowByRow) -> list[RemovableHandle]:
        """Register the hooks of a module, if it is such an attention."""
        if not isinstance(module, nn.MultiheadAttention) or "randlora" in module.__dict__:
            return []
        layer = module.out_proj.__dict__["randlora"]["weight"]
        own = cls(layer, routing)
        return [
            module.register_forward_pre_hook(Hook(own.begin)),
            module.register_forward_hook(Hook(own.end), with_kwargs=True, always_call=True, prepend=True),
        ]

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        """Have the forward run with the base."""
        run = self.routing
        if self.layer.state.run is run and run.takes_over and run.concerns(self.layer):
            run.choose(None, module)

    def end(self, module: nn.Module, args: tuple[Any, ...], *given: Any) -> Any:
        """Return the output of the forward, run once for each adapter. Given keyword arguments and the output."""
        run = self.routing
        if self.layer.state.run is not run or (call := run.call) is None or call.module is not module:
            return None
        CALL.set(call.outer)
        kwargs, output = given
        if output is None:
            return None
        with in_call():
            return run.reading(self.layer, ForwardCall(module, module.forward, args, kwargs))

"""Which adapter each row of a batch goes through, and where the rows are in a layer's input.

The first call of a kind is followed (`randlora.serving.tracking`), and where its rows were is reused for later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from randlora.blocks import BatchRows
from randlora.errors import AdapterError
from randlora.serving.labels import MIXED, NONE, Label, filled, first_dimension, merged, merged_along, nothing, unknown
from randlora.serving.tracking import RowTracking

BASE = -1  # the adapter of rows that go through the base model alone


class Sorted(NamedTuple):
    """The tokens of a batch, sorted by adapter, the adapters with the fewest tokens first."""

    order: Tensor  # the position of each token in the batch
    adapters: tuple[str | None, ...]  # None is the base
    counts: tuple[int, ...]  # the number of tokens of each adapter
    is_in_order: bool  # whether this is the order of the batch


class Layout(NamedTuple):
    """Where the rows of a batch are in a layer's input."""

    shape: torch.Size  # without the features
    rows: Tensor  # the row of each entry, of size 1 in dimensions along which it does not change
    arranged: dict[tuple[int, torch.device], Sorted]  # by the size of the batch, and the device


class Routing:
    """Which adapter each row goes through, and what is known of the calls in one block."""

    def __init__(self, names: Sequence[str | None]) -> None:
        """Take a name or ``None`` for each row."""
        self.adapters = tuple(dict.fromkeys(name for name in names if name is not None))
        position: dict[str | None, int] = {name: index for index, name in enumerate(self.adapters)}
        self.index = torch.tensor([position.get(name, BASE) for name in names], device="cpu")
        self.is_uniform = len({*names}) == 1  # so that places do not matter
        self.keeps = True  # whether Λ and Γ may be kept: gathering sharded ones hides changes of their values
        self.layouts: dict[tuple[Any, int, torch.Size], Any] = {}  # by layer, size of the batch and shape of the input
        self.refused: dict[Any, str] = {}  # why the rows of a layer are unknown
        self.by_bases: dict[tuple[int, int], tuple[Any, list[Any]]] = {}  # a layer's tokens, for `randlora.serving.run`
        self.kept: dict[tuple[int, int], Any] = {}  # Λ and Γ of each layer, for `randlora.serving.stacked`
        self.followed: set[tuple[Any, ...]] = set()  # the kinds of calls that were followed
        self.watch: Callable[..., object] | None = None  # is given the output of each layer, for `check_rows`
        self._layouts: dict[Any, Layout] = {}

    def expect(self, other: Routing) -> None:
        """Expect rows where they were in the calls of a block for as many, as in later calls of that block."""
        self.followed = other.followed
        self.layouts = {
            key: layout._replace(arranged={}) if isinstance(layout, Layout) else layout
            for key, layout in other.layouts.items()
        }

    @property
    def call(self) -> RunningCall | None:
        """The call of the model, or of a part of it, that this thread or task is in."""
        return next(self.calls(), None)

    def calls(self) -> Iterator[RunningCall]:
        """Yield the calls in this block that this thread or task is in, the innermost first."""
        call = CALL.get()
        while call is not None:
            if call.routing is self:
                yield call
            call = call.outer

    @property
    def rows_now(self) -> Tensor:
        """The index with as many entries as the batch of the running call."""
        return self.index if (call := self.call) is None else call.index

    @property
    def batch(self) -> int:
        """The size of the batch of the running call."""
        return len(self.rows_now)

    @contextmanager
    def choosing(self, adapter: str | None) -> Iterator[None]:
        """Within the block, run modules with one adapter, or with the base: they are given only its rows."""
        call = self.call or RunningCall(self, None, (), self.index)
        before = CALL.get()
        CALL.set(replace(call, chosen=(adapter,), outer=before))
        try:
            yield
        finally:
            CALL.set(before)

    def layout(self, shape: torch.Size, rows: Tensor) -> Layout:
        """Return the layout of some rows; the same object for the same rows."""
        key = shape, rows.shape, tuple(rows.flatten().tolist())
        return self._layouts.setdefault(key, Layout(shape, rows, {}))

    def sorted(self, layout: Layout, device: torch.device) -> Sorted:
        """Return the tokens of an input, sorted by adapter, with the order on a device."""
        key = self.batch, device
        if (known := layout.arranged.get(key)) is not None:
            return known
        with torch.inference_mode(mode=False):  # a later call may need gradients
            if self.is_uniform:
                of_token = self.index[:1].repeat(layout.shape.numel())
            else:
                of_token = self.rows_now[layout.rows].expand(layout.shape).flatten().contiguous()
            numbers, counts = of_token.unique(return_counts=True)
            by_count = counts.argsort(stable=True)
            order = by_count.argsort()[torch.searchsorted(numbers, of_token)].argsort(stable=True)
            adapters = tuple(None if number == BASE else self.adapters[number] for number in numbers[by_count].tolist())
            is_in_order = bool((order == torch.arange(len(order), device="cpu")).all())
            found = Sorted(order.to(device), adapters, tuple(counts[by_count].tolist()), is_in_order)
        return layout.arranged.setdefault(key, found)


ADVICE = "exclude the layer when the adapter is made, or activate one adapter at a time"


@dataclass(eq=False)
class RunningCall:
    """A call of the model, or of a part of it, in a block of `randlora.serving.routed`."""

    routing: Routing
    module: Any
    kind: tuple[Any, ...]  # equal for calls in which the rows are in the same places
    index: Tensor  # the adapters of the rows, as often as the batch has each row
    tracking: RowTracking | None = None  # follows its rows, unless a call of the same kind was followed before
    chosen: tuple[str | None] | None = None  # the adapter, or the base, whose rows a module now runs for
    assumed_by: str = ""  # the module whose input was last asked for, if its rows are assumed
    outer: RunningCall | None = None


CALL: ContextVar[RunningCall | None] = ContextVar("CALL", default=None)
"""The innermost running call of this thread, or of this task of asyncio."""


def layout_of(routing: Routing, layer: Any, value: Tensor, module: str, *, features: int = 1) -> Layout:
    """Return where the rows are in the input of a layer, whose last ``features`` dimensions belong to one token."""
    shape = value.shape[: value.dim() - features]
    tracking = _tracking(routing, layer)
    if tracking is None:
        known: Layout | None = routing.layouts.get((layer, routing.batch, shape))
        return known if known is not None else _found(routing, layer, shape, module)
    label = tracking.label(value)
    if label is None or label.is_none:
        label = _assumed(routing, tracking, value.shape, module)
        tracking.set(value, label)
    label = filled(merged_along(label, range(len(shape), value.dim())))
    return _followed(routing, layer, label, shape, module)


def layout_of_rows(routing: Routing, layer: Any, rows: BatchRows, module: str) -> tuple[Layout, BatchRows]:
    """Return where the rows of a batch are in the arguments of a module, and which of its arguments have them."""
    shape, tracking = torch.Size([rows.size]), _tracking(routing, layer)
    key = (layer, "arguments"), routing.batch, next(iter(rows.given.values())).shape
    if tracking is None:
        layout = routing.layouts.get((layer, routing.batch, shape)) or _found(routing, layer, shape, module)
        names = routing.layouts.get(key, rows.axes.keys())
    else:
        labels = {name: tracking.label(value) for name, value in rows.given.items()}
        known = {name: label for name, label in labels.items() if label is not None and not label.is_none}
        names = routing.layouts[key] = {*(known or rows.axes)}
        along = [
            filled(merged_along(label, [dim for dim in range(label.rows.dim()) if dim != rows.axes[name][0]]))
            for name, label in known.items()
            if rows.axes[name][1] == 1
        ]
        each = [label._replace(rows=label.rows.flatten()) for label in along]
        label = merged(each) if each else _assumed(routing, tracking, shape, module)
        layout = _followed(routing, layer, label, shape, module)
    if rows.is_declared:
        return layout, rows
    return layout, rows._replace(axes={name: axis for name, axis in rows.axes.items() if name in names})


def _tracking(routing: Routing, layer: Any) -> RowTracking | None:
    """Return what follows the running call, if anything does. Refuse a layer whose rows were unknown before."""
    if (message := routing.refused.get(layer)) is not None and not routing.is_uniform:
        raise AdapterError(message)
    return None if (call := routing.call) is None else call.tracking


def _found(routing: Routing, layer: Any, shape: torch.Size, module: str) -> Layout:
    """Return the layout of an input that was not followed, of a different length, or of a layer called directly."""
    was_given = f"an adapted {module} was given an input of shape {(*shape, '...')}"
    known = (each for (owner, batch, _), each in routing.layouts.items() if owner is layer and batch == routing.batch)
    if routing.is_uniform:
        rows = torch.zeros((1,) * len(shape), dtype=torch.long, device="cpu")
    elif (before := [*known]) or routing.call is not None:
        longer = [each.rows for each in before if _is_longer(each, shape)]
        if not longer or any(each.shape != longer[0].shape for each in longer):
            raise AdapterError(
                f"{was_given} in a call whose inputs have the shapes of an earlier one, in which it was given none of "
                "that length: begin another block of routed"
            )
        rows = longer[0]
    elif shape[:1] == routing.index.shape:  # called outside of any other module of the model
        rows = first_dimension(shape).rows
    else:
        raise AdapterError(f"{was_given}, whose first dimension is not the batch of {routing.batch}: {ADVICE}")
    layout = routing.layouts[layer, routing.batch, shape] = routing.layout(shape, rows)
    return layout


def _is_longer(known: Layout, shape: torch.Size) -> bool:
    """Whether a shape has the rows in the dimension where a known layout has them, and other lengths besides."""
    where = [dim for dim, size in enumerate(known.rows.shape) if size > 1]
    return len(known.shape) == len(shape) and len(where) == 1 and known.shape[where[0]] == shape[where[0]]


def _followed(routing: Routing, layer: Any, label: Label, shape: torch.Size, module: str) -> Layout:
    """Return the layout of an input whose rows were followed, and remember it."""
    rows = label.rows.reshape(label.rows.shape[: len(shape)])
    key = layer, routing.batch, shape
    layout = routing.layout(shape, rows)
    cause = f", since {label.why}" if label.why else ""
    if label.by_values:
        problem = "tokens that were chosen or sorted by values of the batch"
    elif bool((rows == MIXED).any()):
        problem = f"an input in which the rows of the batch are mixed or unknown{cause}"
    elif bool((rows == NONE).any()):
        problem = (
            f"an input whose first dimension is not the batch of {routing.batch} and that is the same for all rows"
        )
    elif key in routing.layouts and routing.layouts[key] is not layout:
        problem = "the rows of the batch in different places than before"
    else:
        routing.layouts[key] = layout
        assert routing.call is not None, "rows are followed in a call"
        routing.call.assumed_by = label.assumed_by
        return layout
    message = f"an adapted {module} was given {problem}, of shape {(*shape, '...')}: {ADVICE}"
    routing.refused[layer] = message  # whatever the lengths of later inputs
    raise AdapterError(message)


def _assumed(routing: Routing, tracking: RowTracking, shape: Sequence[int], module: str) -> Label:
    """Return the label of a tensor that depends on no row, such as learned queries that are repeated for each."""
    if shape[0] != routing.batch:
        return nothing(len(shape))
    if tracking.taken_by:
        return unknown(len(shape), tracking.taken_by)
    return first_dimension(shape)._replace(assumed_by=module)


def follow(routing: Routing, layer: Any, value: Any, layout: Layout, axis: int = 0) -> None:
    """Label the output of a layer, whose rows are where the input has them, beginning at a dimension."""
    if routing.watch is not None and isinstance(value, Tensor):
        routing.watch(layer, value, layout, axis)
    call = routing.call
    if call is not None and call.tracking is not None and isinstance(value, Tensor):
        after = value.dim() - axis - layout.rows.dim()
        rows = layout.rows.reshape(*[1] * axis, *layout.rows.shape, *[1] * after)
        call.tracking.set(value, Label(rows, assumed_by=call.assumed_by))


def unfollowed(routing: Routing) -> AbstractContextManager[None]:
    """Return a block in which no operations are followed; `follow` labels its result."""
    call = routing.call
    return nullcontext() if call is None or call.tracking is None else call.tracking.paused()

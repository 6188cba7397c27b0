"""Which adapter each row of a batch, or each token, goes through, and where the rows are in a layer's input.

The first call with inputs of some shapes is followed (`randlora.serving.tracking`), and its result is reused for calls
of the same kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from randlora.blocks import BLOCKS, Rows
from randlora.errors import AdapterError
from randlora.serving.labels import MIXED, NONE, Label, filled, first_dimension, merged, merged_along, nothing, unknown
from randlora.serving.tracking import RowTracking
from randlora.state import ModelState

BASE = -1
"""The adapter of rows that go through the base model alone."""


class Sorted(NamedTuple):
    """The tokens of a batch, sorted by adapter, the adapters with the fewest tokens first.

    Attributes:
        order: The position in the batch of each, ``(tokens,)``.
        adapters: The names of the adapters in that order; ``None`` is the base.
        counts: The number of tokens of each.
        is_in_order: Whether this is the order of the batch.
    """

    order: Tensor
    adapters: tuple[str | None, ...]
    counts: tuple[int, ...]
    is_in_order: bool


class Layout(NamedTuple):
    """Where the rows of a batch are in a layer's input.

    Attributes:
        shape: The shape of its input without the features.
        rows: The row of each entry, of size 1 in dimensions along which it does not change.
        arranged: The tokens sorted by adapter, by how many times the batch has each row, and device.
    """

    shape: torch.Size
    rows: Tensor
    arranged: dict[tuple[int, torch.device], Sorted]


class Routing:
    """Which adapter each row, or each token, goes through.

    Attributes:
        adapters: The names of the adapters, each once.
        index: The position in ``adapters`` for each row, ``(rows,)``, or for each token, ``(rows, tokens)``.
        is_uniform: Whether all go through one adapter, or all through the base, so that their places do not matter.
        times: How many times each row is in the batch of the running call, one after the other, such as for beams.
        rows_now: The index with as many entries as that batch.
        chosen: While a module runs for the rows of one adapter, a tuple of its name, or of ``None`` for the base.
        keeps: Whether Λ and Γ may be kept. Not if they are sharded, because gathering hides changes of their values.
        call: The running call of the model, or of a part of it; see `randlora.serving.routing`.
        layouts: Where the rows are in the input of each layer, by layer, size of the batch and shape.
        refused: Why the rows of a layer are unknown, by layer.
        by_bases: The tokens of each layer by bases, as `randlora.serving.run` prepared them.
        kept: Λ and Γ of the adapters of each layer; see `randlora.serving.stacked`.
    """

    def __init__(self, names: Sequence[Any]) -> None:
        """Take a name or ``None`` for each row, or a sequence of those for each token of each row."""
        rows = [[row] if row is None or isinstance(row, str) else list(row) for row in names]
        self.adapters = tuple(dict.fromkeys(name for row in rows for name in row if name is not None))
        position: dict[str | None, int] = {name: index for index, name in enumerate(self.adapters)}
        index = torch.tensor([[position.get(name, BASE) for name in row] for row in rows], device="cpu")
        has_tokens = any(row is not None and not isinstance(row, str) for row in names)
        self.index = index if has_tokens else index.squeeze(1)
        self.is_uniform = bool((index == index.flatten()[0]).all())
        self.chosen: tuple[str | None] | None = None
        self.keeps = True
        self._forget()

    def _forget(self) -> None:
        self.call: RunningCall | None = None
        self.layouts: dict[tuple[Any, int, torch.Size], Any] = {}
        self.refused: dict[Any, str] = {}
        self.by_bases: dict[tuple[int, int], Any] = {}
        self.kept: dict[tuple[int, int], Any] = {}
        self._layouts: dict[Any, Layout] = {}
        self.use(1)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without what belongs to one model, for copies and pickles of it."""
        return {name: getattr(self, name) for name in ("adapters", "index", "is_uniform", "chosen", "keeps")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Hold the state of a copy."""
        self.__dict__.update(state)
        self._forget()

    def use(self, times: int) -> None:
        """Set how many times each row is in the batch of the running call."""
        self.times, self.rows_now = times, self.index.repeat_interleave(times, dim=0)

    @property
    def batch(self) -> int:
        """The size of the batch of the running call."""
        return len(self.rows_now)

    @contextmanager
    def choosing(self, adapter: str | None) -> Iterator[None]:
        """Within the block, run modules with one adapter, or with the base: they are given only its rows."""
        before, self.chosen = self.chosen, (adapter,)
        try:
            yield
        finally:
            self.chosen = before

    def layout(self, shape: torch.Size, rows: Tensor) -> Layout:
        """Return the layout of some rows; the same object for the same rows."""
        key = shape, rows.shape, tuple(rows.flatten().tolist())
        if key not in self._layouts:
            self._layouts[key] = Layout(shape, rows, {})
        return self._layouts[key]

    def sorted(self, layout: Layout, device: torch.device, module: str) -> Sorted:
        """Return the tokens of an input, sorted by adapter, with the order on a device.

        Raises:
            AdapterError: If adapters are named for tokens, and the input has different tokens.
        """
        key = self.times, device
        if (known := layout.arranged.get(key)) is not None:
            return known
        with torch.inference_mode(mode=False):  # a later call may need gradients
            of_token = self._of_tokens(layout, module).contiguous()
            numbers, counts = of_token.unique(return_counts=True)
            by_count = counts.argsort(stable=True)
            order = by_count.argsort()[torch.searchsorted(numbers, of_token)].argsort(stable=True)
            adapters = tuple(None if number == BASE else self.adapters[number] for number in numbers[by_count].tolist())
            is_in_order = bool((order == torch.arange(len(order), device="cpu")).all())
            found = Sorted(order.to(device), adapters, tuple(counts[by_count].tolist()), is_in_order)
        layout.arranged[key] = found
        return found

    def _of_tokens(self, layout: Layout, module: str) -> Tensor:
        """Return the position of the adapter of each token, flattened."""
        shape, rows = layout.shape, layout.rows
        if self.is_uniform:
            return self.index.flatten()[:1].repeat(shape.numel())
        if self.rows_now.dim() == 1:
            return self.rows_now[rows].expand(shape).flatten()
        tokens = self.rows_now.shape[1]
        where = torch.arange(self.batch, device="cpu")
        if shape[1:2] == (tokens,) and rows.flatten().tolist() == where.tolist() and rows.shape[0] == shape[0]:
            return self.rows_now.view(*shape[:2], *[1] * (len(shape) - 2)).expand(shape).flatten()
        if shape == (self.rows_now.numel(),) and (rows == where.repeat_interleave(tokens)).all():
            return self.rows_now.flatten()
        raise AdapterError(
            f"an adapted {module} was given an input of shape {(*shape, '...')}, and routed was given names for "
            f"{len(self.index)} rows of {tokens} tokens: give one name for each row, or call the model with such "
            "a batch"
        )


NOTHING = nullcontext()

ADVICE = "exclude the layer when the adapter is made, or activate one adapter at a time"


@dataclass(eq=False)
class RunningCall:
    """A call of the model, or of a part of it, in a block of `randlora.serving.routed`.

    Attributes:
        module: What was called.
        thread: The thread.
        kind: A key that is equal for calls in which the rows are in the same places.
        tracking: The mode that follows its rows, unless a call of the same kind was followed before.
        assumed_by: The module whose input was last asked for, if its rows are assumed.
    """

    module: Any
    thread: int
    kind: tuple[Any, ...]
    tracking: RowTracking | None = None
    assumed_by: str = ""


def require_here(state: ModelState) -> None:
    """Raise an `AdapterError` unless the innermost block was begun in this thread or task."""
    if torch._C._current_graph_task_id() != -1:  # backward, which computes checkpointed parts again in its own threads
        return
    blocks, here = state.disabled, BLOCKS.get()
    if any(isinstance(block, Routing) for block in blocks) and not any(blocks[-1] is block for block in here):
        raise AdapterError(
            "a block of randlora.serving.routed is open in another thread or task, and a model routes for one at a "
            "time: call it inside the block (in other threads with contextvars.copy_context().run, as "
            "asyncio.to_thread does), or gather the rows of all into one batch"
        )


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


def layout_of_rows(routing: Routing, layer: Any, rows: Rows, module: str) -> tuple[Layout, Rows]:
    """Return where the rows of a batch are in the arguments of a module, and which of its arguments have them."""
    shape, tracking = torch.Size([rows.size]), _tracking(routing, layer)
    key = (layer, "arguments"), routing.batch, next(iter(rows.given.values())).shape
    if tracking is None:
        layout = routing.layouts.get((layer, routing.batch, shape)) or _found(routing, layer, shape, module)
        names = routing.layouts.get(key, rows.axes.keys())
    else:
        labels = {name: tracking.label(value) for name, value in rows.given.items()}
        known = {name: label for name, label in labels.items() if label is not None and not label.is_none}
        names = {*([] if known else rows.axes), *known}
        routing.layouts[key] = names
        along = [
            filled(merged_along(label, [dim for dim in range(label.rows.dim()) if dim != rows.axes[name][0]]))
            for name, label in known.items()
            if rows.axes[name][1] == 1
        ]
        each = [label.changed(label.rows.flatten()) for label in along]
        label = merged(each) if each else _assumed(routing, tracking, shape, module)
        layout = _followed(routing, layer, label, shape, module)
    if rows.is_declared:
        return layout, rows
    return layout, rows._replace(axes={name: axis for name, axis in rows.axes.items() if name in names})


def _tracking(routing: Routing, layer: Any) -> RowTracking | None:
    """Return what follows the running call, if anything does; without such a call, check that the block is here."""
    call = routing.call
    if call is None:
        require_here(layer.state)
        return None
    return None if routing.is_uniform else call.tracking


def _found(routing: Routing, layer: Any, shape: torch.Size, module: str) -> Layout:
    """Return the layout of an input that was not followed, of a different length, or of a layer called directly."""
    if routing.is_uniform:
        layout = routing.layout(shape, torch.zeros((1,) * len(shape), dtype=torch.long, device="cpu"))
    else:
        _require_told(routing, layer)
        before = [
            each for (known, batch, _), each in routing.layouts.items() if known is layer and batch == routing.batch
        ]
        if not before and routing.call is None:
            layout = _called_itself(routing, shape, module)
        else:
            found = [each for each in before if _is_longer(each, shape)]
            if not found or any(each.rows.shape != found[0].rows.shape for each in found):
                raise AdapterError(
                    f"an adapted {module} was given an input of shape {(*shape, '...')} in a call whose inputs have "
                    "the shapes of an earlier one, in which it was given none of that length: begin another block of "
                    "routed"
                )
            layout = routing.layout(shape, found[0].rows)
    routing.layouts[layer, routing.batch, shape] = layout
    return layout


def _is_longer(known: Layout, shape: torch.Size) -> bool:
    """Whether a shape has the rows in the dimension where a known layout has them, and other lengths besides."""
    if len(known.shape) != len(shape):
        return False
    where = [dim for dim, size in enumerate(known.rows.shape) if size > 1]
    return len(where) == 1 and known.shape[where[0]] == shape[where[0]]


def _called_itself(routing: Routing, shape: torch.Size, module: str) -> Layout:
    """Return the layout of a layer that is called outside of any other module of the model: its batch comes first."""
    rows = len(routing.index)
    if shape[:1] != (rows,):
        raise AdapterError(
            f"an adapted {module} was given an input of shape {(*shape, '...')}, whose first dimension is not the "
            f"batch of {rows}: {ADVICE}"
        )
    return routing.layout(shape, first_dimension(shape).rows)


def _followed(routing: Routing, layer: Any, label: Label, shape: torch.Size, module: str) -> Layout:
    """Return the layout of an input whose rows were followed, and remember it."""
    _require_told(routing, layer)
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


def _require_told(routing: Routing, layer: Any) -> None:
    if (message := routing.refused.get(layer)) is not None:
        raise AdapterError(message)


def _assumed(routing: Routing, tracking: RowTracking, shape: Sequence[int], module: str) -> Label:
    """Return the label of a tensor that depends on no row. One that is as long as the batch may be an input for each.

    As learned queries, that a model repeats for each row. What it meets later shows whether it is. Or it was computed
    outside of torch from what was taken from there.
    """
    if shape[0] == routing.batch and tracking.taken_by:
        return unknown(len(shape), tracking.taken_by)
    if shape[0] == routing.batch:
        return first_dimension(shape)._replace(assumed_by=module)
    return nothing(len(shape))


def follow(routing: Routing, value: Any, layout: Layout, axis: int = 0) -> None:
    """Label the output of a layer, whose rows are where the input has them, beginning at a dimension."""
    call = routing.call
    if call is None or call.tracking is None or not isinstance(value, Tensor):
        return
    rows = layout.rows
    after = value.dim() - axis - rows.dim()
    label = Label(rows.reshape(*[1] * axis, *rows.shape, *[1] * after), assumed_by=call.assumed_by)
    call.tracking.set(value, label)


def unfollowed(routing: Routing) -> AbstractContextManager[None]:
    """Return a block in which no operations are followed; `follow` labels its result."""
    call = routing.call
    return NOTHING if call is None or call.tracking is None else call.tracking.paused()

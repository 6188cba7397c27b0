"""Which adapter each row of a batch, or each token, goes through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from randlora.errors import AdapterError

BASE = -1
"""The adapter of rows that go through the base model alone."""


class Group(NamedTuple):
    """The tokens of one adapter.

    Attributes:
        adapter: Its name, or ``None`` for the base.
        tokens: How many they are.
    """

    adapter: str | None
    tokens: int


class Sorted(NamedTuple):
    """The tokens of a batch, sorted by adapter, those with the fewest tokens first.

    Attributes:
        order: The position in the batch of each, ``(tokens,)``.
        groups: The adapters in that order.
        adapters: The names of these.
        is_in_order: Whether that is the order of the batch.
    """

    order: Tensor
    groups: tuple[Group, ...]
    adapters: tuple[str | None, ...]
    is_in_order: bool


class Layout(NamedTuple):
    """Where the rows of a batch are in what a layer is given.

    Attributes:
        shape: The shape of its input without the features.
        rows: The row of each entry, of size 1 in dimensions along which it does not change.
        arranged: The tokens sorted by adapter, for each choice of adapters and each device.
    """

    shape: torch.Size
    rows: Tensor
    arranged: dict[tuple[int, torch.device], Sorted]


class Routing:
    """Which adapter each row, or each token, goes through.

    Attributes:
        adapters: The names of the adapters, each once.
        index: The position in these of the adapter of each row, ``(rows,)``, or of each token, ``(rows, tokens)``.
        is_uniform: Whether all go through one adapter, or all through the base: it does not matter where they are then.
        choice: The number of the present `rows_now`.
        chosen: While a module runs for the rows of one adapter, a tuple of its name, or of ``None`` for the base.
        keeps: Whether Λ and Γ may be kept: not if they are sharded, because what gathers them hides that they change.
        call: The running call of the model, or of a part of it; see `randlora.serving.layouts`.
        layouts: Where the rows are in what each layer is given, by layer, size of the batch and shape.
        refused: Why a layer does not tell its rows, by layer.
        by_bases: What `randlora.serving.products` knows of the tokens of each layer.
        kept: Λ and Γ of the adapters of each layer; see `randlora.serving.kept`.
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
        self.call: Any = None
        self.layouts: dict[tuple[Any, int, torch.Size], Any] = {}
        self.refused: dict[Any, str] = {}
        self.by_bases: dict[tuple[int, int], Any] = {}
        self.kept: dict[tuple[int, int], Any] = {}
        self._layouts: dict[Any, Layout] = {}
        self._choices: dict[tuple[int, ...] | None, tuple[int, Tensor]] = {}
        self.use(None)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without what belongs to one model, for copies and pickles of it."""
        return {name: getattr(self, name) for name in ("adapters", "index", "is_uniform", "chosen", "keeps")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Hold the state of a copy."""
        self.__dict__.update(state)
        self._forget()

    def use(self, rows: tuple[int, ...] | None) -> None:
        """Set which rows the batch of the running call has, in which order; ``None`` for each once."""
        if rows not in self._choices:
            self._choices[rows] = len(self._choices), self.index if rows is None else self.index[list(rows)]
        self.choice, self.rows_now = self._choices[rows]

    @property
    def batch(self) -> int:
        """The size of the batch of the running call."""
        return len(self.rows_now)

    @contextmanager
    def choosing(self, adapter: str | None) -> Iterator[None]:
        """Have modules run with one adapter, or with the base, in the block: they are given its rows alone."""
        before, self.chosen = self.chosen, (adapter,)
        try:
            yield
        finally:
            self.chosen = before

    def layout(self, shape: torch.Size, rows: Tensor) -> Layout:
        """Return the layout of some rows, the same object for the same."""
        key = shape, rows.shape, tuple(rows.flatten().tolist())
        if key not in self._layouts:
            self._layouts[key] = Layout(shape, rows, {})
        return self._layouts[key]

    def sorted(self, layout: Layout, device: torch.device, module: str) -> Sorted:
        """Return the tokens of an input, sorted by adapter.

        Args:
            layout: Where the rows are.
            device: Where the order is wanted.
            module: The name of the class of the module, for messages.

        Raises:
            AdapterError: If adapters are named for tokens, and the input has others.
        """
        key = self.choice, device
        if (known := layout.arranged.get(key)) is not None:
            return known
        of_token = self._of_tokens(layout, module).contiguous()
        numbers, counts = of_token.unique(return_counts=True)
        by_count = counts.argsort(stable=True)
        order = by_count.argsort()[torch.searchsorted(numbers, of_token)].argsort(stable=True)
        groups = [
            Group(None if number == BASE else self.adapters[number], count)
            for number, count in zip(numbers[by_count].tolist(), counts[by_count].tolist(), strict=True)
        ]
        is_in_order = bool((order == torch.arange(len(order), device="cpu")).all())
        found = Sorted(order.to(device), tuple(groups), tuple(group.adapter for group in groups), is_in_order)
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

"""Which adapter each row of a batch, or each token, goes through."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from randlora.errors import AdapterError

GENERATION = "transformers.generation."
"""The modules that repeat each row of a batch: for each beam, or for each sequence that is sampled."""

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


class Routing:
    """Which adapter each row, or each token, goes through.

    Attributes:
        adapters: The names of the adapters, each once.
        index: The position in these of the adapter of each row, ``(rows,)``, or of each token, ``(rows, tokens)``.
        batch: The size of the batch of the running call of the model, a multiple of the rows; as many as rows before.
        tokens: The size of the next dimension of its input, if there is one: layers may be given all tokens as rows.
        chosen: While a module runs for the rows of one adapter, a tuple of its name, or of ``None`` for the base.
        thread: The thread that it was made in.
        keeps: Whether Λ and Γ may be kept: not if they are sharded, because what gathers them hides that they change.
        trains: Whether gradients of the adapters are needed, as known when the block begins.
        by_bases: What `randlora.layers.routed` knows of the tokens of each layer.
        kept: Λ and Γ of the adapters of each layer; see `randlora.layers.kept`.
    """

    def __init__(self, names: Sequence[Any]) -> None:
        """Take a name or ``None`` for each row, or a sequence of those for each token of each row."""
        rows = [[row] if row is None or isinstance(row, str) else list(row) for row in names]
        self.adapters = tuple(dict.fromkeys(name for row in rows for name in row if name is not None))
        position: dict[str | None, int] = {name: index for index, name in enumerate(self.adapters)}
        index = torch.tensor([[position.get(name, BASE) for name in row] for row in rows], device="cpu")
        has_tokens = any(row is not None and not isinstance(row, str) for row in names)
        self.index = index if has_tokens else index.squeeze(1)
        self.batch, self.tokens = len(rows), 1
        self.chosen: tuple[str | None] | None = None
        self.thread = threading.get_ident()
        self.keeps, self.trains = True, False
        self.by_bases: dict[tuple[int, int], Any] = {}
        self.kept: dict[tuple[int, int], Any] = {}
        self._sorted: dict[tuple[torch.Size, int, int, torch.device], Sorted] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without what belongs to one model, for copies and pickles of it."""
        return {**self.__dict__, "by_bases": {}, "kept": {}, "_sorted": {}}

    @contextmanager
    def choosing(self, adapter: str | None) -> Iterator[None]:
        """Have modules run with one adapter, or with the base, in the block: they are given its rows alone."""
        self.chosen = (adapter,)
        try:
            yield
        finally:
            self.chosen = None

    def has_batch(self) -> bool:
        """Whether the batch of the running call has the rows: one for each, or in ``generate`` several."""
        rows = len(self.index)
        return self.batch == rows or (self.batch % rows == 0 and _is_generating())

    def sorted(self, shape: torch.Size, device: torch.device, module: str) -> Sorted:
        """Return the tokens of an input of a module, sorted by adapter.

        Args:
            shape: The shape of the input without its features, ``(batch, ...)``.
            device: Where the order is wanted.
            module: The name of its class, for messages.

        Raises:
            AdapterError: If the rows of the batch cannot be told from the shape.
        """
        if shape[:1] != (len(self.index),) and not self.has_batch():
            raise AdapterError(
                f"routed was given names for {len(self.index)} rows, and the model was called with a batch of "
                f"{self.batch}: give a name, or None, for each"
            )
        key = shape, self.batch, self.tokens, device
        if key not in self._sorted:
            of_token = self._of_tokens(shape, module)
            numbers, counts = of_token.unique(return_counts=True)
            by_count = counts.argsort(stable=True)
            order = by_count.argsort()[torch.searchsorted(numbers, of_token)].argsort(stable=True)
            groups = [
                Group(None if number == BASE else self.adapters[number], count)
                for number, count in zip(numbers[by_count].tolist(), counts[by_count].tolist(), strict=True)
            ]
            is_in_order = bool((order == torch.arange(len(order), device="cpu")).all())
            self._sorted[key] = Sorted(
                order.to(device), tuple(groups), tuple(group.adapter for group in groups), is_in_order
            )
        return self._sorted[key]

    def _of_tokens(self, shape: torch.Size, module: str) -> Tensor:
        """Return the position of the adapter of each token, flattened."""
        rows, tokens = len(self.index), shape.numel()
        if self.index.dim() == 2:
            wanted = rows, self.index.shape[1]
            if tuple(shape[:2]) != wanted and shape[:1] != (self.index.numel(),):
                raise AdapterError(
                    f"an adapted {module} was given an input of shape {(*shape, '...')}, and routed was given names "
                    f"for {rows} rows of {wanted[1]} tokens: give one name for each row, or call the model with such "
                    "a batch"
                )
            return self.index.flatten().repeat_interleave(tokens // self.index.numel())
        # the encoder of a model that generates with beams has as many rows as before, while the decoder has more
        known = {size * each for size in (rows, self.batch) for each in (1, self.tokens)}
        if rows > 1 and shape[:1] not in {(size,) for size in known}:  # some of the tokens, perhaps, in another order
            raise AdapterError(
                f"an adapted {module} was given an input of shape {(*shape, '...')}, whose first dimension is not the "
                f"batch of {self.batch}, or all its tokens: routed needs the rows of a batch there; exclude the layer "
                "when the adapter is made, or activate one adapter at a time"
            )
        return self.index.repeat_interleave(tokens // rows)


def _is_generating() -> bool:
    """Whether the model is called by ``generate`` of transformers."""
    frame = sys._getframe(1)
    while (outer := frame.f_back) is not None:
        if str(outer.f_globals.get("__name__")).startswith(GENERATION):
            return True
        frame = outer
    return False

"""Which row of a batch each entry of a tensor belongs to, derived from the tensors it was computed from.

The rows of a tensor are stored as a tensor of row numbers with as many dimensions, whose size is 1 in each dimension
along which the row does not change. For a batch ``(rows, tokens, features)`` this is ``(rows, 1, 1)``, whatever its
size.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from randlora.errors import AdapterError

NONE = -1  # the number that stands for no row, in entries that depend on none, such as in a weight

MIXED = -2  # the number that stands for several rows, or for unknown ones, in entries that depend on them


class Label(NamedTuple):
    """The rows of a tensor."""

    rows: Tensor  # numbers of rows, `NONE` or `MIXED`, on the CPU
    by_values: bool = False  # whether values of the batch decide where the rows are, as of tokens sorted by expert
    assumed_by: str = ""  # the module that was given a tensor that depends on no row and assumed one entry per row
    why: str = ""  # the operation that made the rows unknown, for messages

    @property
    def is_mixed(self) -> bool:
        """Whether some entry has an unknown row."""
        return bool((self.rows == MIXED).any())

    @property
    def is_none(self) -> bool:
        """Whether no entry depends on a row."""
        return bool((self.rows == NONE).all())


def first_dimension(shape: Sequence[int]) -> Label:
    """Return the label of a tensor that has one row for each entry of its first dimension."""
    return Label(torch.arange(shape[0], device="cpu").view(-1, *[1] * (len(shape) - 1)))


def unknown(dims: int, why: str) -> Label:
    """Return the label of a tensor whose rows are unknown."""
    return Label(torch.full((1,) * dims, MIXED, device="cpu"), why=why)


def nothing(dims: int) -> Label:
    """Return the label of a tensor that depends on no row."""
    return Label(torch.full((1,) * dims, NONE, device="cpu"))


def fits(rows: Tensor, shape: Sequence[int]) -> bool:
    """Whether rows fit a tensor of a shape, or one that broadcasts to it."""
    sizes = (1,) * (len(shape) - rows.dim()) + tuple(rows.shape)
    return len(sizes) == len(shape) and all(one in (1, size) for one, size in zip(sizes, shape, strict=True))


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors of an argument or an output, which may be in lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    return [each for part in value for each in tensors_of(part)] if isinstance(value, list | tuple) else []


def shrunk(rows: Tensor) -> Tensor:
    """Return rows with size 1 in each dimension along which they do not change."""
    rows = rows[tuple(slice(1) if stride == 0 else slice(None) for stride in rows.stride())]
    for dim in range(rows.dim()):
        if rows.shape[dim] > 1 and bool((rows == (first := rows.narrow(dim, 0, 1))).all()):
            rows = first
    return rows


def merged_along(label: Label, dims: Iterable[int]) -> Label:
    """Return the label of entries computed from all entries along some dimensions, which then have size 1."""
    rows = label.rows
    for dim in dims:
        if rows.shape[dim] > 1:
            highest = rows.amax(dim, keepdim=True)
            lowest = torch.where(rows >= 0, rows, highest).amin(dim, keepdim=True)
            rows = torch.where((rows == MIXED).any(dim, keepdim=True) | (lowest != highest), MIXED, highest)
    return label._replace(rows=shrunk(rows))


def merged(labels: Sequence[Label]) -> Label:
    """Return the label of entries that are each computed from one entry of several tensors, after broadcasting."""
    if len(labels) == 1:
        return labels[0]
    rows, marks = torch.full((), NONE, device="cpu"), Label(torch.empty(0, device="cpu"))
    for label in sorted(labels, key=lambda label: label.by_values or bool(label.assumed_by)):  # the certain ones first
        is_either = (label.rows == NONE) | (label.rows == rows)
        both = torch.where(rows == NONE, label.rows, torch.where(is_either, rows, MIXED))
        if label.assumed_by and bool(((both == MIXED) & (rows != MIXED) & (label.rows != MIXED)).any()):
            raise AdapterError(
                f"an adapted {label.assumed_by} was given an input that is the same for all rows of the batch, and its "
                "output is combined with several of them: routed cannot tell which adapter to use; exclude the layer "
                "when the adapter is made, or activate one adapter at a time"
            )
        if (label.by_values or label.assumed_by) and bool(((rows == NONE) & (both != NONE)).any()):
            marks = marked([marks, label], marks.rows)
        rows = both
    return marks._replace(rows=shrunk(rows), why=marked(labels, rows).why)


def marked(labels: Sequence[Label], rows: Tensor) -> Label:
    """Return a label with these rows, and each mark that any of the labels has."""
    return Label(
        rows,
        any(label.by_values for label in labels),
        next((label.assumed_by for label in labels if label.assumed_by), ""),
        next((label.why for label in labels if label.why), ""),
    )


def reshaped(rows: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Return the rows of a tensor of shape ``old`` after it is viewed as ``new``."""
    if 0 in old:
        return torch.full((1,) * len(new), NONE, device="cpu")
    ends = [list(accumulate(shape, operator.mul)) for shape in (old, new)]
    expanded, wanted = list[int](), list[int]()
    i = j = 0
    for end in sorted({*ends[0]} & {*ends[1]} | {math.prod(old)}):  # as few dimensions as have equally many entries
        i_end, j_end = (bisect_right(each, end) for each in ends)
        is_same = all(size == 1 for size in rows.shape[i:i_end])
        expanded += [1] * (i_end - i) if is_same else old[i:i_end]
        wanted += [1] * (j_end - j) if is_same else new[j:j_end]
        i, j = i_end, j_end
    return shrunk(rows.expand(expanded).reshape(wanted))


def filled(label: Label) -> Label:
    """Return a label in which entries that depend on no row get the one row that all others at an index have.

    For example, a token that a model puts before the tokens of each row belongs to that row.
    """
    if not bool((label.rows == NONE).any()) or label.is_none:
        return label
    for dim, size in enumerate(label.rows.shape):
        if size > 1:
            others = [other for other in range(label.rows.dim()) if other != dim]
            own = merged_along(label, others).rows
            if own.shape[dim] == size and bool((own >= 0).all()):
                return label._replace(rows=shrunk(torch.where(label.rows == NONE, own, label.rows)))
    return label

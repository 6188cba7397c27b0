"""A part of a weight, and the part of the bases that its update is made of.

A row of an update needs one row of B, or one column of A and of Γ if the layer is narrower than its input; a column the
other way around. The part may have several pieces, such as of a weight that stacks several matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Span = tuple[int, int]  # `(start, stop)`
Spans = tuple[Span, ...]  # which entries of a dimension, in order; at least one span, which may be empty


def all_of(size: int) -> Spans:
    """Return all entries of a dimension."""
    return ((0, size),)


def entries_of(spans: Spans) -> int:
    """Return the number of entries."""
    return sum(stop - start for start, stop in spans)


def take_spans(tensor: Tensor, spans: Spans, dim: int) -> Tensor:
    """Return these entries of a dimension of a tensor; a view if they are one span."""
    pieces = [tensor.narrow(dim, start, stop - start) for start, stop in spans]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


class Sides(NamedTuple):
    """The part of the bases that a part of an update is made of: rows of B, and columns of A and of Γ."""

    large: Spans
    small: Spans


class Region(NamedTuple):
    """A part of a weight, ``(out_features, in_features)``, or of each of some matrices in a stack."""

    rows: Spans
    columns: Spans
    matrices: Spans | None = None  # all, or not a stack

    def sides(self, *, is_wide: bool) -> Sides:
        """Return the part of the bases; ``is_wide`` says whether the whole layer's input has ``min_dim`` features."""
        return Sides(self.rows, self.columns) if is_wide else Sides(self.columns, self.rows)

    def of(self, matrix: Tensor) -> Tensor:
        """Return this part of a matrix."""
        return take_spans(take_spans(matrix, self.rows, 0), self.columns, 1)

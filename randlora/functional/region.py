"""A part of a weight, and which part of the bases its update is made of.

A row of an update needs one row of B, or one column of A and of Γ if the layer is narrower than its input; a column the
other way around. So a process that holds a part of a weight computes that part of the update from a part of the bases.
"""

from __future__ import annotations

from typing import NamedTuple

Span = tuple[int, int]
"""``(start, stop)``."""


class Sides(NamedTuple):
    """The part of the bases that a part of an update is made of.

    Attributes:
        large: Rows of B.
        small: Columns of A and of Γ.
    """

    large: Span
    small: Span


class Region(NamedTuple):
    """A part of a weight, ``(out_features, in_features)``, or of each matrix of some in a stack.

    Attributes:
        rows: Which outputs.
        columns: Which inputs.
        matrices: Which matrices of a stack; ``None`` for all, or for a weight that is no stack.
    """

    rows: Span
    columns: Span
    matrices: Span | None = None

    def sides(self, *, is_wide: bool) -> Sides:
        """Return the part of the bases; ``is_wide`` says whether the whole layer's input has ``min_dim`` features."""
        return Sides(self.rows, self.columns) if is_wide else Sides(self.columns, self.rows)

    @property
    def slices(self) -> tuple[slice, slice]:
        """The index of this part of a matrix."""
        return slice(*self.rows), slice(*self.columns)

"""How large bases a file may ask for: it names their dims in a few bytes, and drawing them may take all memory.

Bases drawn for several adapters are as large as the widest layers of all of these, which one file need not name. So a
file's own layers are no measure: those of its model are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from randlora.bases.spec import BasisSpec, Shape, count_bases, drawn_dims
from randlora.errors import CheckpointError

Known = Callable[[], Iterable[Shape]]
"""Returns the shapes of all layers of a model, which is called if they matter."""

FOR_ANY_MODEL = 2**23
"""Entries of A and B that are drawn for any model, in a part of a second: those for a weight of 4096 x 2000."""
WITHOUT_MODEL = 2**30
"""Entries that are drawn where no model says how large its layers are: enough for weights of 53248 x 16384."""
LONGEST_SIDE = 2**20
"""The largest dim in that case."""


def count_entries(r: int, max_dim: int, min_dim: int) -> int:
    """Return the number of entries of A, ``(r, min_dim)``, and of B, ``(max_dim, num_bases·r)``."""
    return r * min_dim + max_dim * count_bases(min_dim, r) * r


def require_drawable(spec: BasisSpec, used: tuple[int, int], stored: int, known: Known | None) -> None:
    """Raise a `CheckpointError` if bases are larger than any that layers of the model need.

    Args:
        spec: Their spec, in a file.
        used: The ``(max_dim, min_dim)`` that the file's layers use.
        stored: Number of entries of the bases that the file holds.
        known: The layers of the model, if there is one.
    """
    max_dim, min_dim = max(spec.max_dim, used[0]), max(spec.min_dim, used[1])
    count = count_entries(spec.r, max_dim, min_dim)
    if count <= max(FOR_ANY_MODEL, stored):
        return
    asked = f"the file asks for bases of {max_dim} x {min_dim} with r={spec.r}, {count:,} entries"
    if known is None:
        if count > WITHOUT_MODEL or max(max_dim, min_dim) > LONGEST_SIDE:
            raise CheckpointError(
                f"{asked}, more than {WITHOUT_MODEL:,} or a side above {LONGEST_SIDE:,}: "
                "if its layers are so large, give the directory of the base model"
            )
        return
    dims = drawn_dims([*known(), (1, 1)])
    if count > count_entries(spec.r, *dims):
        raise CheckpointError(
            f"{asked}, and for the largest layers of this model they are {dims[0]} x {dims[1]}: the file is damaged, "
            "or was trained beside larger layers; then save it there with bases='stored'"
        )

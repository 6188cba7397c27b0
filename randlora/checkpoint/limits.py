"""How large bases a file may ask for: it names their dims in a few bytes, and drawing them may take all memory.

Bases drawn for several adapters are as large as the widest layers of all of these, which one file need not name. So a
file's own layers are no measure: those of its model are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from randlora.bases.spec import BasisSpec, Shape, count_bases, drawn_dims
from randlora.checkpoint.read import AdapterFile
from randlora.errors import CheckpointError

Known = Callable[[], Iterable[Shape]]
"""Returns the shapes of all layers of a model, which is called if they matter."""

FOR_ANY_FILE = 2**22
"""Entries of A and B that are drawn for any file, in a part of a second: those for a weight of 2048 x 2000."""
TIMES = 2**10
"""Entries that are drawn for each entry of Λ and Γ in a file, where no model says how large its layers are."""
ROW = 2**6  # entries that are drawn in the time in which a row begins, whose stream may be its own


def count_entries(r: int, max_dim: int, min_dim: int) -> int:
    """Return the number of entries of A, ``(r, min_dim)``, and of B, ``(max_dim, num_bases·r)``."""
    return r * min_dim + max_dim * count_bases(min_dim, r) * r


def require_drawable(spec: BasisSpec, used: tuple[int, int], file: AdapterFile, known: Known | None) -> None:
    """Raise a `CheckpointError` if bases are larger than any that layers of the model need.

    Args:
        spec: Their spec, in a file.
        used: The ``(max_dim, min_dim)`` that the file's layers use.
        file: The file, of which Λ, Γ and stored bases count.
        known: The layers of the model, if there is one.
    """
    max_dim, min_dim = max(spec.max_dim, used[0]), max(spec.min_dim, used[1])
    count = count_entries(spec.r, max_dim, min_dim)
    cost = count + ROW * (max_dim + spec.r)
    if cost <= FOR_ANY_FILE or count <= sum(basis.numel() for basis in file.bases.get(spec.r, ())):
        return
    asked = f"the file asks for bases of {max_dim} x {min_dim} with r={spec.r}, {count:,} entries"
    if known is None:
        own = sum(part.numel() for pair in file.values.values() for part in pair)
        if cost > TIMES * own:
            raise CheckpointError(
                f"{asked}, and has {own:,} of its own: if its layers are so large, give the directory of the base model"
            )
        return
    dims = drawn_dims([*known(), (1, 1)])
    if count > count_entries(spec.r, *dims):
        raise CheckpointError(
            f"{asked}, and for the largest layers of this model they are {dims[0]} x {dims[1]}: the file is damaged, "
            "or was trained beside larger layers; then save it there with bases='stored'"
        )

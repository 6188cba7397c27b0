"""``block``: A and B are zero outside of blocks, whose rows and columns are strided; products skip the zeros."""

import math
from dataclasses import replace

from torch import Tensor

from randlora.bases.dense import DENSE
from randlora.bases.spec import KINDS, BasisSpec, count_bases
from randlora.functional import BlockPair, DensePair, Pair
from randlora.functional.cost import SMALL_WEIGHT
from randlora.functional.region import Sides

SMALLEST_BLOCK_COLUMN = 8  # default minimum of entries in a column of A: fits within .004 of dense bases
MOST_BLOCKS_IN_B = 8


def default_blocks(r: int) -> tuple[int, int]:
    """Return ``(c, b)`` for a rank: the most blocks of A with 8 entries in a column, and at most 8 blocks of B."""
    divisors = [size for size in range(1, r + 1) if r % size == 0]
    c = max((size for size in divisors if r // size >= SMALLEST_BLOCK_COLUMN), default=1)
    b = max(size for size in divisors if size <= MOST_BLOCKS_IN_B)
    return c, b


def block_parts(max_dim: int, min_dim: int, r: int, blocks: tuple[int, int]) -> list[tuple[int, int]]:
    """Return ``(rows, columns)`` of each submatrix in which an update of ``block`` bases may be nonzero.

    Entry (i, j) may be nonzero if some p, the index that pairs the columns of UB with the rows of UA, has
    ``p ≡ i (mod b)`` and ``p // num_bases ≡ j (mod c)``. With many bases there is one part, the whole matrix.
    """
    c, b = blocks
    num_bases = count_bases(min_dim, r)
    parts: list[tuple[set[int], set[int]]] = []  # remainders of their rows and columns
    for row, column in sorted({(p % b, p // num_bases % c) for p in range(num_bases * r)}):
        met = [part for part in parts if row in part[0] or column in part[1]]
        rows, columns = {row}.union(*(part[0] for part in met)), {column}.union(*(part[1] for part in met))
        parts = [part for part in parts if part not in met] + [(rows, columns)]
    return [
        (sum(len(range(row, max_dim, b)) for row in rows), sum(len(range(column, min_dim, c)) for column in columns))
        for rows, columns in parts
    ]


def _sliced(spec: BasisSpec, basis_A: Tensor, basis_B: Tensor, num_bases: int, sides: Sides) -> Pair:
    c, b = spec.blocks or (1, 1)
    if (c, b) == (1, 1):
        return DENSE.sliced(spec, basis_A, basis_B, num_bases, sides)
    (row, stop_row), (column, stop_column) = sides
    first_row, first_column = row - row % b, column - column % c  # where blocks begin
    height, width = math.ceil((stop_row - first_row) / b) * b, math.ceil((stop_column - first_column) / c)
    blocks_A = basis_A[:, first_column // c :][:, :width].unflatten(0, (-1, c)).transpose(0, 1).contiguous()
    blocks_B = basis_B[first_row:, : num_bases * spec.r // b][:height].unflatten(0, (-1, b)).transpose(0, 1)
    dims = stop_row - first_row, stop_column - first_column
    pair = BlockPair(blocks_A, blocks_B, num_bases, *dims, (c, b, spec.r // c))
    if (first_row, first_column) != (row, column):
        written = pair.write_out()
        return DensePair(written.A[..., column - first_column :].contiguous(), written.B[row - first_row :])
    if math.prod(dims) <= SMALL_WEIGHT:
        pair.written = pair.write_out()
    return pair


def _paired(spec: BasisSpec, basis_A: Tensor, basis_B: Tensor, num_bases: int, sides: Sides) -> Pair:
    c, b = spec.blocks or (1, 1)
    (row, stop_row), (column, stop_column) = sides
    if (c, b) == (1, 1) or row % b or column % c:
        return DENSE.paired(spec, basis_A, basis_B, num_bases, sides)
    return BlockPair(basis_A, basis_B, num_bases, stop_row - row, stop_column - column, (c, b, spec.r // c))


KINDS["block"] = replace(
    DENSE,
    draws={"portable": DENSE.draws["portable"]},
    expected_rank=lambda spec, max_dim, min_dim: sum(
        min(part) for part in block_parts(max_dim, min_dim, spec.r, spec.blocks or (1, 1))
    ),
    sliced=_sliced,
    paired=_paired,
    default_blocks=default_blocks,
    peft_flags=None,
)

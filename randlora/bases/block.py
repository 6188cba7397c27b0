"""``block``: A and B are zero outside of blocks, whose rows and columns are strided; products skip the zeros."""

import math
from collections.abc import Collection
from dataclasses import replace

from torch import Tensor

from randlora.bases.dense import DENSE
from randlora.bases.spec import KINDS, BasisSpec, count_bases, reach_all
from randlora.functional import BlockPair, DensePair, Pair
from randlora.functional.cost import SMALL_WEIGHT
from randlora.functional.region import Sides, Spans, entries_of, take_spans

SMALLEST_BLOCK_COLUMN = 8  # default minimum of entries in a column of A: fits within .004 of dense bases
MOST_BLOCKS_IN_B = 8


def default_blocks(r: int, counts: Collection[int]) -> tuple[int, int]:
    """Return ``(c, b)`` for a rank, given the numbers of bases of its layers.

    A has at most so many blocks that a column has 8 entries, and B at most 8. Of those that leave no entry of an update
    always zero, these have the smallest ``1/c + 2/b``, where B counts twice because it is the larger one, and of equals
    more blocks in A. If every layer has 8 bases or more, both have as many blocks as they can.
    """
    divisors = [size for size in range(1, r + 1) if r % size == 0]
    pairs = [
        (c, b)
        for c in divisors
        if c == 1 or r // c >= SMALLEST_BLOCK_COLUMN
        for b in divisors
        if b <= MOST_BLOCKS_IN_B and all(reach_all((c, b), num_bases) for num_bases in counts)
    ]
    return min(reversed(pairs), key=lambda blocks: r // blocks[0] + 2 * r // blocks[1])


def block_parts(max_dim: int, min_dim: int, r: int, blocks: tuple[int, int]) -> list[tuple[int, int]]:
    """Return ``(rows, columns)`` of each submatrix in which an update of ``block`` bases may be nonzero.

    Entry (i, j) may be nonzero if some p, the index that pairs the columns of UB with the rows of UA, has
    ``p ≡ i (mod b)`` and ``p // num_bases ≡ j (mod c)``. With many bases there is one part, the whole matrix. One part
    may have zeros too; see `reach_all`.
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
    rows, columns = sides
    if not (_begin_with_blocks(rows, b) and _begin_with_blocks(columns, c)):
        return _without_blocks(spec, basis_A, basis_B, num_bases, sides)
    blocks_A = take_spans(basis_A, tuple((start // c, math.ceil(stop / c)) for start, stop in columns), 1)
    padded = tuple((start, start + math.ceil((stop - start) / b) * b) for start, stop in rows)
    blocks_B = take_spans(basis_B, padded, 0)[:, : num_bases * spec.r // b]
    pair = BlockPair(
        blocks_A.unflatten(0, (-1, c)).transpose(0, 1).contiguous(),
        blocks_B.unflatten(0, (-1, b)).transpose(0, 1),
        num_bases,
        entries_of(rows),
        entries_of(columns),
        (c, b, spec.r // c),
    )
    if entries_of(rows) * entries_of(columns) <= SMALL_WEIGHT:
        pair.written = pair.write_out()
    return pair


def _begin_with_blocks(spans: Spans, blocks: int) -> bool:
    """Whether each span begins where blocks begin, and still does with the spans one after the other."""
    return all(start % blocks == 0 for start, _ in spans) and all(
        (stop - start) % blocks == 0 for start, stop in spans[:-1]
    )


def _without_blocks(spec: BasisSpec, basis_A: Tensor, basis_B: Tensor, num_bases: int, sides: Sides) -> Pair:
    """Return a dense pair, cut out of the blocks around it."""
    c, b = spec.blocks or (1, 1)
    row, column = (spans[0][0] // blocks * blocks for spans, blocks in zip(sides, (b, c), strict=True))
    around = Sides(((row, sides.large[-1][1]),), ((column, sides.small[-1][1]),))
    pair = _sliced(spec, basis_A, basis_B, num_bases, around)
    assert isinstance(pair, BlockPair), "it begins with blocks"
    written = pair.written or pair.write_out()
    rows, columns = (
        tuple((start - first, stop - first) for start, stop in spans)
        for spans, first in zip(sides, (row, column), strict=True)
    )
    return DensePair(take_spans(written.A, columns, -1).contiguous(), take_spans(written.B, rows, 0))


def _paired(spec: BasisSpec, basis_A: Tensor, basis_B: Tensor, num_bases: int, sides: Sides) -> Pair:
    c, b = spec.blocks or (1, 1)
    rows, columns = sides
    if (c, b) == (1, 1) or not (_begin_with_blocks(rows, b) and _begin_with_blocks(columns, c)):
        return DENSE.paired(spec, basis_A, basis_B, num_bases, sides)
    return BlockPair(basis_A, basis_B, num_bases, entries_of(rows), entries_of(columns), (c, b, spec.r // c))


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

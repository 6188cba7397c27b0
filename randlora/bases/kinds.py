"""The kinds of bases.

- ``dense``: every entry is a uniform random number, stored in bfloat16.
- ``sparse`` and ``very_sparse``: every entry is 0, or plus or minus one number, stored as a sign in int8.
- ``block``: A and B are zero outside of blocks with strided rows and columns; products skip the zeros.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from randlora.bases import streams
from randlora.bases.spec import KINDS, BasisSpec, Kind, Matrices, count_bases, reach_all
from randlora.functional import BlockPair, DensePair, Pair
from randlora.functional.cost import SMALL_WEIGHT
from randlora.functional.region import Sides, Spans, entries_of, take_spans

_since_2_12 = partial(streams.torch_uniform, rounded=streams.since_2_12)
_until_2_11 = partial(streams.torch_uniform, rounded=streams.until_2_11)

DENSE = KINDS["dense"] = Kind(
    draws={
        "torch": partial(streams.torch_draw, draw_matrix=_since_2_12),
        "torch-2.11": partial(streams.torch_draw, draw_matrix=_until_2_11),
        "portable": partial(streams.portable_draw, to_values=streams.portable_uniform),
    },
    dtype=torch.bfloat16,
    expected_rank=lambda _spec, _max_dim, min_dim: min_dim,
    sliced=lambda spec, basis_A, basis_B, num_bases, sides: DensePair(
        take_spans(basis_A, sides.small, 1).unsqueeze(0), take_spans(basis_B, sides.large, 0)[:, : num_bases * spec.r]
    ),
    paired=lambda _spec, basis_A, basis_B, _num_bases, _sides: DensePair(basis_A, basis_B),
    peft_flags=(False, False),
)


def _ternary(probability: Callable[[int], float], *, depends_on_dims: bool, peft_flags: tuple[bool, bool]) -> Kind:
    """Return the kind whose entries are +1, and as often -1, with a probability that ``spec.min_dim`` may determine."""

    def draw_portable(spec: BasisSpec, max_dim: int, min_dim: int) -> Matrices:
        share = probability(spec.min_dim)
        signs = partial(streams.portable_signs, probability=share)
        return streams.portable_draw(spec, max_dim, min_dim, to_values=signs, scale=1 / math.sqrt(2 * share))

    torch_signs = partial(streams.torch_signs, probability=probability)
    return replace(
        DENSE,
        draws={"torch": partial(streams.torch_draw, draw_matrix=torch_signs), "portable": draw_portable},
        dtype=torch.int8,
        # all terms share A: a column of zeros in it is one in every update
        expected_rank=lambda spec, _, min_dim: round(min_dim * (1 - (1 - 2 * probability(spec.min_dim)) ** spec.r)),
        depends_on_dims=depends_on_dims,
        peft_flags=peft_flags,
    )


KINDS["sparse"] = _ternary(lambda _: 1 / 6, depends_on_dims=False, peft_flags=(True, False))
KINDS["very_sparse"] = _ternary(lambda m: 1 / (2 * math.sqrt(m)), depends_on_dims=True, peft_flags=(False, True))


SMALLEST_BLOCK_COLUMN = 8  # default minimum of entries in a column of A: fits within .004 of dense bases
MOST_BLOCKS_IN_B = 8


def default_blocks(r: int, counts: Collection[int]) -> tuple[int, int]:
    """Return ``(c, b)`` for a rank, given the numbers of bases of its layers.

    A column of A keeps at least 8 entries, and B has at most 8 blocks. Among the choices that leave no entry of an
    update always zero, this is the one with the smallest ``1/c + 2/b`` (B counts twice because it is larger), and
    among equals the one with more blocks in A. If every layer has 8 bases or more, both have as many as they can.
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
    ``p ≡ i (mod b)`` and ``p // num_bases ≡ j (mod c)``. With many bases there is one part, the whole matrix. A single
    part may have zeros too; see `reach_all`.
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

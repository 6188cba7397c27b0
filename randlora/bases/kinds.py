"""The kinds of bases, and the streams: how their numbers are drawn from a seed, in chunks of rows to bound memory.

Entries of ``dense`` are uniform random numbers in bfloat16; those of ``sparse`` and ``very_sparse`` are 0, or plus or
minus one number, stored as a sign in int8; ``block`` bases are zero outside of blocks of strided rows and columns.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from randlora.bases.spec import KINDS, BasisSpec, CompactMatrix, Kind, Matrices, count_bases, reach_all
from randlora.errors import ConfigError
from randlora.functional import BlockPair, DensePair, Pair
from randlora.functional.cost import SMALL_WEIGHT, multiply_adds
from randlora.functional.region import Sides, Spans, all_of, entries_of, take_spans

VERSION = 1  # of the portable stream
PORTABLE_CHUNK = 2**20
TORCH_CHUNK = 2**17  # which a core's cache holds

Lanes = NDArray[np.uint32]
Values = NDArray[np.generic]

Sizes = tuple[int, int, int]


def portable_draw(
    spec: BasisSpec, max_dim: int, min_dim: int, *, to_values: Callable[[Lanes, int], Values], scale: float = 1.0
) -> Matrices:
    """Draw bases with the same bits on every machine, thread count, torch version and chunking.

    They come from NumPy's ``Philox``, a counter-based generator with a guaranteed raw stream. Every row has its own
    counter range, so longer or more rows begin with the shorter or fewer ones. ``to_values`` makes one entry of each
    32-bit lane, by comparisons or exact float32 operations.
    """

    def draw_matrix(index: int, rows: int, columns: int, stride: int) -> CompactMatrix:
        width = math.ceil(columns / stride)
        values = torch.empty((rows, width), dtype=KINDS[spec.kind].dtype, device="cpu")
        step = max(1, PORTABLE_CHUNK // width)
        for start in range(0, rows, step):
            chunk = range(start, min(start + step, rows))
            lanes = np.stack([_row(spec.seed, index, row, width) for row in chunk])
            values[start : chunk.stop] = torch.from_numpy(to_values(lanes, stride)).to(values.dtype)
        return CompactMatrix(values, columns, float(np.float32(scale)), stride)

    (c, b), columns_B = spec.blocks or (1, 1), count_bases(min_dim, spec.r) * spec.r
    return draw_matrix(0, spec.r, min_dim, c), draw_matrix(1, max_dim, columns_B, b)


def _row(seed: int, index: int, row: int, width: int) -> Lanes:
    """Return the first ``width`` lanes of one row: the low half of each 64-bit word first, on any machine."""
    philox = np.random.Philox(
        key=np.array([seed, VERSION << 8 | index], dtype=np.uint64), counter=np.array([0, row, 0, 0], dtype=np.uint64)
    )
    words = philox.random_raw(math.ceil(width / 2))
    return words.astype("<u8").view("<u4")[:width]


def portable_signs(lanes: Lanes, stride: int, *, probability: float) -> Values:  # noqa: ARG001
    """Return 1 and -1 with the given probability each, else 0."""
    threshold = round(probability * 2**32)
    high = lanes >= np.uint32(2**32 - threshold)
    return high.astype(np.int8) - (lanes < np.uint32(threshold)).astype(np.int8)


def portable_uniform(lanes: Lanes, stride: int) -> Values:
    """Return uniform numbers, scaled so that a matrix with one of them in ``stride`` entries has a mean square of 1."""
    # a lane's upper 24 bits are mapped to the odd multiples of 2**-24 in (-1, 1), all exact in float32
    odd = (lanes >> np.uint32(8)).astype(np.int32) * 2 + 1 - 2**24
    return odd.astype(np.float32) * np.float32(2.0**-24) * np.float32(math.sqrt(3 * stride))


def torch_draw(spec: BasisSpec, max_dim: int, min_dim: int, *, draw_matrix: Callable[..., CompactMatrix]) -> Matrices:
    """Draw the bases of PEFT 0.21.2, bit for bit, from torch's CPU generator, and keep the part that layers use.

    PEFT draws A and then B for the largest dims of all targets, and divides each by its standard deviation. It draws
    ``dense`` in bfloat16, where the bits of a seed differ between torch 2.11 and 2.12, and on CPUs without fused
    multiply-add. What torch draws in float32, 24 random bits each, is the same everywhere, and both streams are
    computed from it: ``torch`` as 2.12 does on a CPU with fused multiply-add, ``torch-2.11`` as older versions did.
    """
    generator = torch.Generator("cpu").manual_seed(spec.seed)
    num_bases = count_bases(min_dim, spec.r)
    basis_A = draw_matrix(spec, generator, (spec.r, 1, spec.min_dim), (spec.r, 1, min_dim))
    basis_B = draw_matrix(spec, generator, (spec.max_dim, spec.num_bases, spec.r), (max_dim, num_bases, spec.r))
    return basis_A, basis_B


def _deviation(spec: BasisSpec, count: int, total: float, squares: float) -> float:
    """Return the standard deviation from count, sum and sum of squares, or raise an error if all numbers are equal."""
    variance = (count * squares - total * total) / (count * (count - 1)) if count > 1 else 0.0
    if variance <= 0:
        other = "stream='portable'" if count == 1 or spec.kind == "dense" else "a different seed, or basis='dense'"
        raise ConfigError(f"{spec} have a standard deviation of 0: use a larger r or {other}")
    return math.sqrt(variance)


def since_2_12(numbers: Tensor, high: float) -> Tensor:
    """Return the bfloat16 numbers that torch 2.12 and newer draw in [-high, high), from float32 numbers in [0, 1)."""
    # torch computes u * (high - low) + low, which is high * (2u - 1), and only the product is rounded
    drawn = numbers.mul_(2).sub_(1).mul_(high).to(torch.bfloat16)
    highest = torch.tensor(high, dtype=torch.bfloat16, device="cpu")
    return drawn.masked_fill_(drawn == highest, -highest.item())  # which the interval leaves out


def until_2_11(numbers: Tensor, high: float) -> Tensor:
    """Return the bfloat16 numbers that torch 2.11 and older drew, from float32 numbers in [0, 1)."""
    # torch kept the low 8 of the 24 random bits, and rounded high to bfloat16 first; all but the last step is exact
    highest = torch.tensor(high, dtype=torch.bfloat16, device="cpu").item()
    return numbers.mul_(2**16).frac_().mul_(2).sub_(1).mul_(highest).to(torch.bfloat16)


def torch_uniform(
    spec: BasisSpec,
    generator: torch.Generator,
    shape: Sizes,
    keep: Sizes,
    *,
    rounded: Callable[[Tensor, float], Tensor],
) -> CompactMatrix:
    """Draw Kaiming-uniform numbers (a = √5) as PEFT does: ``shape[1]`` draws of ``(rows, 1, width)``."""
    rows, draws, width = shape
    high = math.sqrt(3.0) * (math.sqrt(2 / 6) / math.sqrt(width))  # rounded as in `torch.nn.init.kaiming_uniform_`
    kept = torch.empty(keep, dtype=torch.bfloat16, device="cpu")
    total = squares = 0.0  # in float64, so that their order does not show in bfloat16
    step = max(1, TORCH_CHUNK // width)
    for index, start in ((index, start) for index in range(draws) for start in range(0, rows, step)):
        chunk = min(step, rows - start), width
        numbers = torch.rand(chunk, generator=generator, dtype=torch.float32, device="cpu")
        drawn = rounded(numbers, high)
        total += drawn.sum(dtype=torch.float64).item()
        squares += torch.linalg.vector_norm(drawn, dtype=torch.float64).square().item()
        if index < keep[1]:
            kept[start : start + step, index] = drawn[: max(0, keep[0] - start), : keep[2]]
    deviation = _deviation(spec, rows * draws * width, total, squares)
    kept /= torch.tensor(deviation, dtype=torch.float64, device="cpu").to(torch.bfloat16)
    return CompactMatrix(kept.flatten(start_dim=1), keep[1] * keep[2])


def torch_signs(
    spec: BasisSpec, generator: torch.Generator, shape: Sizes, keep: Sizes, *, probability: Callable[[int], float]
) -> CompactMatrix:
    """Draw 1 and -1 with the given probability each, else 0, in the order of a single draw of the whole shape."""
    kept = torch.empty(keep, dtype=torch.int8, device="cpu")
    share = probability(spec.min_dim)
    total = count_nonzero = 0
    step = max(1, TORCH_CHUNK // (shape[1] * shape[2]))
    for start in range(0, shape[0], step):
        chunk = min(step, shape[0] - start), *shape[1:]
        numbers = torch.rand(chunk, generator=generator, dtype=torch.float32, device="cpu")
        drawn = (numbers > 1 - share).to(torch.int8) - (numbers < share).to(torch.int8)
        total, count_nonzero = total + int(drawn.sum()), count_nonzero + int(drawn.count_nonzero())
        kept[start : start + step] = drawn[: max(0, keep[0] - start), : keep[1], : keep[2]]
    deviation = _deviation(spec, math.prod(shape), total, count_nonzero)
    scale = 1 / torch.tensor(deviation, dtype=torch.float64, device="cpu").to(torch.float32)
    return CompactMatrix(kept.flatten(start_dim=1), keep[1] * keep[2], scale.item())


DENSE = KINDS["dense"] = Kind(
    draws={
        "torch": partial(torch_draw, draw_matrix=partial(torch_uniform, rounded=since_2_12)),
        "torch-2.11": partial(torch_draw, draw_matrix=partial(torch_uniform, rounded=until_2_11)),
        "portable": partial(portable_draw, to_values=portable_uniform),
    },
    dtype=torch.bfloat16,
    expected_rank=lambda _spec, _max_dim, min_dim: min_dim,
    sliced=lambda spec, basis_A, basis_B, num_bases, sides: DensePair(
        take_spans(basis_A, sides.small, 1).unsqueeze(0), take_spans(basis_B, sides.large, 0)[:, : num_bases * spec.r]
    ),
    peft_flags=(False, False),
)


def _ternary(probability: Callable[[int], float], *, depends_on_dims: bool, peft_flags: tuple[bool, bool]) -> Kind:
    """Return the kind whose entries are +1, and as often -1, with a probability that ``spec.min_dim`` may determine."""

    def draw_portable(spec: BasisSpec, max_dim: int, min_dim: int) -> Matrices:
        share = probability(spec.min_dim)
        signs = partial(portable_signs, probability=share)
        return portable_draw(spec, max_dim, min_dim, to_values=signs, scale=1 / math.sqrt(2 * share))

    draw_signs = partial(torch_signs, probability=probability)
    return replace(
        DENSE,
        draws={"torch": partial(torch_draw, draw_matrix=draw_signs), "portable": draw_portable},
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


def default_blocks(r: int, sides: Collection[int]) -> tuple[int, int]:
    """Return ``(c, b)`` for a rank, given the smaller sides of its layers.

    A column of A keeps at least 8 entries, as does a row of layers with one basis, and B has at most 8 blocks. Among
    the choices that leave no entry of an update always zero, this is the one with the smallest ``1/c + 2/b`` (B counts
    twice because it is larger), and among equals the one with more blocks in A.
    """
    divisors = [size for size in range(1, r + 1) if r % size == 0]
    counts = {count_bases(side, r) for side in sides}
    entries = min(sides) if counts == {1} else r
    pairs = [
        (c, b)
        for c in divisors
        if c == 1 or entries // c >= SMALLEST_BLOCK_COLUMN
        for b in divisors
        if b <= MOST_BLOCKS_IN_B and all(reach_all((c, b), num_bases) for num_bases in counts)
    ]
    return min(reversed(pairs), key=lambda blocks: r // blocks[0] + 2 * r // blocks[1])


TOKENS = 2048  # those of a step, for each matrix, for which the work of bases is compared
TOO_SMALL = 256 * 256  # entries of the largest weight of which steps take as long with either kind, whatever their work


def block_share(layers: Mapping[tuple[int, int, int], int]) -> float:
    """Return the share of the work of dense bases that block bases take in a step, given counts by ``(in, out, r)``."""
    smaller: dict[int, set[int]] = {}
    for *sides, r in layers:
        smaller.setdefault(r, set()).add(min(sides))
    blocks = {r: default_blocks(r, own) for r, own in smaller.items()}
    work = {"dense": 0.0, "block": 0.0}
    for (into, out, r), count in layers.items():
        hidden = r * count_bases(min(into, out), r)
        c, b = (1, 1) if into * out <= TOO_SMALL else blocks[r]
        for kind, shares in (("dense", (1.0, 1.0, 1.0)), ("block", (1 / c, 1 / b, 1 / (c * b)))):
            work[kind] += count * multiply_adds(TOKENS, into, out, hidden, shares)
    return work["block"] / work["dense"] if layers else 1.0


def block_parts(max_dim: int, min_dim: int, r: int, blocks: tuple[int, int]) -> list[tuple[int, int]]:
    """Return ``(rows, columns)`` of each submatrix in which an update may be nonzero; see also `reach_all`."""
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
    in_blocks = tuple((start // c, math.ceil(stop / c)) for start, stop in columns)
    padded = tuple((start, start + math.ceil((stop - start) / b) * b) for start, stop in rows)
    A = take_spans(basis_A, in_blocks, 1).unflatten(0, (-1, c)).transpose(0, 1).contiguous()
    B = take_spans(basis_B, padded, 0)[:, : num_bases * spec.r // b].unflatten(0, (-1, b)).transpose(0, 1)
    pair = BlockPair(A, B, num_bases, entries_of(rows), entries_of(columns), (c, b, spec.r // c))
    if pair.max_dim * pair.min_dim <= SMALL_WEIGHT:
        pair.written = pair.write_out()
    return pair


def _begin_with_blocks(spans: Spans, blocks: int) -> bool:
    """Whether each span begins where blocks begin, and still does with the spans one after the other."""
    return not any(start % blocks for start, _ in spans) and not any(stop % blocks for _, stop in spans[:-1])


def _without_blocks(spec: BasisSpec, basis_A: Tensor, basis_B: Tensor, num_bases: int, sides: Sides) -> Pair:
    """Return a dense pair, copied out of the blocks up to its end, of which no view is kept."""
    rows, columns = sides
    pair = _sliced(spec, basis_A, basis_B, num_bases, Sides(all_of(rows[-1][1]), all_of(columns[-1][1])))
    assert isinstance(pair, BlockPair), "it begins with blocks"
    written = pair.written or pair.write_out()
    return DensePair(take_spans(written.A, columns, -1).contiguous(), take_spans(written.B, rows, 0).clone())


KINDS["block"] = replace(
    DENSE,
    draws={"portable": DENSE.draws["portable"]},
    expected_rank=lambda spec, max_dim, min_dim: sum(
        min(part) for part in block_parts(max_dim, min_dim, spec.r, spec.blocks or (1, 1))
    ),
    sliced=_sliced,
    default_blocks=default_blocks,
    peft_flags=None,
)

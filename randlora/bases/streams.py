"""The streams: how numbers are drawn from a seed, in chunks of rows to bound memory.

``stream="portable"``: the same bits on every machine, thread count, torch version and chunking. The numbers come from
NumPy's ``Philox``, a counter-based generator whose raw stream NumPy guarantees. Every row of a basis has its own
counter range, read from the start, so a longer row begins with the shorter one, and adding rows changes no other row.
Each 32-bit lane gives one entry, by integer comparisons or exact IEEE 754 float32 operations.

``stream="torch"`` and ``"torch-2.11"``: the draws of PEFT 0.21.2, bit for bit, from torch's CPU generator.
PEFT draws A and then B for the largest dims of all targets, and divides each by its standard deviation. The draws here
are the same, but made in chunks of which only the part that layers use is kept.

PEFT draws ``dense`` in bfloat16. For this dtype torch 2.12.0 changed what a seed gives: almost every entry differs
from 2.11 and older, and the bits now also depend on whether the CPU multiplies and adds in one rounding. The numbers
that torch draws in float32, 24 random bits each, are the same in every version and on every CPU. Both streams are
computed from them here, and depend on neither: ``torch`` is what 2.12 and newer draw on a CPU with fused multiply-add
(all in use have it), ``torch-2.11`` what older versions drew. The ternary kinds are drawn in float32: one stream.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from randlora.bases.spec import KINDS, BasisSpec, CompactMatrix, Matrices, count_bases
from randlora.errors import ConfigError

VERSION = 1
PORTABLE_CHUNK = 2**20
INDEX_A, INDEX_B = 0, 1

Lanes = NDArray[np.uint32]
Values = NDArray[np.generic]
TORCH_CHUNK = 2**17  # which a core's cache holds

Sizes = tuple[int, int, int]


def portable_draw(
    spec: BasisSpec, max_dim: int, min_dim: int, *, to_values: Callable[[Lanes, int], Values], scale: float = 1.0
) -> Matrices:
    """Draw the part of the bases that layers of the given dims use, in chunks of rows to bound memory.

    The dims of the spec do not matter. ``to_values`` computes the stored values from lanes and the number of blocks:
    `portable_uniform` or `portable_signs`.
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
    return draw_matrix(INDEX_A, spec.r, min_dim, c), draw_matrix(INDEX_B, max_dim, columns_B, b)


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
    """Return uniform numbers, scaled so that a matrix with one of them in ``stride`` entries has a mean square of 1.

    A lane's upper 24 bits are mapped to the odd multiples of 2**-24 in (-1, 1), all exact in float32.
    """
    odd = (lanes >> np.uint32(8)).astype(np.int32) * 2 + 1 - 2**24
    return odd.astype(np.float32) * np.float32(2.0**-24) * np.float32(math.sqrt(3 * stride))


def torch_draw(spec: BasisSpec, max_dim: int, min_dim: int, *, draw_matrix: Callable[..., CompactMatrix]) -> Matrices:
    """Draw the bases of a spec, and keep the part that layers of the given dims use.

    ``draw_matrix``, which is `torch_uniform` or `torch_signs`, raises an error if all entries are equal.
    """
    generator = torch.Generator("cpu").manual_seed(spec.seed)
    num_bases = count_bases(min_dim, spec.r)
    basis_A = draw_matrix(spec, generator, (spec.r, 1, spec.min_dim), (spec.r, 1, min_dim))
    basis_B = draw_matrix(spec, generator, (spec.max_dim, spec.num_bases, spec.r), (max_dim, num_bases, spec.r))
    return basis_A, basis_B


def _deviation(spec: BasisSpec, count: int, total: float, squares: float) -> float:
    """Return the standard deviation of numbers from their count, sum and sum of squares: from integers, exactly."""
    variance = (count * squares - total * total) / (count * (count - 1)) if count > 1 else 0.0
    if variance <= 0:
        raise ConfigError(f"{spec} have a standard deviation of 0: use basis='dense', a larger r or a different seed")
    return math.sqrt(variance)


def since_2_12(numbers: Tensor, high: float) -> Tensor:
    """Return the bfloat16 numbers that torch 2.12 and newer draw in [-high, high), from float32 numbers in [0, 1).

    torch computes ``u * (high - low) + low`` in float32. Because ``low`` is ``-high``, this is ``high * (2u - 1)``, and
    only the product is rounded.
    """
    drawn = numbers.mul_(2).sub_(1).mul_(high).to(torch.bfloat16)
    highest = torch.tensor(high, dtype=torch.bfloat16, device="cpu")
    return drawn.masked_fill_(drawn == highest, -highest.item())  # which the interval leaves out


def until_2_11(numbers: Tensor, high: float) -> Tensor:
    """Return the bfloat16 numbers that torch 2.11 and older drew, from float32 numbers in [0, 1).

    torch kept the low 8 of the 24 random bits, and rounded ``high`` to bfloat16 first. All but the last step is exact.
    """
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
    """Draw Kaiming-uniform numbers (a = √5) as PEFT does: ``shape[1]`` draws of ``(rows, 1, width)``.

    ``rounded`` is `since_2_12` or `until_2_11`. The deviation is summed in float64, so that the order of summation does
    not show in the bfloat16 number that the entries are divided by.
    """
    rows, draws, width = shape
    high = math.sqrt(3.0) * (math.sqrt(2 / 6) / math.sqrt(width))  # rounded as in `torch.nn.init.kaiming_uniform_`
    kept = torch.empty(keep, dtype=torch.bfloat16, device="cpu")
    total = squares = 0.0
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

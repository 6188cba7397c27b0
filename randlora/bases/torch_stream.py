"""``stream="torch"`` and ``"torch-2.11"``: the draws of PEFT 0.21.2, bit for bit, from torch's CPU generator.

PEFT draws A and then B for the largest dims of all targets, and divides each by its standard deviation. The draws here
are the same, but made in chunks of which only the part that layers use is kept.

PEFT draws ``dense`` in bfloat16, and there torch 2.12.0 changed what a seed gives: almost every entry is another under
2.11 and older, and since then the bits also depend on whether the CPU adds and multiplies in one rounding. The numbers
that torch draws in float32, 24 random bits each, are the same in every version and on every CPU. So both are computed
from those here, and depend on neither: ``torch`` is what 2.12 and newer draw on every CPU that fuses, as all in use do,
and ``torch-2.11`` is what older ones drew. The ternary kinds are drawn in float32 and have one stream.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from randlora.bases.compact import CompactMatrix, Matrices
from randlora.bases.spec import BasisSpec, count_bases
from randlora.errors import ConfigError

CHUNK_ENTRIES = 2**17  # which a core's cache holds

Sizes = tuple[int, int, int]


def draw(spec: BasisSpec, max_dim: int, min_dim: int, *, draw_matrix: Callable[..., CompactMatrix]) -> Matrices:
    """Draw the bases of a spec, with `uniform` or `signs`, and keep the part that layers of the given dims use.

    It is an error if all entries of a basis are equal, so that its standard deviation is zero.
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
        raise ConfigError(f"{spec} have a standard deviation of 0: use basis='dense', a larger r or another seed")
    return math.sqrt(variance)


def since_2_12(numbers: Tensor, high: float) -> Tensor:
    """Return the bfloat16 numbers that torch 2.12 and newer draw in [-high, high), in place of float32 ones in [0, 1).

    They compute ``u * (high - low) + low`` in float32. As ``low`` is ``-high``, that is ``high * (2u - 1)``, of which
    only the product is rounded.
    """
    drawn = numbers.mul_(2).sub_(1).mul_(high).to(torch.bfloat16)
    highest = torch.tensor(high, dtype=torch.bfloat16, device="cpu")
    return drawn.masked_fill_(drawn == highest, -highest.item())  # which the interval leaves out


def until_2_11(numbers: Tensor, high: float) -> Tensor:
    """Return the bfloat16 numbers that torch 2.11 and older drew, in place of float32 ones in [0, 1).

    They kept the low 8 of the 24 random bits, and rounded ``high`` to bfloat16 first. All but the last step is exact.
    """
    highest = torch.tensor(high, dtype=torch.bfloat16, device="cpu").item()
    return numbers.mul_(2**16).frac_().mul_(2).sub_(1).mul_(highest).to(torch.bfloat16)


def uniform(
    spec: BasisSpec,
    generator: torch.Generator,
    shape: Sizes,
    keep: Sizes,
    *,
    rounded: Callable[[Tensor, float], Tensor],
) -> CompactMatrix:
    """Draw Kaiming-uniform numbers (a = √5) as PEFT does: ``shape[1]`` draws of ``(rows, 1, width)``.

    ``rounded`` is `since_2_12` or `until_2_11`. The deviation is summed in float64, whose order of summation does not
    show in the bfloat16 number that the entries are divided by.
    """
    rows, draws, width = shape
    high = math.sqrt(3.0) * (math.sqrt(2 / 6) / math.sqrt(width))  # rounded as in `torch.nn.init.kaiming_uniform_`
    kept = torch.empty(keep, dtype=torch.bfloat16, device="cpu")
    total = squares = 0.0
    step = max(1, CHUNK_ENTRIES // width)
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


def signs(
    spec: BasisSpec, generator: torch.Generator, shape: Sizes, keep: Sizes, *, probability: Callable[[int], float]
) -> CompactMatrix:
    """Draw 1 and -1 with a probability each, else 0, in the order of a single draw of the whole shape."""
    kept = torch.empty(keep, dtype=torch.int8, device="cpu")
    share = probability(spec.min_dim)
    total = count_nonzero = 0
    step = max(1, CHUNK_ENTRIES // (shape[1] * shape[2]))
    for start in range(0, shape[0], step):
        chunk = min(step, shape[0] - start), *shape[1:]
        numbers = torch.rand(chunk, generator=generator, dtype=torch.float32, device="cpu")
        drawn = (numbers > 1 - share).to(torch.int8) - (numbers < share).to(torch.int8)
        total, count_nonzero = total + int(drawn.sum()), count_nonzero + int(drawn.count_nonzero())
        kept[start : start + step] = drawn[: max(0, keep[0] - start), : keep[1], : keep[2]]
    deviation = _deviation(spec, math.prod(shape), total, count_nonzero)
    scale = 1 / torch.tensor(deviation, dtype=torch.float64, device="cpu").to(torch.float32)
    return CompactMatrix(kept.flatten(start_dim=1), keep[1] * keep[2], scale.item())

"""``stream="torch"``: the draws of PEFT 0.21.2, bit for bit, from torch's CPU generator.

PEFT draws A and then B for the largest dims of all targets, and divides each by its standard deviation. The draws here
are the same, but made in chunks of rows of which only the part that layers use is kept. The deviation is summed in
float64, so that it does not depend on the number of threads. ``dense`` is always drawn in bfloat16; PEFT does so if the
hardware supports it.
"""

import math
from collections.abc import Callable

import torch

from randlora.bases.compact import CompactMatrix, Matrices
from randlora.bases.spec import BasisSpec, count_bases
from randlora.errors import ConfigError

CHUNK_ENTRIES = 2**22

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


def _deviation(spec: BasisSpec, sums: list[tuple[int, float, float]]) -> float:
    """Return the standard deviation of numbers, given the count, sum and sum of squares of each chunk of them."""
    count, total, squares = 0, 0.0, 0.0
    for chunk in sums:  # not by sum(), whose rounding depends on the version of Python
        count, total, squares = count + chunk[0], total + chunk[1], squares + chunk[2]
    variance = (squares - total**2 / count) / (count - 1) if count > 1 else 0.0
    if variance <= 0:
        raise ConfigError(f"{spec} have a standard deviation of 0: use basis='dense', a larger r or another seed")
    return math.sqrt(variance)


def uniform(spec: BasisSpec, generator: torch.Generator, shape: Sizes, keep: Sizes) -> CompactMatrix:
    """Draw Kaiming-uniform numbers as PEFT does: ``shape[1]`` draws of ``(rows, 1, width)``."""
    rows, draws, width = shape
    kept = torch.empty(keep, dtype=torch.bfloat16, device="cpu")
    sums = []
    for index in range(draws):
        chunk = torch.empty((rows, 1, width), dtype=torch.bfloat16, device="cpu")
        torch.nn.init.kaiming_uniform_(chunk, a=math.sqrt(5), generator=generator)
        norm = torch.linalg.vector_norm(chunk, dtype=torch.float64)
        sums.append((chunk.numel(), chunk.sum(dtype=torch.float64).item(), norm.square().item()))
        if index < keep[1]:
            kept[:, index] = chunk[: keep[0], 0, : keep[2]]
    kept /= torch.tensor(_deviation(spec, sums), dtype=torch.float64, device="cpu").to(torch.bfloat16)
    return CompactMatrix(kept.flatten(start_dim=1), keep[1] * keep[2])


def signs(
    spec: BasisSpec, generator: torch.Generator, shape: Sizes, keep: Sizes, *, probability: Callable[[int], float]
) -> CompactMatrix:
    """Draw 1 and -1 with a probability each, else 0, in the order of a single draw of the whole shape."""
    kept = torch.empty(keep, dtype=torch.int8, device="cpu")
    share, sums = probability(spec.min_dim), []
    step = max(1, CHUNK_ENTRIES // (shape[1] * shape[2]))
    for start in range(0, shape[0], step):
        chunk = min(step, shape[0] - start), *shape[1:]
        numbers = torch.rand(chunk, generator=generator, dtype=torch.float32, device="cpu")
        drawn = (numbers > 1 - share).to(torch.int8) - (numbers < share).to(torch.int8)
        sums.append((drawn.numel(), drawn.sum().item(), drawn.count_nonzero().item()))
        kept[start : start + step] = drawn[: max(0, keep[0] - start), : keep[1], : keep[2]]
    scale = 1 / torch.tensor(_deviation(spec, sums), dtype=torch.float64, device="cpu").to(torch.float32)
    return CompactMatrix(kept.flatten(start_dim=1), keep[1] * keep[2], scale.item())

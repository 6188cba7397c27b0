"""``stream="torch"``: the draws of PEFT 0.21.2, bit for bit, from torch's CPU generator.

PEFT draws A and then B for the largest dims of all targets, and divides each by its standard deviation. The draws here
are the same, but made in chunks of rows of which only the part that layers use is kept. The deviation is summed in
float64, so that it does not depend on the number of threads. ``dense`` is always drawn in bfloat16; PEFT does so if the
hardware supports it.
"""

import math

import torch
from torch import Tensor

from randlora.bases.compact import CompactMatrix
from randlora.bases.spec import BasisSpec, count_bases
from randlora.errors import ConfigError

CHUNK_ENTRIES = 2**22


def draw(spec: BasisSpec, max_dim: int, min_dim: int) -> tuple[CompactMatrix, CompactMatrix]:
    """Draw the bases of ``spec`` and keep the part that layers of the given dims use.

    Args:
        spec: The spec; its stream is ``torch``.
        max_dim: Rows of B to keep, at most ``spec.max_dim``.
        min_dim: Columns of A to keep, at most ``spec.min_dim``.

    Returns:
        A, ``(r, min_dim)``, and B, ``(max_dim, num_bases·r)``.

    Raises:
        ConfigError: If all entries of a basis are equal, so that its standard deviation is zero.
    """
    generator = torch.Generator("cpu").manual_seed(spec.seed)
    num_bases = count_bases(min_dim, spec.r)
    draw_matrix = _draw_dense if spec.kind == "dense" else _draw_ternary
    basis_A = draw_matrix(spec, generator, (spec.r, 1, spec.min_dim), keep=(spec.r, 1, min_dim))
    basis_B = draw_matrix(spec, generator, (spec.max_dim, spec.num_bases, spec.r), keep=(max_dim, num_bases, spec.r))
    return basis_A, basis_B


class _Deviation:
    """The standard deviation of numbers added in chunks, from exact or float64 sums."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.squares = 0.0

    def add(self, count: int, total: Tensor, squares: Tensor) -> None:
        self.count += count
        self.total += total.item()
        self.squares += squares.item()

    def result(self, spec: BasisSpec) -> float:
        variance = (self.squares - self.total**2 / self.count) / (self.count - 1) if self.count > 1 else 0.0
        if variance <= 0:
            raise ConfigError(f"{spec} have a standard deviation of 0: use basis='dense', a larger r or another seed")
        return math.sqrt(variance)


def _draw_dense(
    spec: BasisSpec, generator: torch.Generator, shape: tuple[int, int, int], keep: tuple[int, int, int]
) -> CompactMatrix:
    """Draw Kaiming-uniform numbers as PEFT does: ``shape[1]`` draws of ``(rows, 1, width)``."""
    rows, draws, width = shape
    kept = torch.empty(keep, dtype=torch.bfloat16, device="cpu")
    deviation = _Deviation()
    for index in range(draws):
        chunk = torch.empty((rows, 1, width), dtype=torch.bfloat16, device="cpu")
        torch.nn.init.kaiming_uniform_(chunk, a=math.sqrt(5), generator=generator)
        norm = torch.linalg.vector_norm(chunk, dtype=torch.float64)
        deviation.add(chunk.numel(), chunk.sum(dtype=torch.float64), norm.square())
        if index < keep[1]:
            kept[:, index] = chunk[: keep[0], 0, : keep[2]]
    kept /= torch.tensor(deviation.result(spec), dtype=torch.float64, device="cpu").to(torch.bfloat16)
    return CompactMatrix(kept.flatten(start_dim=1), keep[1] * keep[2])


def _draw_ternary(
    spec: BasisSpec, generator: torch.Generator, shape: tuple[int, int, int], keep: tuple[int, int, int]
) -> CompactMatrix:
    """Draw -1, 0 and 1 from one uniform number per entry, in the order of a single draw of the whole shape."""
    kept = torch.empty(keep, dtype=torch.int8, device="cpu")
    deviation = _Deviation()
    step = max(1, CHUNK_ENTRIES // (shape[1] * shape[2]))
    for start in range(0, shape[0], step):
        chunk = min(step, shape[0] - start), *shape[1:]
        uniform = torch.rand(chunk, generator=generator, dtype=torch.float32, device="cpu")
        signs = (uniform > 1 - spec.probability).to(torch.int8) - (uniform < spec.probability).to(torch.int8)
        deviation.add(signs.numel(), signs.sum(), signs.count_nonzero())
        kept[start : start + step] = signs[: max(0, keep[0] - start), : keep[1], : keep[2]]
    scale = 1 / torch.tensor(deviation.result(spec), dtype=torch.float64, device="cpu").to(torch.float32)
    return CompactMatrix(kept.flatten(start_dim=1), keep[1] * keep[2], scale.item())

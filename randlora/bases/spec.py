"""The spec of one pair of bases: everything its bits depend on, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from randlora.config import BasisKind, RandLoRAConfig, Stream, is_integer
from randlora.errors import ConfigError

SMALLEST_BLOCK_COLUMN = 8  # default minimum of entries in a column of A: fits within .004 of dense bases
MOST_BLOCKS_IN_B = 8


@dataclass(frozen=True)
class BasisSpec:
    """The spec of a pair of bases. Equal specs give equal bits.

    Attributes:
        kind: ``dense``, ``sparse``, ``very_sparse`` or ``block``.
        stream: ``torch`` or ``portable``.
        seed: Seed of the stream.
        r: Rank of one basis.
        max_dim: Rows of B that are drawn, the largest dim of any target.
        min_dim: Columns of A that are drawn, ``min(largest out_features, largest in_features)``.
        blocks: ``(c, b)``, the number of blocks of A and B, for ``block``; else ``None``.
    """

    kind: BasisKind
    stream: Stream
    seed: int
    r: int
    max_dim: int
    min_dim: int
    blocks: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check the options, as `RandLoRAConfig` does, and the dims."""
        RandLoRAConfig(r=self.r, basis=self.kind, stream=self.stream, seed=self.seed, blocks=self.blocks)
        if not all(is_integer(size) and size > 0 for size in (self.max_dim, self.min_dim)):
            raise ConfigError(f"the dims of a basis must be positive integers, got {self.max_dim}x{self.min_dim}")
        if (self.blocks is None) == (self.kind == "block"):
            raise ConfigError(
                f"blocks must be given if and only if kind='block', got kind={self.kind!r}, blocks={self.blocks}"
            )

    @property
    def num_bases(self) -> int:
        """Number of bases drawn, ``ceil(min_dim / r)``."""
        return count_bases(self.min_dim, self.r)

    @property
    def family(self) -> tuple[BasisKind, Stream, int, int, tuple[int, int] | None]:
        """The fields, without the dims, that two specs must have in common to share bases."""
        return self.kind, self.stream, self.seed, self.r, self.blocks

    @property
    def is_prefix_stable(self) -> bool:
        """Whether a larger draw begins with the bits of a smaller one.

        Not for ``very_sparse``, whose density ``1 / sqrt(min_dim)`` depends on the dims.
        """
        return self.stream == "portable" and self.kind != "very_sparse"

    @property
    def probability(self) -> float:
        """Probability that a ternary entry is +1, and that it is -1: 1/6, or ``1 / (2·sqrt(min_dim))``."""
        return 1 / (2 * (math.sqrt(self.min_dim) if self.kind == "very_sparse" else 3))

    def expected_rank(self, out_features: int, in_features: int) -> int:
        """Estimate the rank of one layer's trained update.

        All terms share A, so a zero column of a ternary A is a zero column of every update. On average
        ``1 - (1 - 2·probability)**r`` of the columns are nonzero. With ``block`` bases the rank is the sum of the ranks
        of `block_parts`.
        """
        full = min(out_features, in_features)
        if self.kind == "dense":
            return full
        if self.blocks is not None:
            return sum(map(min, block_parts(max(out_features, in_features), full, self.r, self.blocks)))
        return round(full * (1 - (1 - 2 * self.probability) ** self.r))

    def nbytes(self, max_dim: int, min_dim: int) -> int:
        """Return the bytes in storage of the slices for layers of these dims."""
        c, b = self.blocks or (1, 1)
        itemsize = 2 if self.kind in ("dense", "block") else 1
        return itemsize * (self.r * math.ceil(min_dim / c) + max_dim * count_bases(min_dim, self.r) * self.r // b)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-serializable values."""
        return {**asdict(self), "blocks": None if self.blocks is None else list(self.blocks)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a spec from the result of `to_dict`. The options are checked as in `RandLoRAConfig`."""
        blocks = values["blocks"]
        return cls(**{**values, "blocks": tuple(blocks) if isinstance(blocks, list) else blocks})

    def __str__(self) -> str:
        """Return the spec on one line."""
        blocks = f", blocks={self.blocks}" if self.blocks else ""
        dims = f"{self.max_dim}x{self.min_dim}"
        return f"{self.kind} bases (stream={self.stream}, seed={self.seed}, r={self.r}, dims={dims}{blocks})"


def count_bases(min_dim: int, r: int) -> int:
    """Return the number of bases of rank r that reach rank ``min_dim``: ``ceil(min_dim / r)``."""
    return math.ceil(min_dim / r)


def block_parts(max_dim: int, min_dim: int, r: int, blocks: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the sizes of the submatrices in which an update of ``block`` bases may be nonzero.

    Entry (i, j) may be nonzero if some p, the index that pairs the columns of UB with the rows of UA, has
    ``p ≡ i (mod b)`` and ``p // num_bases ≡ j (mod c)``. With many bases there is one part, the whole matrix.

    Returns:
        ``(rows, columns)`` of each part, out of ``max_dim`` and ``min_dim``.
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


def drawn_dims(shapes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the ``(max_dim, min_dim)`` that PEFT draws for layers of these ``(out, in)`` shapes.

    They are the larger and the smaller of the largest output width and the largest input width.
    """
    widest = [max(sides) for sides in zip(*shapes, strict=True)]
    return max(widest), min(widest)


def sliced_dims(shapes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the ``(max_dim, min_dim)`` that layers slice: the maxima of their larger and of their smaller dims."""
    shapes = list(shapes)
    return max(map(max, shapes)), max(map(min, shapes))


def spec_for(config: RandLoRAConfig, max_dim: int, min_dim: int) -> BasisSpec:
    """Return the spec of the bases of a config for targets of these dims."""
    stream = config.stream or ("portable" if config.basis == "block" else "torch")
    blocks = (config.blocks or default_blocks(config.r)) if config.basis == "block" else None
    return BasisSpec(config.basis, stream, config.seed, config.r, max_dim, min_dim, blocks)


def default_blocks(r: int) -> tuple[int, int]:
    """Return ``(c, b)`` for a rank: the most blocks of A with 8 entries in a column, and at most 8 blocks of B."""
    divisors = [size for size in range(1, r + 1) if r % size == 0]
    c = max((size for size in divisors if r // size >= SMALLEST_BLOCK_COLUMN), default=1)
    b = max(size for size in divisors if size <= MOST_BLOCKS_IN_B)
    return c, b

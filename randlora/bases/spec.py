"""The spec of a pair of bases, on which all its bits depend, the registry of kinds, and the compact storage."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from randlora.config import BasisKind, RandLoRAConfig, Stream, Train
from randlora.errors import ConfigError
from randlora.functional import Pair
from randlora.functional.region import Sides

Shape = tuple[int, ...]
"""Shape of an update: ``(out_features, in_features)``, with the number of matrices before it for a stack of them."""


@dataclass(frozen=True)
class Kind:
    """A kind of bases, as the library needs to know it. Each is registered in `KINDS` under its name."""

    draws: Mapping[Stream, Callable[[BasisSpec, int, int], Matrices]]  # of a max_dim and a min_dim; the default first
    dtype: torch.dtype  # of the stored values
    expected_rank: Callable[[BasisSpec, int, int], int]  # of the trained update of a layer of a max_dim and a min_dim
    sliced: Callable[[BasisSpec, Tensor, Tensor, int, Sides], Pair]  # of working copies, for a part of num_bases bases
    peft_flags: tuple[bool, bool] | None  # PEFT's ``(sparse, very_sparse)``; ``None`` if PEFT does not have the kind
    # ``(c, b)`` for a rank and the smaller sides of its layers; ``None`` without blocks
    default_blocks: Callable[[int, Collection[int]], tuple[int, int] | None] = lambda _r, _sides: None
    depends_on_dims: bool = False  # whether every entry depends on the dims of the spec, whatever the stream


KINDS: dict[BasisKind, Kind] = {}

PEFT_STREAMS: tuple[Stream, ...] = ("torch", "torch-2.11")
"""What PEFT draws from a seed: now, and for ``dense`` under torch 2.11 and older. PEFT's files do not say which."""


@dataclass(frozen=True)
class BasisSpec:
    """The spec of a pair of bases. Equal specs give equal bits.

    Attributes:
        r: Rank of one basis.
        max_dim: Rows of B that are drawn, the largest dim of any target.
        min_dim: Columns of A that are drawn, ``min(largest out_features, largest in_features)``.
        blocks: ``(c, b)``, the number of blocks of A and B, if the kind has blocks; else ``None``.
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
        if not all(type(size) is int and size > 0 for size in (self.max_dim, self.min_dim)):
            raise ConfigError(f"the dims of a basis must be positive integers, got {self.max_dim}x{self.min_dim}")
        kind = KINDS[self.kind]
        if self.stream not in kind.draws:
            raise ConfigError(f"{self.kind} bases need stream={' or '.join(kind.draws)}, got stream={self.stream!r}")
        if (self.blocks is None) != (kind.default_blocks(self.r, ()) is None):
            raise ConfigError(f"{self.kind} bases need blocks, got blocks={self.blocks}")

    @property
    def num_bases(self) -> int:
        """Number of bases drawn, ``ceil(min_dim / r)``."""
        return count_bases(self.min_dim, self.r)

    @property
    def family(self) -> tuple[BasisKind, Stream, int, int, tuple[int, int] | None]:
        """The fields (all but the dims) in which two specs must agree to share bases."""
        return self.kind, self.stream, self.seed, self.r, self.blocks

    @property
    def is_prefix_stable(self) -> bool:
        """Whether a larger draw begins with the bits of a smaller one."""
        return self.stream == "portable" and not KINDS[self.kind].depends_on_dims

    def is_of(self, config: RandLoRAConfig, r: int) -> bool:
        """Whether bases of rank r may have this spec under a config. A config without blocks allows any blocks."""
        asked = config.basis, config.stream or default_stream(config.basis), config.seed, r
        return (self.kind, self.stream, self.seed, self.r) == asked and config.blocks in (None, self.blocks)

    def expected_rank(self, out_features: int, in_features: int) -> int:
        """Return the estimated rank of one layer's trained update."""
        dims = max(out_features, in_features), min(out_features, in_features)
        return KINDS[self.kind].expected_rank(self, *dims)

    def nbytes(self, max_dim: int, min_dim: int) -> int:
        """Return the bytes in storage of the slices for layers of these dims."""
        c, b = self.blocks or (1, 1)
        entries = self.r * math.ceil(min_dim / c) + max_dim * count_bases(min_dim, self.r) * self.r // b
        return KINDS[self.kind].dtype.itemsize * entries

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-serializable values."""
        return {**asdict(self), "blocks": None if self.blocks is None else list(self.blocks)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a spec from the result of `to_dict`. The options are checked as in `RandLoRAConfig`."""
        blocks = values["blocks"]
        return cls(**{**values, "blocks": tuple(blocks) if isinstance(blocks, list) else blocks})

    def __str__(self) -> str:
        blocks = f", blocks={self.blocks}" if self.blocks else ""
        sizes = f"r={self.r}, dims={self.max_dim}x{self.min_dim}{blocks}"
        return f"{self.kind} bases (stream={self.stream}, seed={self.seed}, {sizes})"


def count_bases(min_dim: int, r: int) -> int:
    """Return the number of bases of rank r that reach rank ``min_dim``: ``ceil(min_dim / r)``."""
    return math.ceil(min_dim / r)


def reach_all(blocks: tuple[int, int], num_bases: int) -> bool:
    """Whether blocks ``(c, b)`` leave no entry of an update with this number of bases always zero.

    Entry (i, j) needs an index p of columns of UB and rows of UA with ``p ≡ i (mod b)`` and ``p // num_bases ≡ j (mod
    c)``. The latter are runs of num_bases numbers, which reach all classes mod b if, mod b, they start as close.
    """
    c, b = blocks
    return math.gcd(c * num_bases, b) <= num_bases


def count_trainable(shape: Shape, r: int, train: Train = "both") -> int:
    """Return how many numbers a weight trains: ``num_bases·(r + min_dim)`` for each matrix, or ``num_bases·r``."""
    min_dim = min(shape[-2:])
    return math.prod(shape[:-2]) * count_bases(min_dim, r) * (r + min_dim * (train == "both"))


def default_stream(kind: BasisKind) -> Stream:
    """Return the stream of a kind if a config gives none."""
    return next(iter(KINDS[kind].draws))


def peft_streams(kind: BasisKind) -> tuple[Stream, ...]:
    """Return the streams of PEFT that a kind has."""
    return tuple(stream for stream in PEFT_STREAMS if stream in KINDS[kind].draws)


def drawn_dims(shapes: Iterable[Shape]) -> tuple[int, int]:
    """Return the larger and the smaller of the largest output and input widths: what PEFT draws for these layers."""
    widest = [max(sides) for sides in zip(*(shape[-2:] for shape in shapes), strict=True)]
    return max(widest), min(widest)


def sliced_dims(shapes: Iterable[Shape]) -> tuple[int, int]:
    """Return the ``(max_dim, min_dim)`` that layers slice: the maxima of their larger and of their smaller dims."""
    matrices = [shape[-2:] for shape in shapes]
    return max(map(max, matrices)), max(map(min, matrices))


def spec_for(config: RandLoRAConfig, r: int, shapes: Collection[Shape]) -> BasisSpec:
    """Return the spec of the bases of rank r of a config, for layers of these shapes."""
    blocks = config.blocks or KINDS[config.basis].default_blocks(r, {min(shape[-2:]) for shape in shapes})
    stream = config.stream or default_stream(config.basis)
    return BasisSpec(config.basis, stream, config.seed, r, *drawn_dims(shapes), blocks)


CHUNK_ROWS = 256


@dataclass(frozen=True)
class CompactMatrix:
    """A stored random matrix.

    Entry ``(i, j)`` is zero unless ``i ≡ j (mod stride)``; there it is ``scale · values[i, j // stride]``. ``values``
    is ``(rows, ceil(columns / stride))``, in bfloat16 for a dense kind and in int8 for a ternary one.
    """

    values: Tensor
    columns: int
    scale: float = 1.0
    stride: int = 1

    def to_dense(self, *, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """Return the dense matrix, ``(rows, columns)``, which is exact in float32 and wider."""
        values = self.values.to(device=device, dtype=dtype)
        if self.scale != 1.0:
            values = values * self.scale
        if self.stride == 1:
            return values
        dense = torch.zeros(len(values), self.columns, dtype=dtype, device=device)
        for block in range(self.stride):
            length = math.ceil((self.columns - block) / self.stride)
            dense[block :: self.stride, block :: self.stride] = values[block :: self.stride, :length]
        return dense

    def dense_chunks(self, rows: int) -> Iterator[Tensor]:
        """Yield the first rows in dense float32 chunks on the CPU, so that memory never holds all of them."""
        step = CHUNK_ROWS * self.stride  # a chunk must start at a multiple of the stride
        for start in range(0, rows, step):
            part = replace(self, values=self.values[start : min(start + step, rows)])
            yield part.to_dense(device="cpu", dtype=torch.float32)

    @classmethod
    def from_dense(cls, matrix: Tensor) -> CompactMatrix:
        """Build a compact matrix from a dense one, ``(rows, columns)``, in the smallest dtype that is lossless."""
        scale = max(abs(bound.item()) for bound in matrix.aminmax())
        parts = matrix.split(CHUNK_ROWS)
        if all(torch.equal(part.sign() * scale, part) for part in parts):
            return cls(torch.cat([part.sign().to(torch.int8) for part in parts]), matrix.shape[1], scale)
        is_brief = all(torch.equal(part.to(torch.bfloat16).to(matrix.dtype), part) for part in parts)
        return cls(matrix.to(torch.bfloat16) if is_brief else matrix, matrix.shape[1])


Matrices = tuple[CompactMatrix, CompactMatrix]  # A, `(r, min_dim)`, and B, `(max_dim, num_bases·r)`

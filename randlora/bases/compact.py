"""Compact storage of a basis: a small dtype, and no entries for the zeros of ``block`` bases."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHUNK_ROWS = 256


@dataclass(frozen=True)
class CompactMatrix:
    """A stored random matrix.

    Entry ``(i, j)`` is zero unless ``i ≡ j (mod stride)``; there it is ``scale · values[i, j // stride]``. ``values``
    is ``(rows, ceil(columns / stride))``, in bfloat16 for a dense kind and in int8 for a ternary one, whose ``scale``
    is a float32 number. With ``stride`` 1 every entry is stored. The first rows and columns are a matrix of the same
    form.
    """

    values: Tensor
    columns: int
    scale: float = 1.0
    stride: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of the stored values."""
        return self.values.numel() * self.values.element_size()

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

    def column_squares(self, rows: int) -> Tensor:
        """Return the sums of the squares of the columns of the first rows, in float64 on the CPU."""
        sums = torch.zeros(self.columns, dtype=torch.float64, device="cpu")
        for block in range(self.stride):
            own = sums[block :: self.stride]
            for chunk in self.values[block : rows : self.stride, : len(own)].split(CHUNK_ROWS):
                own += torch.linalg.vector_norm(chunk.to(torch.float32), dim=0, dtype=torch.float64).square()
        return sums * self.scale**2

    @classmethod
    def from_dense(cls, matrix: Tensor) -> CompactMatrix:
        """Build a compact matrix from a dense one, ``(rows, columns)``, in the smallest dtype that is lossless."""
        scale = max(abs(bound.item()) for bound in matrix.aminmax())
        parts = matrix.split(CHUNK_ROWS)
        if all(torch.equal(part.sign() * scale, part) for part in parts):
            return cls(torch.cat([part.sign().to(torch.int8) for part in parts]), matrix.shape[1], scale)
        is_brief = all(torch.equal(part.to(torch.bfloat16).to(matrix.dtype), part) for part in parts)
        return cls(matrix.to(torch.bfloat16) if is_brief else matrix, matrix.shape[1])


Matrices = tuple[CompactMatrix, CompactMatrix]
"""A, ``(r, min_dim)``, and B, ``(max_dim, num_bases·r)``."""

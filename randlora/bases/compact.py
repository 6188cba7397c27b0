"""How a basis is kept: a matrix of small numbers whose zeros, where their place is known, are not stored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHUNK_ROWS = 256


@dataclass(frozen=True)
class CompactMatrix:
    """A random matrix in storage.

    Entry ``(i, j)`` is zero unless ``i ≡ j (mod stride)``; there it is ``scale · values[i, j // stride]``. With
    ``stride`` 1 every entry is stored. Any prefix of rows and columns is a matrix of the same form.

    Attributes:
        values: ``(rows, ceil(columns / stride))``, bfloat16 for a dense kind, int8 for a ternary one.
        columns: Columns of the whole matrix.
        scale: Factor of the values; a ternary basis has one, a float32 number.
        stride: How many blocks the matrix has.
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
        """Write the matrix out, ``(rows, columns)``.

        Args:
            device: Where the result lives.
            dtype: A floating dtype; exact in float32 and wider.
        """
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
        """Write the first rows out in float32 on the CPU, some at a time, so that they are never whole in memory.

        Args:
            rows: How many.
        """
        step = CHUNK_ROWS * self.stride  # a chunk that starts at a multiple of the stride has the same form
        for start in range(0, rows, step):
            part = replace(self, values=self.values[start : min(start + step, rows)])
            yield part.to_dense(device="cpu", dtype=torch.float32)

    @classmethod
    def from_dense(cls, matrix: Tensor) -> CompactMatrix:
        """Keep a matrix that a file holds, in the smallest form that loses no bit.

        Args:
            matrix: ``(rows, columns)``, any floating dtype. It is kept itself where no smaller form holds it.
        """
        scale = max(abs(bound.item()) for bound in matrix.aminmax())
        parts = matrix.split(CHUNK_ROWS)
        if all(torch.equal(part.sign() * scale, part) for part in parts):
            return cls(torch.cat([part.sign().to(torch.int8) for part in parts]), matrix.shape[1], scale)
        is_brief = all(torch.equal(part.to(torch.bfloat16).to(matrix.dtype), part) for part in parts)
        return cls(matrix.to(torch.bfloat16) if is_brief else matrix, matrix.shape[1])

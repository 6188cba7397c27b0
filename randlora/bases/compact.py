"""How a basis is kept: a matrix of small numbers whose zeros, where their place is known, are not stored."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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

    @classmethod
    def from_dense(cls, matrix: Tensor) -> CompactMatrix:
        """Keep a matrix that a file holds, in the smallest form that loses no bit.

        Args:
            matrix: ``(rows, columns)``, any floating dtype.
        """
        scale = matrix.abs().max().item()
        signs = matrix.sign().to(torch.int8)
        if torch.equal(signs.to(matrix.dtype) * scale, matrix):
            return cls(signs, matrix.shape[1], scale)
        brief = matrix.to(torch.bfloat16)
        return cls(brief if torch.equal(brief.to(matrix.dtype), matrix) else matrix, matrix.shape[1])

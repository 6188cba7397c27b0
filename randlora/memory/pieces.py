"""What of each update a device computes, on which the part of the bases that it holds depends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from randlora.functional.region import Region, all_of, entries_of
from randlora.memory.parts import part_of


class Piece(NamedTuple):
    """A matrix of an update, or the part of one that a device computes.

    Attributes:
        shape: ``(out_features, in_features)`` of the whole matrix.
        r: The rank of one basis.
        tokens: The rows of the input.
        region: The part; ``None`` for all of it.
    """

    shape: tuple[int, int]
    r: int
    tokens: int
    region: Region | None = None

    @property
    def is_wide(self) -> bool:
        """Whether the input of the whole matrix has ``min_dim`` features."""
        return self.shape[1] <= self.shape[0]

    @property
    def extent(self) -> tuple[int, int]:
        """The sides of the part."""
        if self.region is None:
            return self.shape
        return entries_of(self.region.rows), entries_of(self.region.columns)

    def split(self, dim: int | None, devices: int, index: int, blocks: tuple[int, int]) -> Piece:
        """Return the part of a device, at the first place of the matrix that needs as much of the bases.

        Args:
            dim: The dimension that is split; ``None`` for none.
            devices: The number of devices.
            index: Which of them.
            blocks: ``(c, b)`` of the bases.
        """
        if dim is None:
            return self
        start, stop = part_of(self.shape[dim], devices, index)
        c, b = blocks
        block = b if (dim == 0) is self.is_wide else c  # rows of B, or columns of A
        rows, columns = map(all_of, self.shape)
        part = ((start % block, start % block + stop - start),)
        return self._replace(region=Region(part, columns) if dim == 0 else Region(rows, part))


def pieces_by_device(
    matrices: Iterable[tuple[Piece, int | None]], devices: int, blocks: Callable[[int], tuple[int, int]]
) -> frozenset[frozenset[Piece]]:
    """Return what devices compute of some matrices, once for all devices that need as much of the bases.

    Args:
        matrices: The whole matrices, each with the dimension that is split, or ``None``.
        devices: The number of devices.
        blocks: Gives ``(c, b)`` of the bases of a rank.
    """
    return frozenset(
        frozenset(
            part
            for piece, dim in matrices
            if all((part := piece.split(dim, devices, index, blocks(piece.r))).extent)  # else it has nothing of it
        )
        for index in range(devices)
    )

"""Products with ``block`` bases: a few small dense ones in place of one that is mostly zeros.

A is zero but where ``k ≡ j (mod c)``, B but where ``i ≡ p (mod b)``: block diagonal up to a stride permutation, the
factors of Monarch matrices (Dao et al., ICML 2022). So a product of tokens with either deals their columns out
(`split`), multiplies block by block, and gathers the columns of the result (`join`). The update is a grid of b·c dense
tiles in the same way. Sides that a stride does not divide are filled up with zeros, which change no sum, and cut off
again.

A matrix product wants its sides dense in memory, so this is what is copied beside the products. Through both factors:
the tokens once, dealt out; the hidden vectors twice, from the order of one basis to that of the other by way of p; the
result once, gathered, and read again to be added. Hidden vectors could go in a single copy where b divides num_bases,
but one over five axes took 1.4 to 2.9 times as long as the two over three on a CPU. Backward uses one copy of the
hidden vectors for both gradients. To form the sum of weight and update: the weight once, dealt out to tiles that the
products are added to, and the sum once, gathered; tokens are not copied at all.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.functional import scratch
from randlora.functional.diagonals import join, split


class BlockPair(NamedTuple):
    """A pair of block bases; the products are those of `DensePair`.

    Attributes:
        A: ``(c, r/c, ceil(min_dim / c))``.
        B: ``(b, ceil(max_dim / b), r·num_bases/b)``; its dtype is the one computed in.
        num_bases: Terms of the update; it tells p, the index that pairs the rows of UA with the columns of UB.
        max_dim: The layer's large side.
        min_dim: The layer's small side.
    """

    A: Tensor
    B: Tensor
    num_bases: int
    max_dim: int
    min_dim: int

    @property
    def shares(self) -> tuple[float, float, float]:
        """Arithmetic of a product with UA, with UB and of both, as shares of what dense ones take."""
        c, b = len(self.A), len(self.B)
        return 1 / c, 1 / b, 1 / (c * self._tile_rows)

    def small_to_hidden(self, small: Tensor, scaled_A: Tensor) -> Tensor:
        """Multiply ``(tokens, min_dim)`` by ``UA.T``: ``(c, tokens, r/c·num_bases)``."""
        return torch.bmm(split(small, len(scaled_A)), scaled_A.mT)

    def hidden_to_small(self, hidden: Tensor, scaled_A: Tensor, onto: Tensor | None = None) -> Tensor:
        """Multiply hidden vectors by ``UA``, added to ``onto``, ``(tokens, min_dim)``, whose memory is used up."""
        small = join(torch.bmm(hidden, scaled_A), self.min_dim)
        return small if onto is None else scratch.plus(onto, small)

    def large_to_hidden(self, large: Tensor) -> Tensor:
        """Multiply ``(tokens, max_dim)`` by ``UB``: ``(c, tokens, r/c·num_bases)``."""
        return self._by_block_of_A(torch.bmm(split(large, len(self.B)), self.B))

    def hidden_to_large(self, hidden: Tensor, onto: Tensor | None = None) -> Tensor:
        """Multiply hidden vectors by ``UB.T``, added to ``onto``, ``(tokens, max_dim)``, whose memory is used up."""
        large = join(torch.bmm(self._by_block_of_B(hidden), self.B.mT), self.max_dim)
        return large if onto is None else scratch.plus(onto, large)

    def grad_from_tokens(self, hidden: Tensor, small: Tensor) -> Tensor:
        """Return what ``hidden.T @ small`` has in the blocks of ``UA``, in the shape of ``scaled_A``."""
        return torch.bmm(hidden.mT, split(small, len(self.A)))

    def grad_from_update(self, grad: Tensor) -> Tensor:
        """Lead the gradient of the update, ``(max_dim, min_dim)``, on to ``UA``, in the shape of ``scaled_A``."""
        product = torch.bmm(self._tiles_of_B().mT, self._tiles(grad).flatten(end_dim=1))
        tiles: Tensor = product.unflatten(0, (self._tile_rows, len(self.A))).unflatten(2, (self.A.shape[1], -1))
        return tiles.permute(1, 2, 3, 0, 4).flatten(1, 3)  # (b', c, r/c, num_bases/b', width) before

    def update(self, scaled_A: Tensor, onto: Tensor | None = None, *, uses_up: bool = False) -> Tensor:  # noqa: ARG002
        """Compute ``UB @ UA``, ``(max_dim, min_dim)``, added to ``onto`` inside the products' accumulation.

        The result is laid out in memory as ``onto`` is, which is left as it is: its tiles have to be copied anyway.
        """
        left, right = self._tiles_of_B(), self._tiles_of_A(scaled_A)
        if onto is None:
            return self._untile(torch.bmm(left, right), across=False)
        tiles, across = self._tiles(onto), onto.stride(-1) != 1
        if across:  # transposed in memory: so is each tile made
            tiles, left, right = tiles.mT, right.mT, left.mT
        return self._untile(scratch.plus_products(_copied(tiles), left, right), across=across)

    def _untile(self, tiles: Tensor, *, across: bool) -> Tensor:
        """Put tiles together; ``across`` says that each lies transposed, and the result in memory too."""
        grid: Tensor = tiles.unflatten(0, (self._tile_rows, len(self.A)))
        if across:  # (b', c, width, height)
            return grid.permute(2, 1, 3, 0).flatten(2, 3).flatten(0, 1)[: self.min_dim, : self.max_dim].T
        return grid.permute(2, 0, 3, 1).flatten(2, 3).flatten(0, 1)[: self.max_dim, : self.min_dim]

    def _by_block_of_A(self, parts: Tensor) -> Tensor:
        """Deal hidden vectors out anew, from the blocks of B, ``(b, tokens, r·num_bases/b)``, to those of A."""
        flat = join(parts, len(parts) * parts.shape[2])
        by_row: Tensor = flat.unflatten(1, (-1, len(self.A), self.num_bases))
        return by_row.movedim(2, 0).flatten(start_dim=2)

    def _by_block_of_B(self, hidden: Tensor) -> Tensor:
        """Undo `_by_block_of_A`."""
        by_row: Tensor = hidden.unflatten(2, (-1, self.num_bases))
        return split(by_row.permute(1, 2, 0, 3).flatten(start_dim=1), len(self.B))

    @property
    def _tile_rows(self) -> int:
        """Rows of tiles that the update has, b': where b does not divide num_bases, tiles are merged until it does."""
        return math.gcd(self.num_bases, len(self.B))

    def _tiles(self, matrix: Tensor) -> Tensor:
        """View ``(max_dim, min_dim)`` as the grid of tiles ``(b', c, height, width)``."""
        height, width = self.B.shape[0] * self.B.shape[1], self.A.shape[0] * self.A.shape[2]
        if matrix.shape != (height, width):
            matrix = F.pad(matrix, (0, width - self.min_dim, 0, height - self.max_dim))
        tiles: Tensor = matrix.unflatten(1, (-1, len(self.A))).unflatten(0, (-1, self._tile_rows))
        return tiles.permute(1, 3, 0, 2)

    def _tiles_of_A(self, scaled_A: Tensor) -> Tensor:
        """Return what each tile reads of UA: ``(b'·c, r/c·num_bases/b', width)``."""
        parts: Tensor = scaled_A.unflatten(1, (self.A.shape[1], -1, self._tile_rows))
        return parts.permute(3, 0, 1, 2, 4).flatten(2, 3).flatten(end_dim=1)

    def _tiles_of_B(self) -> Tensor:
        """Return what each tile reads of B: ``(b'·c, height, r/c·num_bases/b')``."""
        rows, merged = self._tile_rows, self.B
        if (more := len(self.B) // rows) > 1:
            parts = self.B.unflatten(0, (more, rows)).permute(1, 2, 3, 0)  # (b', height, inner, b/b')
            merged = torch.diag_embed(parts).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        by_block: Tensor = merged.unflatten(2, (self.A.shape[1], len(self.A), -1))
        return by_block.permute(0, 3, 1, 2, 4).flatten(3, 4).flatten(end_dim=1)


def _copied(tiles: Tensor) -> Tensor:
    """Copy a grid of tiles, ``(b', c, ...)``, into a batch of them."""
    return tiles.clone(memory_format=torch.contiguous_format).flatten(end_dim=1)

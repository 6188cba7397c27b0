"""Pairs of bases in the two forms that products use: without structure, and with blocks whose zeros are skipped.

Of a `BlockPair`, A is zero except where ``k ≡ j (mod c)``, B except where ``i ≡ p (mod b)``. They are block diagonal up
to a stride permutation, the factors of Monarch matrices (Dao et al., ICML 2022).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.functional import scratch
from randlora.functional.cost import Shape, pass_over
from randlora.functional.scratch import diagonal_gradients, in_dtype, scaled_basis


class DensePair:
    """A pair of bases without structure.

    Products are between *small* vectors (of ``min_dim`` entries), *large* ones (``max_dim``) and the *hidden* ones
    between the two factors (``r·num_bases``). Hidden vectors are *flat*, in the order of p, or in the order of the rows
    of ``scaled_A``; for dense bases both are the same. A is ``(1, r, min_dim)``, and B ``(max_dim, r·num_bases)`` in
    the dtype to compute in. ``type(pair)(A, B, *pair.other_arguments)`` is the same pair of other tensors.
    """

    written: None = None  # the bases are dense already

    def __init__(self, A: Tensor, B: Tensor) -> None:
        """Hold the bases of one layer."""
        self.A, self.B = A, B
        self.other_arguments: tuple[int, ...] = ()
        self._rows_of_A = A.transpose(0, 1)  # (r, 1, min_dim)
        self._A = A.squeeze(0)
        self._A_T, self._B_T = self._A.T, B.T

    @cached_property
    def shape(self) -> Shape:
        """The sizes that the cost depends on, with the shares of the dense work of products with UA, UB and both."""
        entry = pass_over(self.B.device.type, self.B.dtype)
        (_, r, min_dim), (max_dim, hidden) = self.A.shape, self.B.shape
        return Shape(max_dim, min_dim, hidden, hidden // r, (1.0, 1.0, 1.0), entry)

    def scaled_A(self, lam: Tensor, gamma: Tensor) -> Tensor:
        """Compute UA, ``(r·num_bases, min_dim)``, in the dtype of B, rounded once from the widest of its factors."""
        return scaled_basis(self._rows_of_A, lam.unsqueeze(2), gamma, self.B.dtype).reshape(-1, gamma.size(1))

    def diagonal_gradients(self, grad_A: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of Λ and Γ from the gradient of UA, which is overwritten."""
        return diagonal_gradients(grad_A.reshape(*lam.shape, -1), self._rows_of_A, lam.unsqueeze(2), gamma)

    def small_to_hidden(self, small: Tensor, scaled_A: Tensor) -> Tensor:
        """Multiply ``(tokens, min_dim)`` by ``UA.T``: hidden vectors in the order of the rows of ``scaled_A``."""
        return small @ scaled_A.T

    def hidden_to_small(self, hidden: Tensor, scaled_A: Tensor, onto: Tensor | None, factor: float) -> Tensor:
        """Multiply such vectors by ``factor·UA`` and add ``onto``, ``(tokens, min_dim)``, which is overwritten."""
        return scratch.plus_product(onto, hidden, scaled_A, factor)

    def large_to_hidden(self, large: Tensor) -> Tensor:
        """Multiply ``(tokens, max_dim)`` by ``UB``: hidden vectors in the order of the rows of ``scaled_A``."""
        return large @ self.B

    def rows_of_B(self, ids: Tensor) -> Tensor:
        """Return rows of ``UB``: hidden vectors in the order of the rows of ``scaled_A``."""
        return self.B.index_select(0, ids)

    def hidden_to_large(self, hidden: Tensor, onto: Tensor | None, factor: float) -> Tensor:
        """Multiply such vectors by ``factor·UB.T`` and add ``onto``, ``(tokens, max_dim)``, which is overwritten."""
        return scratch.plus_product(onto, hidden, self._B_T, factor)

    large_to_flat = large_to_hidden
    flat_to_large = hidden_to_large

    def small_to_terms(self, small: Tensor, gamma: Tensor) -> Tensor:
        """Multiply tokens by Γ, or one for each, and ``A.T``, once per term: ``(tokens, r, num_bases)``, before Λ."""
        if small.size(0) == 1:  # as in generation, with fewer views
            laid_out = small * (gamma if gamma.dim() == 2 else gamma.squeeze(0))
            return (in_dtype(self._A, laid_out.dtype) @ laid_out.T).unsqueeze(0)
        laid_out = (small.unsqueeze(1) * gamma).reshape(-1, gamma.size(-1))
        terms = laid_out @ in_dtype(self._A_T, laid_out.dtype)
        return terms.view(-1, gamma.size(-2), terms.size(1)).transpose(1, 2)

    def terms_to_small(self, terms: Tensor) -> Tensor:
        """Multiply ``(tokens, r, num_bases)`` by A, once per term: ``(tokens, num_bases, min_dim)``, before Γ."""
        rows = terms.transpose(1, 2).reshape(-1, terms.size(1))
        product = rows @ in_dtype(self._A, rows.dtype)
        return product.view(-1, terms.size(2), product.size(1))

    def grad_from_tokens(self, hidden: Tensor, small: Tensor) -> Tensor:
        """Compute the gradient of ``UA``, ``hidden.T @ small``, in the shape of ``scaled_A``."""
        return hidden.T @ small

    def grad_from_sides(self, large: Tensor, small: Tensor) -> Tensor:
        """Compute the same with ``hidden = large @ UB``."""
        return self.grad_from_tokens(large @ self.B, small)

    def grad_from_update(self, grad: Tensor, *, is_transposed: bool) -> Tensor:
        """Compute the gradient of ``UA``, ``UB.T @ grad``, from the update's gradient or its transpose."""
        return self._B_T @ (grad.T if is_transposed else grad)

    def update(self, scaled_A: Tensor, onto: Tensor | None, factor: float, *, uses_up: bool = False) -> Tensor:
        """Compute ``onto + factor·UB @ UA``, ``(max_dim, min_dim)``, laid out as ``onto``, which it may use up."""
        is_transposed = onto is not None and onto.stride(-1) != 1
        left, right = (scaled_A.T, self._B_T) if is_transposed else (self.B, scaled_A)
        onto = onto.T if onto is not None and is_transposed else onto
        if onto is None or uses_up:
            total = scratch.plus_product(onto, left, right, factor)
        else:
            total = torch.addmm(onto, left, right, alpha=factor)
        return total.T if is_transposed else total


WORTH_A_SHUFFLE = 2**14
"""From this number of entries of a matrix, torch's channel shuffle on a CPU takes a quarter to half the time."""


class BlockPair:
    """A pair of block bases, with the same products as `DensePair`, in new memory where a bmm needs contiguous rows.

    A product distributes the columns of tokens to blocks (`_deal`), multiplies block by block, and gathers the columns
    of the result (`_gather`); an update is a grid of b·c dense tiles. Dims that no stride divides are padded with
    zeros. Here ``scaled_A`` is ``(c, r/c·num_bases, ceil(min_dim / c))``: row ``u·num_bases + j`` of block t is row
    ``p = (u·c + t)·num_bases + j`` of UA. Hidden vectors in the order of its rows are ``(c, tokens, r/c·num_bases)``.
    On the way between the order of one basis and that of the other they are copied twice, through p: a permutation of
    five axes took 1.4 to 2.9 times as long on a CPU as two of three.

    A is ``(c, r/c, ceil(min_dim / c))``, and B ``(b, ceil(max_dim / b), r·num_bases/b)``.
    """

    written: DensePair | None = None  # the same bases, for products of at most SMALL_WORK

    def __init__(
        self, A: Tensor, B: Tensor, num_bases: int, max_dim: int, min_dim: int, blocks: tuple[int, int, int]
    ) -> None:
        """Hold the bases of one layer. ``blocks`` is ``(c, b, r/c)``; under a compiler tensor sizes may be symbols."""
        self.A, self.B = A, B
        self.other_arguments = num_bases, max_dim, min_dim, blocks
        self.num_bases, self.max_dim, self.min_dim, (self._c, self._b, self._rows) = self.other_arguments
        self._width, self._height = -(-min_dim // self._c), -(-max_dim // self._b)
        self.r = self._c * self._rows
        self.hidden = self.r * num_bases
        self._sides = self._b * self._height, self._c * self._width
        self._is_padded = self._sides != (max_dim, min_dim)
        self._A_T, self._B_T = A.mT, B.mT
        self._rows_of_A = A.unsqueeze(2)  # (c, r/c, 1, width)

    @property
    def _tile_rows(self) -> int:
        """Rows of tiles in the update, b'. If b does not divide num_bases, tiles are merged until b' does."""
        return math.gcd(self.num_bases, self._b)

    @cached_property
    def shape(self) -> Shape:
        """The sizes that the cost depends on, with the shares of the dense work of products with UA, UB and both."""
        entry = pass_over(self.B.device.type, self.B.dtype)
        shares = 1 / self._c, 1 / self._b, 1 / (self._c * self._tile_rows)
        return Shape(self.max_dim, self.min_dim, self.hidden, self.num_bases, shares, entry)

    def write_out(self) -> DensePair:
        """Return the same bases as a dense pair."""
        basis_A, basis_B = (
            torch.diag_embed(blocks.permute(1, 2, 0), dim1=1, dim2=3).reshape(rows, -1)
            for blocks, rows in ((self.A, self.r), (self.B, self._b * self._height))
        )
        return DensePair(basis_A[:, : self.min_dim].contiguous().unsqueeze(0), basis_B[: self.max_dim])

    def scaled_A(self, lam: Tensor, gamma: Tensor) -> Tensor:
        """Compute UA block by block in the dtype of B, rounded once from the widest dtype of its factors."""
        blocks = self._in_blocks(lam, gamma)
        return scaled_basis(self._rows_of_A, *blocks, self.B.dtype).reshape(self._c, -1, self._width)

    def diagonal_gradients(self, grad_A: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of Λ and Γ from the gradient of UA, which is overwritten."""
        grad_A = grad_A.reshape(self._c, self._rows, self.num_bases, self._width)
        grad_lam, grad_gamma = diagonal_gradients(grad_A, self._rows_of_A, *self._in_blocks(lam, gamma))
        return grad_lam.transpose(0, 1).reshape(self.r, self.num_bases), _gather(grad_gamma, self.min_dim)

    def _in_blocks(self, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Return Λ, ``(c, r/c, num_bases, 1)``, and Γ, ``(c, 1, num_bases, width)``, in the order of A's blocks."""
        by_row = _fill(gamma, self.num_bases, self._sides[1]).view(self.num_bases, self._width, self._c)
        blocks_of_gamma = by_row.permute(2, 0, 1).contiguous().unsqueeze(1)  # so that products with it are contiguous
        return lam.view(self._rows, self._c, self.num_bases, 1).transpose(0, 1), blocks_of_gamma

    def small_to_hidden(self, small: Tensor, scaled_A: Tensor) -> Tensor:
        """Do as `DensePair.small_to_hidden`."""
        return torch.bmm(_deal(small, self._c), scaled_A.mT)

    def hidden_to_small(self, hidden: Tensor, scaled_A: Tensor, onto: Tensor | None, factor: float) -> Tensor:
        """Do as `DensePair.hidden_to_small`."""
        return _gather_onto(onto, torch.bmm(hidden, scaled_A), self.min_dim, factor)

    def large_to_hidden(self, large: Tensor) -> Tensor:
        """Do as `DensePair.large_to_hidden`."""
        return self._in_order_of_A(self.large_to_flat(large))

    def rows_of_B(self, ids: Tensor) -> Tensor:
        """Do as `DensePair.rows_of_B`."""
        block, row = ids % self._b, ids // self._b
        stride = torch.arange(self._b, device=ids.device)
        is_own = (block.unsqueeze(1) == stride).unsqueeze(1)  # the columns p ≡ i (mod b) of row i
        return self._in_order_of_A((self.B[block, row].unsqueeze(2) * is_own).reshape(ids.size(0), self.hidden))

    def _in_order_of_A(self, flat: Tensor) -> Tensor:
        """Put ``(tokens, r·num_bases)`` in the order of p into that of the rows of ``scaled_A``."""
        by_row = flat.view(flat.size(0), self._rows, self._c, self.num_bases)
        return by_row.permute(2, 0, 1, 3).reshape(self._c, flat.size(0), self._rows * self.num_bases)

    def hidden_to_large(self, hidden: Tensor, onto: Tensor | None, factor: float) -> Tensor:
        """Do as `DensePair.hidden_to_large`."""
        by_row = hidden.view(self._c, -1, self._rows, self.num_bases)
        return self.flat_to_large(by_row.permute(1, 2, 0, 3).reshape(-1, self.hidden), onto, factor)

    def large_to_flat(self, large: Tensor) -> Tensor:
        """Multiply ``(tokens, max_dim)`` by ``UB``: ``(tokens, r·num_bases)``, in the order of p."""
        return _gather(torch.bmm(_deal(large, self._b), self.B), self.hidden)

    def flat_to_large(self, flat: Tensor, onto: Tensor | None, factor: float) -> Tensor:
        """Multiply such vectors by ``factor·UB.T`` and add ``onto``, ``(tokens, max_dim)``."""
        return _gather_onto(onto, torch.bmm(_deal(flat, self._b), self._B_T), self.max_dim, factor)

    def small_to_terms(self, small: Tensor, gamma: Tensor) -> Tensor:
        """Do as `DensePair.small_to_terms`."""
        laid_out = (small.unsqueeze(1) * gamma).reshape(-1, self.min_dim)  # (tokens·num_bases, min_dim)
        terms = torch.bmm(_deal(laid_out, self._c), in_dtype(self._A_T, laid_out.dtype))
        by_row = terms.view(self._c, -1, self.num_bases, self._rows).permute(1, 3, 0, 2)
        return by_row.reshape(-1, self.r, self.num_bases)

    def terms_to_small(self, terms: Tensor) -> Tensor:
        """Do as `DensePair.terms_to_small`."""
        by_block = terms.view(-1, self._rows, self._c, self.num_bases).permute(2, 0, 3, 1)
        rows = by_block.reshape(self._c, -1, self._rows)  # (c, tokens·num_bases, r/c)
        small = torch.bmm(rows, in_dtype(self.A, rows.dtype))
        return _gather(small, self.min_dim).view(-1, self.num_bases, self.min_dim)

    def grad_from_tokens(self, hidden: Tensor, small: Tensor) -> Tensor:
        """Do as `DensePair.grad_from_tokens`."""
        return torch.bmm(hidden.mT, _deal(small, self._c))

    def grad_from_sides(self, large: Tensor, small: Tensor) -> Tensor:
        """Compute the same for ``hidden = large @ UB``, in the dtype of A, summed over strips of tokens."""
        total: Tensor | None = None
        strips: Iterable[tuple[Tensor, Tensor]] = [(large, small)]
        if scratch.may_be_in_strips(large):
            # every strip adds a gradient of UA to the sum, so it has four times its entries at least
            entries = max(scratch.CACHED_ENTRIES, 4 * self.hidden * self._width)
            rows = max(1, entries // max(large.size(1), small.size(1)))
            strips = zip(large.split(rows), small.split(rows), strict=True)
        for some_large, some_small in strips:
            part = self.grad_from_tokens(self.large_to_hidden(some_large), some_small)
            total = in_dtype(part, self.A.dtype) if total is None else total.add_(part)
        assert total is not None, "there is at least one strip"
        return total

    def grad_from_update(self, grad: Tensor, *, is_transposed: bool) -> Tensor:
        """Do as `DensePair.grad_from_update`."""
        tiles = self._tiles(grad, is_transposed=is_transposed)
        product = torch.bmm(self._parts_of_B(is_transposed=is_transposed).mT, tiles.mT if is_transposed else tiles)
        by_term = product.view(*self._grid(is_transposed=is_transposed), self._rows, -1, self._width)
        by_row = by_term.permute(0, 2, 3, 1, 4) if is_transposed else by_term.permute(1, 2, 3, 0, 4)
        return by_row.reshape(self._c, -1, self._width)

    def update(self, scaled_A: Tensor, onto: Tensor | None, factor: float, *, uses_up: bool = False) -> Tensor:  # noqa: ARG002
        """Do as `DensePair.update`. ``onto`` is never overwritten: its tiles are copied anyway."""
        is_transposed = onto is not None and onto.stride(-1) != 1
        by_row = scaled_A.view(self._c, self._rows, -1, self._tile_rows, self._width)
        right = by_row.permute(*((0, 3) if is_transposed else (3, 0)), 1, 2, 4)  # the part of UA for each tile
        right = right.reshape(self._tile_rows * self._c, -1, self._width)
        left = self._parts_of_B(is_transposed=is_transposed)
        if is_transposed:  # onto is transposed in memory, and so are its tiles
            left, right = right.mT, left.mT
        tiles = None if onto is None else self._tiles(onto.T if is_transposed else onto, is_transposed=is_transposed)
        tiles = scratch.plus_product(tiles, left, right, factor)
        whole = _put_together(tiles, *self._grid(is_transposed=is_transposed))
        whole = whole.T if is_transposed else whole
        return whole[: self.max_dim, : self.min_dim] if self._is_padded else whole

    def _tiles(self, matrix: Tensor, *, is_transposed: bool) -> Tensor:
        """Split ``(max_dim, min_dim)`` or its transpose into tiles by remainders, ``(tiles, height, width)``."""
        filled = _fill(matrix, *(self._sides[::-1] if is_transposed else self._sides))
        rows, columns = self._grid(is_transposed=is_transposed)
        width = filled.size(1) // columns
        # in memory, the tiles of one class of rows are interleaved row by row
        return _transpose_rows(filled, width).reshape(-1, rows * columns, width).transpose(0, 1)

    def _grid(self, *, is_transposed: bool) -> tuple[int, int]:
        """Return the numbers of rows and columns of tiles in the update, swapped if it is transposed."""
        return (self._c, self._tile_rows) if is_transposed else (self._tile_rows, self._c)

    def _parts_of_B(self, *, is_transposed: bool) -> Tensor:
        """Return the part of B for each tile, ``(b'·c, height, r/c·num_bases/b')``, in the order of `_tiles`."""
        merged, height = self.B, self._b * self._height // self._tile_rows
        if (more := self._b // self._tile_rows) > 1:
            parts = self.B.unflatten(0, (more, self._tile_rows)).permute(1, 2, 3, 0)  # (b', height, inner, b/b')
            merged = torch.diag_embed(parts).transpose(2, 3).reshape(self._tile_rows, height, -1)
        by_block = merged.view(self._tile_rows, height, self._rows, self._c, -1)
        order = (3, 0) if is_transposed else (0, 3)
        return by_block.permute(*order, 1, 2, 4).reshape(self._tile_rows * self._c, height, -1)


def _deal(matrix: Tensor, blocks: int) -> Tensor:
    """Distribute columns to blocks in turn: ``(rows, n)`` to ``(blocks, rows, ceil(n / blocks))``, zero-padded."""
    if blocks == 1:
        return matrix.unsqueeze(0)
    width = -(-matrix.size(1) // blocks)
    filled = _fill(matrix, matrix.size(0), width * blocks)
    if scratch.is_transformed():  # a copy is for the compiler to make
        return filled.reshape(-1, width, blocks).permute(2, 0, 1)
    # the blocks of a row are adjacent in memory: it is written while it is in the cache, and bmm takes the row stride
    return _transpose_rows(filled, width).transpose(0, 1)


def _gather(parts: Tensor, columns: int) -> Tensor:
    """Undo `_deal`: ``(blocks, rows, width)`` to ``(rows, columns)``, as a new contiguous tensor."""
    whole = parts.permute(1, 2, 0).reshape(-1, parts.size(0) * parts.size(2))
    if whole.size(1) != columns:
        return whole[:, :columns].clone(memory_format=torch.contiguous_format)
    return whole.clone() if parts.size(0) == 1 else whole


def _gather_onto(onto: Tensor | None, parts: Tensor, columns: int, factor: float) -> Tensor:
    """Return ``onto + factor·_gather(parts)``, overwriting both."""
    is_whole = onto is not None and parts.size(0) * parts.size(2) == columns  # then it need not be new
    whole = parts.permute(1, 2, 0).reshape(-1, columns) if is_whole else _gather(parts, columns)
    return scratch.plus(onto, whole, factor)


def _fill(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Pad a matrix with zeros to a size."""
    below, beside = rows - matrix.size(0), columns - matrix.size(1)
    sides = (0, beside, 0, below) if below else (0, beside)  # torch 2.6 refuses to add nothing to a side of size 0
    return F.pad(matrix, sides) if below or beside else matrix


def _put_together(tiles: Tensor, row_classes: int, column_classes: int) -> Tensor:
    """Undo `BlockPair._tiles`, also for tiles that are contiguous."""
    rows, columns = row_classes * tiles.size(1), column_classes * tiles.size(2)
    if scratch.is_transformed() or tiles.is_contiguous():  # torch 2.6 cannot compile the second question in backward
        grid = tiles.view(row_classes, column_classes, tiles.size(1), tiles.size(2))
        return grid.permute(2, 0, 3, 1).reshape(rows, columns)
    return _transpose_rows(tiles.transpose(0, 1).reshape(rows, columns), column_classes).reshape(rows, columns)


def _transpose_rows(matrix: Tensor, groups: int) -> Tensor:
    """Transpose each row, viewed as a matrix of ``groups`` rows, into new memory."""
    rows, columns = matrix.shape
    shape = rows, groups, columns // groups
    if scratch.is_transformed() or matrix.device.type != "cpu" or matrix.numel() < WORTH_A_SHUFFLE:
        return matrix.reshape(shape).transpose(1, 2).clone(memory_format=torch.contiguous_format)
    pixels = matrix.contiguous().view(1, rows, 1, columns).permute(0, 3, 1, 2)
    return F.channel_shuffle(pixels, groups).permute(0, 2, 3, 1).reshape(rows, -1, groups)


Pair = DensePair | BlockPair

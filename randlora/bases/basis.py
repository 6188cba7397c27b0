"""One pair of frozen bases: drawn once, kept small, handed out per device and dtype."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from randlora.bases import portable_stream, torch_stream
from randlora.bases.compact import CompactMatrix
from randlora.bases.spec import BasisSpec, count_bases
from randlora.errors import ConfigError
from randlora.functional import BlockPair, DensePair, Pair, SparsePair
from randlora.functional.sparse import csr, serves

Method = TypeVar("Method", bound=Callable[..., Tensor])


class Bases(NamedTuple):
    """The slices of one layer, written out: ``A`` is ``(r, 1, min_dim)``, ``B`` is ``(max_dim, num_bases, r)``."""

    A: Tensor
    B: Tensor


def _constant_to_the_compiler(method: Method) -> Method:
    """Mark a method as ``torch.compiler.assume_constant_result`` does, without importing the whole compiler for it."""
    vars(method)["_dynamo_marked_constant"] = True
    return method


@dataclass(eq=False)
class Basis:
    """One pair of frozen bases, shared by every layer that names its spec.

    It is drawn when first needed, only as far as a layer has asked for, and holds one copy to compute with per
    device and dtype, in which the zeros of ``block`` take no room. Copying shares it; pickling drops the numbers, which
    its spec brings back, unless they came from a file that no seed reproduces.

    Attributes:
        spec: What is drawn.
        extent: ``(max_dim, min_dim)`` kept so far.
        stored: A and B as a file held them, where its seed does not bring them back.
        identity: What the bits depend on, in words; bases of equal identity are equal.
    """

    spec: BasisSpec
    extent: tuple[int, int] = (0, 0)
    stored: tuple[CompactMatrix, CompactMatrix] | None = None
    _drawn: tuple[CompactMatrix, CompactMatrix] | None = field(default=None, repr=False)
    _copies: dict[tuple[int, torch.device, torch.dtype], Tensor] = field(default_factory=dict, repr=False)
    _sparse_pairs: dict[tuple[torch.dtype, int, int], SparsePair] = field(default_factory=dict, repr=False)
    identity: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Name the content."""
        self.identity = str(self.spec.family if self.spec.is_prefix_stable else self.spec)
        if self.stored is not None:
            self.identity += f", stored {self.digest(*self.extent)}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Basis:
        """Share: the numbers never change."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Drop what can be drawn again."""
        return {**self.__dict__, "_drawn": None, "_copies": {}, "_sparse_pairs": {}}

    def extend(self, max_dim: int, min_dim: int) -> None:
        """Make the bases reach layers of these dims; bits already handed out do not change.

        Args:
            max_dim: Rows of B that some layer needs.
            min_dim: Columns of A that some layer needs.

        Raises:
            ConfigError: When they were drawn for smaller dims and cannot grow.
        """
        extent = (max(self.extent[0], max_dim), max(self.extent[1], min_dim))
        if extent == self.extent:
            return
        drawn = self.spec.max_dim, self.spec.min_dim
        if not self.spec.is_prefix_stable and (extent[0] > drawn[0] or extent[1] > drawn[1]):
            raise ConfigError(f"a layer of {max_dim}x{min_dim} reaches beyond {self.spec}: draw them for larger dims")
        self.extent, self._drawn = extent, None
        self.release()
        if self.spec.is_prefix_stable:
            self.spec = replace(self.spec, max_dim=max(drawn[0], extent[0]), min_dim=max(drawn[1], extent[1]))

    def matrices(self) -> tuple[CompactMatrix, CompactMatrix]:
        """Return A, ``(r, min_dim)``, and B, ``(max_dim, num_bases·r)``, in storage, drawing them at the first call."""
        if self.stored is not None:
            return self.stored
        if self._drawn is None:
            stream = torch_stream if self.spec.stream == "torch" else portable_stream
            with torch.inference_mode(mode=False):
                self._drawn = stream.draw(self.spec, *self.extent)
        return self._drawn

    def slices(self, max_dim: int, min_dim: int, *, device: torch.device | str, dtype: torch.dtype) -> Bases:
        """Write out the bases of a layer, zeros and all, to look at or to save; nothing of it is kept.

        Args:
            max_dim: The layer's larger side.
            min_dim: The layer's smaller side.
            device: Where the result lives.
            dtype: A floating dtype; exact in float32 and wider.
        """
        self.extend(max_dim, min_dim)
        r, columns_B = self.spec.r, count_bases(min_dim, self.spec.r) * self.spec.r
        basis_A, basis_B = (matrix.to_dense(device=device, dtype=dtype) for matrix in self.matrices())
        return Bases(basis_A[:, :min_dim].unsqueeze(1), basis_B[:max_dim, :columns_B].unflatten(1, (-1, r)))

    def pair(
        self, max_dim: int, min_dim: int, *, device: torch.device, dtype: torch.dtype, is_traced: bool = False
    ) -> Pair:
        """Hand a layer its bases in the form it computes with.

        Args:
            max_dim: The layer's larger side.
            min_dim: The layer's smaller side.
            device: Where the layer computes.
            dtype: What the layer computes in: the dtype of B. A, which is small, is at least float32. It carries the
                scale of a ternary B too, whose signs are exact in any dtype.
            is_traced: Whether something watches that has no rules for sparse tensors: a compiler, a transform.

        Returns:
            Views of the one copy for this device and dtype.
        """
        self.extend(max_dim, min_dim)
        num_bases = count_bases(min_dim, self.spec.r)
        basis_A = self._copy(0, device, dtype, self.identity)
        if not is_traced and serves(self._density, device, dtype):
            return self._sparse_pair(basis_A, max_dim, min_dim, num_bases, dtype)
        basis_B = self._copy(1, device, dtype, self.identity)
        c, b = self._blocks
        if (c, b) == (1, 1):
            return DensePair(basis_A[:, :min_dim].unsqueeze(0), basis_B[:max_dim, : num_bases * self.spec.r])
        rows, width = math.ceil(max_dim / b) * b, math.ceil(min_dim / c)
        blocks_A = basis_A[:, :width].unflatten(0, (-1, c)).transpose(0, 1)
        blocks_B = basis_B[:rows, : num_bases * self.spec.r // b].unflatten(0, (-1, b)).transpose(0, 1)
        return BlockPair(blocks_A, blocks_B, num_bases, max_dim, min_dim)

    def release(self) -> None:
        """Forget the copies to compute with; what computes next makes its own again."""
        self._copies.clear()
        self._sparse_pairs.clear()

    @_constant_to_the_compiler
    def _copy(self, index: int, device: torch.device, dtype: torch.dtype, identity: str) -> Tensor:
        """Return A (index 0) or B (index 1) to compute with, whole.

        The compiler calls this while it traces and keeps the tensor as a constant; ``identity`` is an argument so that
        it traces again for other bases. Whatever mode or transform is on, the tensor made is a real one that autograd
        accepts.
        """
        assert identity == self.identity, "the caller names these bases"
        key = (index, device, dtype)
        if key not in self._copies:
            write_out = self._write_out_B if index else self._write_out_A
            with torch.inference_mode(mode=False), _disable_current_modes(), torch._C._DisableFuncTorch():
                self._copies[key] = write_out(device, dtype)
        return self._copies[key]

    def digest(self, max_dim: int, min_dim: int) -> str:
        """Return the SHA-256 of the values that layers of these dims use.

        The canonical bytes are a line with both shapes, then A and B row by row as little-endian float32: of the
        values, not of how they are stored.
        """
        self.extend(max_dim, min_dim)
        columns_B = count_bases(min_dim, self.spec.r) * self.spec.r
        basis_A, basis_B = self.matrices()
        digest = hashlib.sha256(f"A {self.spec.r}x{min_dim} B {max_dim}x{columns_B}\n".encode())
        for matrix, rows, columns in ((basis_A, self.spec.r, min_dim), (basis_B, max_dim, columns_B)):
            for chunk in matrix.dense_chunks(rows):
                digest.update(chunk[:, :columns].contiguous().numpy().astype("<f4", copy=False).tobytes())
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes that storage takes, or will take once drawn; written-out copies not counted."""
        if self.stored is not None:
            return sum(matrix.nbytes for matrix in self.stored)
        return self.spec.nbytes(*self.extent)

    @property
    def _blocks(self) -> tuple[int, int]:
        """``(c, b)`` as it is kept: bases from a file are kept whole."""
        return (1, 1) if self.stored is not None else self.spec.blocks or (1, 1)

    @property
    def _density(self) -> float:
        """Share of B that may be other than zero, as far as its kind tells."""
        is_ternary = self.spec.kind in ("sparse", "very_sparse") and self.stored is None
        return 2 * self.spec.probability if is_ternary else 1.0

    def _write_out_A(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Make A, ``(r, ceil(min_dim / c))``, with the scales of both."""
        wide = torch.promote_types(dtype, torch.float32)
        if device.type == "meta":  # shapes only: nothing is drawn for a model without values
            return torch.empty((self.spec.r, math.ceil(self.extent[1] / self._blocks[0])), dtype=wide, device=device)
        stored_A, stored_B = self.matrices()
        return stored_A.values.to(device=device, dtype=wide) * (stored_A.scale * stored_B.scale)

    def _write_out_B(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Make B, ``(max_dim, r·num_bases/b)`` with rows up to a multiple of b; storage itself where that will do."""
        (max_dim, min_dim), (_, b), r = self.extent, self._blocks, self.spec.r
        rows = math.ceil(max_dim / b) * b
        if device.type == "meta":
            return torch.empty((rows, count_bases(min_dim, r) * r // b), dtype=dtype, device=device)
        basis_B = self.matrices()[1].values.to(device=device, dtype=dtype)
        return basis_B if len(basis_B) == rows else F.pad(basis_B, (0, 0, 0, rows - len(basis_B)))

    def _sparse_pair(
        self, basis_A: Tensor, max_dim: int, min_dim: int, num_bases: int, dtype: torch.dtype
    ) -> SparsePair:
        """Return the sparse form of one layer's bases; layers of one shape share it."""
        key = (dtype, max_dim, num_bases)
        if key not in self._sparse_pairs:
            signs = self.matrices()[1].values[:max_dim, : num_bases * self.spec.r]
            with torch.inference_mode(mode=False):
                self._sparse_pairs[key] = SparsePair(basis_A, csr(signs, dtype), csr(signs.T, dtype), self._density)
        return self._sparse_pairs[key]._replace(A=basis_A[:, :min_dim].unsqueeze(0))

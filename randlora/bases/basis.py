"""One pair of frozen bases: drawn once, kept small, handed out per device and dtype."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.bases import portable_stream, torch_stream
from randlora.bases.compact import CompactMatrix
from randlora.bases.spec import BasisSpec, count_bases
from randlora.errors import ConfigError
from randlora.functional import BlockPair, DensePair, Pair
from randlora.functional.cost import SMALL_WEIGHT

Function = TypeVar("Function", bound=Callable[..., Any])
Made = TypeVar("Made")
_MAKING = threading.Lock()  # one for all bases, which can so be copied and pickled


class Bases(NamedTuple):
    """The slices of one layer, written out: ``A`` is ``(r, 1, min_dim)``, ``B`` is ``(max_dim, num_bases, r)``."""

    A: Tensor
    B: Tensor


def _not_told() -> bool:
    return False


_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", _not_told)
"""Whether a program is being exported. torch 2.6 does not tell; it cannot export these models anyway."""


def constant_to_the_compiler(function: Function) -> Function:
    """Mark a function as ``torch.compiler.assume_constant_result`` does, which would import the whole compiler."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


def _aside(make: Callable[[], Made]) -> Made:
    """Return what ``make`` makes in a thread of its own, where no mode, transform or autocast of the caller is on."""

    def run() -> Made:
        made = make()
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()  # the caller may compute on another stream
        return made

    with ThreadPoolExecutor(max_workers=1) as aside:
        return aside.submit(run).result()


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
    _copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _pairs: dict[tuple[int, int, torch.device, torch.dtype], Pair] = field(default_factory=dict, repr=False)
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
        lasting = {name: value for name, value in self.__dict__.items() if not name.startswith("_constant_")}
        return {**lasting, "_drawn": None, "_copies": {}, "_pairs": {}}

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

    def pair(self, max_dim: int, min_dim: int, *, device: torch.device, dtype: torch.dtype) -> Pair:
        """Return the bases of a layer within `extent` in the form it computes with: a lookup but for the first time.

        Args:
            max_dim: The layer's larger side.
            min_dim: The layer's smaller side.
            device: Where the layer computes.
            dtype: What the layer computes in: the dtype of B. A, which is small, is at least float32. It carries the
                scale of a ternary B too, whose signs are exact in any dtype.

        Returns:
            Views of the one copy for this device and dtype.
        """
        if torch.compiler.is_compiling():
            place = max_dim, min_dim, device, dtype, _is_exporting()
            basis_A, basis_B = (getattr(self, self._constant(index, *place, self.identity))() for index in (0, 1))
            return self._paired(basis_A, basis_B, max_dim, min_dim)
        pair = self._pairs.get((max_dim, min_dim, device, dtype))
        return self._made(max_dim, min_dim, device, dtype) if pair is None else pair

    def release(self) -> None:
        """Forget the copies to compute with; what computes next makes its own again."""
        self._pairs.clear()
        self._copies.clear()
        for name in [name for name in self.__dict__ if name.startswith("_constant_")]:
            del self.__dict__[name]

    @constant_to_the_compiler
    def _constant(
        self,
        index: int,
        max_dim: int,
        min_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        is_exporting: bool,  # noqa: FBT001
        identity: str,
    ) -> str:
        """Return the name of an attribute, a function that returns A (index 0) or B (index 1) of a pair.

        The compiler calls both while it traces, and keeps the tensor as a constant under the function's name, which is
        why each has its own; ``identity`` is an argument so that it traces again for other bases. As a parameter the
        tensor has a shape that is no symbol to it, but a program that is exported has no parameters but the model's.
        """
        assert identity == self.identity, "the caller names these bases"
        name = f"_constant_{hash((index, max_dim, min_dim, device, dtype, is_exporting)):x}_{id(self):x}".replace(
            "-", "_"
        )
        if name not in self.__dict__:
            pair = self._made(max_dim, min_dim, device, dtype)
            tensor = pair.B if index else pair.A
            constant = tensor if is_exporting else nn.Parameter(tensor, requires_grad=False)

            def give() -> Tensor:
                return constant

            give.__name__, give.__code__ = name, give.__code__.replace(co_name=name)
            self.__dict__[name] = constant_to_the_compiler(give)
        return name

    def _copy(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A and B to compute with, whole: made once, whoever else asks for them at the same time.

        Whatever mode or transform is on, they are real tensors that autograd accepts.
        """
        with _MAKING:
            if (device, dtype) not in self._copies:
                written = _aside(lambda: (self._write_out_A(device, dtype), self._write_out_B(device, dtype)))
                self._copies[device, dtype] = written
            return self._copies[device, dtype]

    def _made(self, max_dim: int, min_dim: int, device: torch.device, dtype: torch.dtype) -> Pair:
        """Make a pair and remember it."""
        problem = f"a layer of {max_dim}x{min_dim} of bases within {self.extent}: extend() comes first"
        assert max_dim <= self.extent[0], problem
        assert min_dim <= self.extent[1], problem
        whole = self._copy(device, dtype)
        pair = _aside(lambda: self._sliced(*whole, max_dim, min_dim))
        return self._pairs.setdefault((max_dim, min_dim, device, dtype), pair)

    def _sliced(self, whole_A: Tensor, whole_B: Tensor, max_dim: int, min_dim: int) -> Pair:
        """Slice the whole bases for a layer."""
        num_bases, (c, b) = count_bases(min_dim, self.spec.r), self._blocks
        if (c, b) == (1, 1):
            basis_A = whole_A[:, :min_dim].unsqueeze(0)
            return self._paired(basis_A, whole_B[:max_dim, : num_bases * self.spec.r], max_dim, min_dim)
        rows, width = math.ceil(max_dim / b) * b, math.ceil(min_dim / c)
        blocks_A = whole_A[:, :width].unflatten(0, (-1, c)).transpose(0, 1).contiguous()
        blocks_B = whole_B[:rows, : num_bases * self.spec.r // b].unflatten(0, (-1, b)).transpose(0, 1)
        pair = self._paired(blocks_A, blocks_B, max_dim, min_dim)
        if isinstance(pair, BlockPair) and max_dim * min_dim <= SMALL_WEIGHT:
            pair.written = pair.write_out()
        return pair

    def _paired(self, basis_A: Tensor, basis_B: Tensor, max_dim: int, min_dim: int) -> Pair:
        """Make a pair of the slices for a layer."""
        c, b = self._blocks
        if (c, b) == (1, 1):
            return DensePair(basis_A, basis_B)
        r = self.spec.r
        return BlockPair(basis_A, basis_B, count_bases(min_dim, r), max_dim, min_dim, (c, b, r // c))

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

    def _write_out_A(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Make A, ``(r, ceil(min_dim / c))``, with the scales of both."""
        wide = torch.promote_types(dtype, torch.float32)
        if device.type == "meta":  # shapes only: nothing is drawn for a model without values
            return torch.empty((self.spec.r, math.ceil(self.extent[1] / self._blocks[0])), dtype=wide, device=device)
        stored_A, stored_B = self.matrices()
        values: Tensor = stored_A.values.to(dtype=wide) * (stored_A.scale * stored_B.scale)
        return values.to(device)  # done where it is returned: the copy waits, a kernel after it would not

    def _write_out_B(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Make B, ``(max_dim, r·num_bases/b)`` with rows up to a multiple of b; storage itself where that will do."""
        (max_dim, min_dim), (_, b), r = self.extent, self._blocks, self.spec.r
        rows = math.ceil(max_dim / b) * b
        if device.type == "meta":
            return torch.empty((rows, count_bases(min_dim, r) * r // b), dtype=dtype, device=device)
        basis_B = self.matrices()[1].values.to(dtype=dtype)
        whole = basis_B if len(basis_B) == rows else F.pad(basis_B, (0, 0, 0, rows - len(basis_B)))
        return whole.to(device)

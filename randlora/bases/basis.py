"""One pair of frozen bases: drawn once, stored compactly, copied once per device and dtype."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.bases.spec import KINDS, BasisSpec, Matrices, count_bases
from randlora.errors import ConfigError
from randlora.functional import BlockPair, DensePair, Pair
from randlora.functional.region import Sides, Spans, all_of, entries_of
from randlora.functional.scratch import without_modes

Function = TypeVar("Function", bound=Callable[..., Any])
Made = TypeVar("Made")
Use = tuple[int, int, torch.device, torch.dtype, Sides | None]
"""A layer's larger and smaller dim, its device, the dtype that it computes in, and its part of the bases."""
TracedUse = tuple[int, int, torch.device, torch.dtype, Spans, Spans, bool]
"""The same, flat as the compiler wants its constants, and whether a program is exported."""

_MAKING = threading.Lock()  # shared by all bases, because a lock cannot be copied or pickled


class Bases(NamedTuple):
    """The dense slices of one layer: ``A`` is ``(r, 1, min_dim)``, ``B`` is ``(max_dim, num_bases, r)``."""

    A: Tensor
    B: Tensor


is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
"""Whether a program is being exported. torch 2.6 has no such function, and cannot export these models."""


def constant_to_the_compiler(function: Function) -> Function:
    """Mark a function as ``torch.compiler.assume_constant_result`` does, without importing the compiler."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


def _aside(make: Callable[[], Made]) -> Made:
    """Return ``make()``, run in a new thread, where no mode, transform or autocast of the caller is active."""

    def run() -> Made:
        made = make()
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()  # the caller may use another stream
        return made

    with ThreadPoolExecutor(max_workers=1) as aside:
        return aside.submit(run).result()


@dataclass(eq=False)
class Basis:
    """One pair of frozen bases, shared by every layer with the same spec.

    The bases are drawn on first use, and only the rows and columns that layers need are kept. There is one working copy
    per device and dtype, without the zeros of ``block`` bases. Copying a `Basis` returns the same object, and pickling
    drops the values that the spec reproduces.

    Attributes:
        spec: The spec of the bases.
        extent: ``(max_dim, min_dim)`` kept so far.
        stored: A and B as read from a file, if the seed does not reproduce them.
        identity: A string of everything the bits depend on. Bases with the same identity are equal.
    """

    spec: BasisSpec
    extent: tuple[int, int] = (0, 0)
    stored: Matrices | None = None
    identity: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._drawn: Matrices | None = None
        self._copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._pairs: dict[Use, Pair] = {}
        self._digests: dict[tuple[int, int], str] = {}
        self._squares: dict[tuple[int, int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.identity = str(self.spec.family if self.spec.is_prefix_stable else self.spec)
        if self.stored is not None:
            self.identity += f", stored {self.digest(*self.extent)}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Basis:
        """Return the object itself: its values never change."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without what can be made again."""
        lasting = {name: value for name, value in self.__dict__.items() if not name.startswith("_constant_")}
        return {**lasting, "_drawn": None, "_copies": {}, "_pairs": {}, "_digests": {}, "_squares": {}}

    def extend(self, max_dim: int, min_dim: int) -> None:
        """Extend the bases so that layers of these dims can use them. Entries returned before do not change.

        Raises:
            ConfigError: If the bases were drawn for smaller dims and cannot grow.
        """
        extent = (max(self.extent[0], max_dim), max(self.extent[1], min_dim))
        if extent == self.extent:
            return
        drawn = self.spec.max_dim, self.spec.min_dim
        if not self.spec.is_prefix_stable and (extent[0] > drawn[0] or extent[1] > drawn[1]):
            raise ConfigError(f"a layer of {max_dim}x{min_dim} is larger than the {self.spec}: draw larger ones")
        self.extent, self._drawn = extent, None
        self.release()
        for name in [name for name in self.__dict__ if name.startswith("_constant_")]:
            del self.__dict__[name]
        if self.spec.is_prefix_stable:
            self.spec = replace(self.spec, max_dim=max(drawn[0], extent[0]), min_dim=max(drawn[1], extent[1]))

    def matrices(self) -> Matrices:
        """Return A, ``(r, min_dim)``, and B, ``(max_dim, num_bases·r)``, as stored; the first call draws them."""
        if self.stored is not None:
            return self.stored
        if self._drawn is None:
            with torch.inference_mode(mode=False), without_modes():
                self._drawn = KINDS[self.spec.kind].draws[self.spec.stream](self.spec, *self.extent)
        return self._drawn

    def slices(self, max_dim: int, min_dim: int, *, device: torch.device | str, dtype: torch.dtype) -> Bases:
        """Return the dense bases of a layer, to inspect or save, exact in float32 and wider. They are not cached."""
        self.extend(max_dim, min_dim)
        r, columns_B = self.spec.r, count_bases(min_dim, self.spec.r) * self.spec.r
        with without_modes():
            basis_A, basis_B = (matrix.to_dense(device=device, dtype=dtype) for matrix in self.matrices())
            return Bases(basis_A[:, :min_dim].unsqueeze(1), basis_B[:max_dim, :columns_B].unflatten(1, (-1, r)))

    def pair(
        self, max_dim: int, min_dim: int, *, device: torch.device, dtype: torch.dtype, sides: Sides | None = None
    ) -> Pair:
        """Return the bases of a layer, or its part of them, in the form that products use. Cached after the first call.

        They are views of the working copy. ``dtype``, in which the layer computes, is that of B. A is small and always
        float32 or wider, and includes the scale of a ternary B, so that the signs in B are exact in any dtype.
        """
        if torch.compiler.is_compiling():
            rows, columns = sides or Sides(all_of(max_dim), all_of(min_dim))
            use = max_dim, min_dim, device, dtype, rows, columns, is_exporting()
            # the compiler runs `_constant` and what it names while it traces, and keeps their results as constants
            name_of_A, name_of_B = (self._constant(index, use, self.identity) for index in (0, 1))
            basis_A, basis_B = getattr(self, name_of_A)(), getattr(self, name_of_B)()
            if basis_B.dim() == 2:
                return DensePair(basis_A, basis_B)
            (c, b), r = self.spec.blocks or (1, 1), self.spec.r
            sizes = count_bases(min_dim, r), entries_of(rows), entries_of(columns)
            return BlockPair(basis_A, basis_B, *sizes, (c, b, r // c))
        pair = self._pairs.get((max_dim, min_dim, device, dtype, sides))
        return self._made(max_dim, min_dim, device, dtype, sides) if pair is None else pair

    def release(self) -> None:
        """Free the working copies, except those in compiled programs. The next product makes them again."""
        for cache in (self._pairs, self._copies, self._squares):
            cache.clear()

    def squares(self, max_dim: int, min_dim: int, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the squares of a layer's A, ``(r, min_dim)``, and of UB, summed by columns, ``(r, num_bases)``."""
        r, num_bases = self.spec.r, count_bases(min_dim, self.spec.r)
        if device.type == "meta":  # a model without values needs no draw
            empty = partial(torch.empty, dtype=dtype, device=device)
            return empty((r, min_dim)), empty((r, num_bases))

        def squared() -> tuple[Tensor, Tensor]:
            basis_A, basis_B = self.matrices()
            of_A = basis_A.to_dense(device="cpu", dtype=torch.float64)[:, :min_dim].square()
            chunks = basis_B.dense_chunks(max_dim)
            norms = torch.stack([torch.linalg.vector_norm(chunk, dim=0, dtype=torch.float64) for chunk in chunks])
            of_B = norms.square().sum(0)[: r * num_bases].view(r, num_bases)
            return of_A.to(device, dtype), of_B.to(device, dtype)

        use = max_dim, min_dim, device, dtype
        if use not in self._squares:
            self._squares[use] = _aside(squared)
        return self._squares[use]

    @constant_to_the_compiler
    def _constant(self, index: int, use: TracedUse, identity: str) -> str:
        """Return the name of an attribute that holds a function returning A (index 0) or B (index 1) of a pair.

        The compiler calls that function while tracing and stores the tensor as a constant under the function's name.
        ``identity`` is an argument so that other bases cause a retrace. The tensor is a parameter, whose shape is
        static, except in an exported program, which may have no other parameters than the model's, and is saved with
        all of the memory that a constant is a view of.
        """
        assert identity == self.identity, "the caller passes the identity of these bases"
        name = f"_constant_{hash((index, *use)):x}_{id(self):x}".replace("-", "_")
        if name not in self.__dict__:
            max_dim, min_dim, device, dtype, rows, columns, is_exporting = use
            pair = self._made(max_dim, min_dim, device, dtype, Sides(rows, columns))
            constant = pair.B if index else pair.A
            if is_exporting:
                constant = _aside(partial(constant.clone, memory_format=torch.contiguous_format))
            else:
                constant = nn.Parameter(constant, requires_grad=False)
            # a `def` of its own, because two tensors under one function's name would be one constant; it returns what
            # its globals have as `constant`, and nothing of a caller's is in the code but the digits of the name
            function_globals: dict[str, Any] = {"constant": constant}
            exec(f"def {name}():\n    return constant", function_globals)  # noqa: S102
            self.__dict__[name] = constant_to_the_compiler(function_globals[name])
        return name

    def _made(self, max_dim: int, min_dim: int, device: torch.device, dtype: torch.dtype, sides: Sides | None) -> Pair:
        """Make a pair and cache it, from a working copy that is made once even if several threads ask for it."""
        problem = f"a layer of {max_dim}x{min_dim} exceeds the extent {self.extent}: call extend() first"
        assert max_dim <= self.extent[0], problem
        assert min_dim <= self.extent[1], problem
        with _MAKING:
            if (device, dtype) not in self._copies:
                self._copies[device, dtype] = _aside(lambda: self._write_out(device, dtype))
            copies = self._copies[device, dtype]
        num_bases, part = count_bases(min_dim, self.spec.r), sides or Sides(all_of(max_dim), all_of(min_dim))
        stored_as = KINDS["dense" if self.stored is not None else self.spec.kind]  # what is from a file is dense
        pair = _aside(lambda: stored_as.sliced(self.spec, *copies, num_bases, part))
        return self._pairs.setdefault((max_dim, min_dim, device, dtype, sides), pair)

    def digest(self, max_dim: int, min_dim: int) -> str:
        """Return the SHA-256 of the values that layers of these dims use, however they are stored. Cached.

        The hashed bytes are a line with both shapes, then the dense A and B row by row as little-endian float32.
        """
        self.extend(max_dim, min_dim)
        if (digest := self._digests.get((max_dim, min_dim))) is not None:
            return digest
        columns_B = count_bases(min_dim, self.spec.r) * self.spec.r
        basis_A, basis_B = self.matrices()
        hashed = hashlib.sha256(f"A {self.spec.r}x{min_dim} B {max_dim}x{columns_B}\n".encode())
        with without_modes():
            for matrix, rows, columns in ((basis_A, self.spec.r, min_dim), (basis_B, max_dim, columns_B)):
                for chunk in matrix.dense_chunks(rows):
                    hashed.update(chunk[:, :columns].contiguous().numpy().astype("<f4", copy=False).tobytes())
        return self._digests.setdefault((max_dim, min_dim), hashed.hexdigest())

    @property
    def nbytes(self) -> int:
        """Bytes in storage, or the bytes once drawn. Working copies are not counted."""
        if self.stored is not None:
            return sum(matrix.values.nbytes for matrix in self.stored)
        return self.spec.nbytes(*self.extent)

    def _write_out(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A, ``(r, ceil(min_dim / c))``, times both scales, and B, ``(max_dim, r·num_bases/b)``, padded."""
        c, b = (self.spec.blocks if self.stored is None else None) or (1, 1)
        (max_dim, min_dim), r = self.extent, self.spec.r
        rows, wide = math.ceil(max_dim / b) * b, torch.promote_types(dtype, torch.float32)
        if device.type == "meta":  # a model without values needs no draw
            basis_A = torch.empty((r, math.ceil(min_dim / c)), dtype=wide, device=device)
            return basis_A, torch.empty((rows, count_bases(min_dim, r) * r // b), dtype=dtype, device=device)
        stored_A, stored_B = self.matrices()
        basis_A = stored_A.values.to(dtype=wide) * (stored_A.scale * stored_B.scale)
        basis_B = stored_B.values.to(dtype=dtype)
        whole_B = basis_B if len(basis_B) == rows else F.pad(basis_B, (0, 0, 0, rows - len(basis_B)))
        return basis_A.to(device), whole_B.to(device)  # last: a copy is synchronous and a kernel after it would not be


class BasisBank:
    """The bases of one model. Adapters with equal specs share one `Basis`.

    Examples:
        >>> bank = BasisBank()
        >>> sizes = {"r": 4, "max_dim": 8, "min_dim": 6}
        >>> basis = bank.acquire(BasisSpec("dense", "portable", seed=0, **sizes))
        >>> basis.slices(8, 6, device="cpu", dtype=torch.float32).B.shape
        torch.Size([8, 2, 4])
    """

    def __init__(self) -> None:
        """Create an empty bank."""
        self._bases: list[Basis] = []

    def __iter__(self) -> Iterator[Basis]:
        return iter(self._bases)

    def __len__(self) -> int:
        return len(self._bases)

    @property
    def nbytes(self) -> int:
        """Total bytes of the bases in storage."""
        return sum(basis.nbytes for basis in self._bases)

    def find(self, spec: BasisSpec, *, used: tuple[int, int] | None = None) -> Basis | None:
        """Return bases in the bank with the bits of a spec, or ``None``.

        If ``(max_dim, min_dim)`` of the slices that layers use are given, bases of the same family drawn for at least
        these dims are accepted too, as in PEFT.
        """
        for basis in self._bases:
            own = basis.spec
            if basis.stored is not None or own.family != spec.family:
                continue
            covers = used is not None and own.max_dim >= used[0] and own.min_dim >= used[1]
            if own == spec or own.is_prefix_stable or covers:
                return basis
        return None

    def acquire(self, spec: BasisSpec) -> Basis:
        """Return the bases of a spec, adding them to the bank if it has none."""
        basis = self.find(spec) or Basis(spec)
        self.add(basis)
        return basis

    def add(self, basis: Basis) -> None:
        """Add existing bases, unless the bank has them already."""
        if basis not in self._bases:
            self._bases.append(basis)

    def keep_only(self, used: Iterable[Basis]) -> None:
        """Remove every basis except those given."""
        wanted = set(used)
        self._bases = [basis for basis in self._bases if basis in wanted]

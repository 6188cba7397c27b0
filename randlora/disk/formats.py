"""Files that may contain anything: JSON and safetensors, read strictly and with limits, and written in pieces.

The safetensors package checks a file's header. Values are not read through it: it maps files into memory, where a file
that shrinks meanwhile, or a disk that fails, ends the process. Nor are they written by it, which needs all at once.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import BufferedReader
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from randlora.errors import CheckpointError

METADATA = {"format": "pt"}  # what transformers and PEFT expect in every safetensors file

MOST_BYTES = 2**24  # of a JSON file that is read: 16 MiB, enough for 100,000 names of layers
DEEPEST = 64  # what is nested deeper cannot be written again: Python's encoder recurses
MOST_DIGITS = 309  # of an integer, as many as the largest float has

PIECE_BYTES = 2**20  # small enough to remain in the processor's cache from reading to writing
LENGTH_BYTES = 8  # a file begins with the length of its header, little-endian
MOST_HEADER_BYTES = 100_000_000  # as in the package
ALIGNMENT = 8  # of the first tensor, in bytes
LONGEST_NAME = 4096  # of a tensor: as long as a path, whose parts the name of a module has
MOST_DIMS = 64  # with which torch computes
MOST_ENTRIES = 2**63 - 1  # of a tensor, which torch counts without those dims that are 0

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""Dtypes by their names in safetensors, in its order: a file begins with the tensors of the last of these."""

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(TORCH_DTYPES.values())}


def is_there(path: Path) -> bool:
    """Whether anything exists under this name, which may be any text."""
    try:
        path.stat()
    except (OSError, ValueError):  # `Path.exists` raises some of them
        return False
    return True


def require_regular(path: Path) -> os.stat_result:
    """Return the status of a file. A pipe, which may have no writer, or a device, without end, raises an error."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is a directory, a pipe or a device: expected a file")
    return status


def open_regular(path: Path) -> BufferedReader:
    """Open a file, or a link to one, to read it, after `require_regular`: a device may act when it is opened."""
    require_regular(path)
    return path.open("rb")


def path_of(file: BufferedReader, path: Path) -> Path:
    """Return a path of an open file that stays valid if its own path is replaced, on systems with such paths."""
    opened = Path(f"/dev/fd/{file.fileno()}")
    return opened if opened.exists() else path


def read_json(path: Path, *, is_lenient: bool = False) -> Any:
    """Return the contents of a JSON file of at most 16 MiB; see `parse_json`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_BYTES:
            raise CheckpointError(f"{path} has {size:,} bytes, expected at most {MOST_BYTES:,}: it is a different file")
        return parse_json(file.read(size).decode("utf-8"), is_lenient=is_lenient)


def parse_json(text: str, *, is_lenient: bool = False) -> Any:
    """Return the value of a JSON text, or raise a `ValueError` if it, or NaN unless lenient, could not be rewritten."""
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from error
    _require_flat(value)
    json.dumps(value, allow_nan=is_lenient, ensure_ascii=False).encode()
    return value


def _integer(text: str) -> int:
    if len(text.removeprefix("-")) > MOST_DIGITS:
        raise ValueError(f"it has an integer of {len(text)} digits, which is too large")
    return int(text)


def _require_flat(value: Any) -> None:
    level: list[Any] = [[value]]
    for _ in range(DEEPEST + 1):
        children = (child for parent in level for child in (parent.values() if isinstance(parent, dict) else parent))
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {DEEPEST} levels")


@dataclass(frozen=True)
class Entry:
    """One tensor in a file, as the header describes it. ``offset`` is the position of its first byte in the file."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """The header of one safetensors file, with its tensors in the order of their bytes."""

    path: Path
    entries: tuple[Entry, ...]
    metadata: dict[str, str]


def read_shard(path: Path) -> Shard:
    """Return the header of a safetensors file, after checking that the file is whole and has known dtypes."""
    with open_shard(path) as (shard, _):
        return shard


@contextmanager
def open_shard(path: Path) -> Iterator[tuple[Shard, BufferedReader]]:
    """Open a safetensors file and yield its header and the open file; an error of the disk is a `CheckpointError`."""
    try:
        with open_regular(path) as file:
            yield _read_header(path, file), file
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}): get an undamaged copy") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot read {path} ({error.strerror or error})")


def _read_header(path: Path, file: BufferedReader) -> Shard:
    length, size = int.from_bytes(file.read(LENGTH_BYTES), "little"), os.fstat(file.fileno()).st_size
    if not 0 < length <= min(MOST_HEADER_BYTES, size - LENGTH_BYTES):  # before all of it is mapped
        raise SafetensorError(f"its header has {length:,} of {size:,} bytes, expected at most {MOST_HEADER_BYTES:,}")
    with safe_open(path_of(file, path), framework="np") as header:  # "pt" would ask for as much memory
        parts = [(name, header.get_slice(name)) for name in header.offset_keys()]
        tensors = [(name, part.get_dtype(), part.get_shape()) for name, part in parts]
        return shard_of(path, tensors, header.metadata(), LENGTH_BYTES + length)


def shard_of(
    path: Path, tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None, start: int = 0
) -> Shard:
    """Return a header, given name, dtype and shape of each tensor in the order of their bytes, from ``start`` on."""
    entries = []
    for name, dtype, sizes in tensors:
        shape, where = tuple(sizes), f"{name:.60} in {path} has"
        if dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{where} dtype {dtype}, which torch does not have: save it in a different dtype")
        if len(name) > LONGEST_NAME:
            raise CheckpointError(f"{where} a name of {len(name)} characters: expected at most {LONGEST_NAME}")
        if len(shape) > MOST_DIMS or math.prod(size or 1 for size in shape) > MOST_ENTRIES:
            raise CheckpointError(f"{where} a shape that no tensor has, {shape!r:.200}: get an undamaged copy")
        nbytes = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
        entries.append(Entry(name, path, TORCH_DTYPES[dtype], shape, start, nbytes))
        start += nbytes
    return Shard(path, tuple(entries), dict(metadata or {}))


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the memory of a contiguous tensor as a flat uint8 view."""
    return tensor.detach().flatten().view(torch.uint8)


def read_tensor(entry: Entry, file: BufferedReader | None = None) -> Tensor:
    """Read one tensor into new memory, from its open file if one is given."""
    return next(read_pieces(entry, file, entry.nbytes)).reshape(entry.shape)


def read_pieces(entry: Entry, file: BufferedReader | None = None, nbytes: int | None = None) -> Iterator[Tensor]:
    """Read one tensor as flat pieces of ``nbytes``, 1 MiB by default, each into new memory."""
    step = nbytes or PIECE_BYTES
    try:
        with open_regular(entry.file) if file is None else nullcontext(file) as opened:
            opened.seek(entry.offset)
            for start in range(0, max(entry.nbytes, 1), step):
                piece = torch.empty(min(step, entry.nbytes - start), dtype=torch.uint8, device="cpu")
                if opened.readinto(piece.numpy().data) < len(piece):
                    raise CheckpointError(f"{entry.file} ends within {entry.name}: it was truncated while it was read")
                yield piece.view(entry.dtype)
    except OSError as error:
        raise _unreadable(entry.file, error) from error
    except RuntimeError as error:  # of torch, for more memory than there is
        raise CheckpointError(f"{entry.name} in {entry.file} has {entry.nbytes:,} bytes, too many: {error}") from error


@dataclass(frozen=True, eq=False)
class Planned:
    """A tensor to be written. ``pieces``, called when it is written, returns its parts in order."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> Planned:
        """Plan to write a tensor that is in memory."""
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: (tensor,))

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Return all of it, in memory."""
        pieces = [piece.flatten() for piece in self.pieces()]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(self.shape)


class TensorFile:
    """A safetensors file whose tensors are written one by one, in any order, and its header at the end of the block."""

    def __init__(self, path: Path, tensors: Iterable[Planned], metadata: Callable[[], Mapping[str, str]]) -> None:
        """Plan a file with these tensors."""
        self.tensors = sorted(tensors, key=lambda tensor: (-_ORDER[tensor.dtype], tensor.name))
        self._path, self._metadata = path, metadata
        self._length = len(header_bytes(self.tensors, metadata()))
        ends = accumulate((tensor.nbytes for tensor in self.tensors), initial=self._length)
        self._starts = {tensor.name: start for tensor, start in zip(self.tensors, ends, strict=False)}

    def __enter__(self) -> Self:
        self._file = self._path.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write the header, unless the block raised, and close the file."""
        with self._file:
            if kind is None:
                header = header_bytes(self.tensors, self._metadata())
                assert len(header) == self._length, "the tensors have their places"
                self._write_at(0, header)

    def write(self, tensor: Planned, wrote: Callable[[int, str], object] | None = None) -> None:
        """Write a tensor. ``wrote`` is called after each piece with its size in bytes and the name of its tensor."""
        start = self._starts[tensor.name]
        end = start + tensor.nbytes
        for piece in tensor.pieces():
            assert piece.dtype == tensor.dtype, f"{tensor.name} was planned as {tensor.dtype}"
            data = bytes_of(piece.contiguous()).numpy().data
            self._write_at(start, data)
            start += len(data)
            if wrote is not None:
                wrote(len(data), tensor.name)
        assert start == end, f"{tensor.name} does not have the size that it was planned with"

    def _write_at(self, start: int, data: bytes | memoryview) -> None:
        self._file.seek(start)
        self._file.write(data)


def write_tensor_file(
    path: Path,
    tensors: Iterable[Planned],
    metadata: Mapping[str, str],
    wrote: Callable[[int, str], object] | None = None,
) -> None:
    """Write a safetensors file from tensors in any order, one by one; ``wrote`` is as for `TensorFile.write`."""
    with TensorFile(path, tensors, lambda: metadata) as file:
        for tensor in file.tensors:
            file.write(tensor, wrote)


def header_bytes(tensors: Sequence[Planned], metadata: Mapping[str, str]) -> bytes:
    """Return the length and the header of a file with these tensors in this order."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    ends = accumulate((tensor.nbytes for tensor in tensors), initial=0)
    for tensor, offsets in zip(tensors, pairwise(ends), strict=True):
        name = _NAMES[tensor.dtype]
        header[tensor.name] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": list(offsets)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text

"""Files that may contain anything: JSON and safetensors, read strictly and with limits, and written in pieces.

Only regular files are opened: a pipe may have no writer, and a device no end. Values of JSON that nest too deep or are
not Unicode could not be written again.

The safetensors package maps files into memory, where each page that was read counts as memory of the process, and it
writes a file only from tensors that are all in memory. Here values are read as from any other file, and a file is
written piece by piece, byte for byte as the package would write it.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from randlora.errors import CheckpointError

FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)

KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
    stat.S_IFSOCK: "a socket",
}

MOST_BYTES = 2**24
"""The largest JSON file that is read: 16 MiB, enough for 100,000 names of layers."""
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


def open_regular(path: Path) -> FileIO:
    """Open a regular file, or a link to one, to read it without a buffer.

    A pipe, a device, a directory or a socket raises a `CheckpointError`.
    """
    require_regular(path)  # before it is opened, which a device may act upon
    file = FileIO(os.open(path, FLAGS))
    try:
        _require_regular(path, os.fstat(file.fileno()))  # another may have its name by now
    except CheckpointError:
        file.close()
        raise
    return file


def read_regular(path: Path, most: int) -> bytes:
    """Return the contents of a regular file of at most ``most`` bytes. Raises the errors of `open_regular`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise CheckpointError(
                f"{path} has {size:,} bytes, expected at most {most:,}: it is not the file that was meant"
            )
        return file.read(size)


def is_there(path: Path) -> bool:
    """Whether anything exists under this name, which may be any text."""
    try:
        path.stat()
    except (OSError, ValueError):  # `Path.exists` raises some of them
        return False
    return True


def path_of(file: FileIO, path: Path) -> Path:
    """Return a path of an open file that stays valid if its own path is replaced, on systems with such paths."""
    opened = Path(f"/dev/fd/{file.fileno()}")
    return opened if opened.exists() else path


def require_regular(path: Path) -> os.stat_result:
    """Return the status of a regular file, or of one that a link leads to. Raises the errors of `open_regular`."""
    try:
        found = path.stat()
    except ValueError as error:  # a name that no system has
        raise CheckpointError(f"there is no file {str(path)!r} ({error})") from error
    _require_regular(path, found)
    return found


def _require_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "no file")
        raise CheckpointError(f"{path} is {kind}: expected a file")


def read_json(path: Path, *, is_lenient: bool = False) -> Any:
    """Return the contents of a JSON file of at most 16 MiB; see `parse_json`. Raises the errors of `open_regular`."""
    return parse_json(read_regular(path, MOST_BYTES).decode("utf-8"), is_lenient=is_lenient)


def parse_json(text: str, *, is_lenient: bool = False) -> Any:
    """Return the value of a JSON text.

    A `ValueError` is raised for nesting deeper than 64 levels, integers of more than 309 digits, and strings that are
    not Unicode. Unless ``is_lenient`` (for the files of a base model, which may have them), NaN, infinite numbers and
    repeated keys raise it too.
    """
    strict: dict[str, Any] = {"object_pairs_hook": _object, "parse_constant": _constant, "parse_float": _float}
    try:
        value = json.loads(text, parse_int=_integer, **({} if is_lenient else strict))
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from error
    _require_flat(value)
    if "\\ud" in text or "\\uD" in text:  # only an escape can be half of a character
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has {name!r:.200} twice")
    return found


def _constant(text: str) -> float:
    raise ValueError(f"it has {text}, which is not JSON")


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it has the number {text:.40}, which is too large")
    return number


def _integer(text: str) -> int:
    if len(text.removeprefix("-")) > MOST_DIGITS:
        raise ValueError(f"it has an integer of {len(text)} digits, which is too large")
    return int(text)


def _require_flat(value: Any) -> None:
    level: list[Any] = [[value]]
    for _ in range(DEEPEST + 1):
        children = (child for held in level for child in (held.values() if isinstance(held, dict) else held))
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
def open_shard(path: Path) -> Iterator[tuple[Shard, FileIO]]:
    """Open a safetensors file and yield its header and the open file, which `read_tensor` and `read_pieces` take.

    If reading the file fails within the block, a `CheckpointError` is raised too.
    """
    try:
        with open_regular(path) as raw:
            yield _header(path, raw), raw
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}): get an undamaged copy") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror or error})") from error


def _header(path: Path, raw: FileIO) -> Shard:
    length, size = int.from_bytes(raw.read(LENGTH_BYTES), "little"), os.fstat(raw.fileno()).st_size
    if not 0 < length <= min(MOST_HEADER_BYTES, size - LENGTH_BYTES):
        told = f"its header has {length:,} of {size:,} bytes, expected at most {MOST_HEADER_BYTES:,}"
        raise CheckpointError(f"{path} is truncated or damaged ({told}): get an undamaged copy")
    with safe_open(path_of(raw, path), framework="np"):  # checks that both fit; "pt" would ask for as much memory
        pass
    try:
        header = parse_json(raw.read(length).decode())
    except ValueError as error:
        raise CheckpointError(f"the header of {path} is damaged ({error}): get an undamaged copy") from error
    return shard_of(path, header, LENGTH_BYTES + length)


def shard_of(path: Path, header: Mapping[str, Any], start: int) -> Shard:
    """Return a file, given the JSON of its header and the byte ``start`` at which the tensors begin."""
    tensors = {name: facts for name, facts in header.items() if name != "__metadata__"}
    entries = [_entry(path, name, facts, start) for name, facts in tensors.items()]
    in_order = sorted(entries, key=lambda entry: (entry.offset, entry.nbytes))
    return Shard(path, tuple(in_order), header.get("__metadata__") or {})


def _entry(path: Path, name: str, facts: Mapping[str, Any], start: int) -> Entry:
    if facts["dtype"] not in TORCH_DTYPES:
        raise CheckpointError(
            f"{name} in {path} has dtype {facts['dtype']}, which this library does not know: save it in a different "
            "dtype"
        )
    first, end = facts["data_offsets"]
    shape = tuple(facts["shape"])
    if len(name) > LONGEST_NAME:
        raise CheckpointError(
            f"{name:.60}… in {path} has a name of {len(name)} characters: expected at most {LONGEST_NAME}"
        )
    if len(shape) > MOST_DIMS or math.prod(size or 1 for size in shape) > MOST_ENTRIES:
        raise CheckpointError(f"{name} in {path} has a shape that no tensor has, {shape!r:.200}: get an undamaged copy")
    return Entry(name, path, TORCH_DTYPES[facts["dtype"]], shape, start + first, end - first)


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the memory of a contiguous tensor as a flat uint8 view."""
    return tensor.detach().flatten().view(torch.uint8)


def read_tensor(entry: Entry, raw: FileIO | None = None) -> Tensor:
    """Read one tensor into new memory, from its open file if one is given."""
    return next(read_pieces(entry, raw, max(entry.nbytes, 1))).reshape(entry.shape)


def read_pieces(entry: Entry, raw: FileIO | None = None, nbytes: int | None = None) -> Iterator[Tensor]:
    """Read one tensor as flat pieces of ``nbytes``, 1 MiB by default. Each is valid until the next one is read."""
    step = PIECE_BYTES if nbytes is None else nbytes
    try:
        buffer = torch.empty(min(entry.nbytes, step), dtype=torch.uint8, device="cpu")
    except RuntimeError as error:
        raise CheckpointError(f"{entry.name} in {entry.file} has {entry.nbytes:,} bytes, too many: {error}") from error
    with open_regular(entry.file) if raw is None else nullcontext(raw) as file:
        file.seek(entry.offset)
        for start in range(0, max(entry.nbytes, 1), step):
            piece = buffer[: entry.nbytes - start]
            try:
                is_whole = _read_fully(file, piece.numpy().data)
            except OSError as error:
                raise CheckpointError(f"cannot read {entry.file} ({error.strerror or error})") from error
            if not is_whole:
                raise CheckpointError(
                    f"{entry.file} ends within {entry.name}: it was truncated while it was being read"
                )
            yield piece.view(entry.dtype)


def _read_fully(file: FileIO, view: memoryview) -> bool:
    """Fill a buffer. A system call may read less than asked for, and at most 2 GB."""
    while len(view):
        count = file.readinto(view)
        if not count:
            return False
        view = view[count:]
    return True


def is_equal(entry: Entry, tensor: Tensor, raw: FileIO | None = None) -> bool:
    """Whether a tensor in a file equals a contiguous one on the CPU, bit for bit. It is read in pieces."""
    if (entry.dtype, entry.shape) != (tensor.dtype, tuple(tensor.shape)):
        return False
    pieces = bytes_of(tensor).split(PIECE_BYTES)
    return all(torch.equal(bytes_of(read), own) for read, own in zip(read_pieces(entry, raw), pieces, strict=True))


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
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        """Return all of it, in memory."""
        pieces = [piece.flatten() for piece in self.pieces()]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(self.shape)


class TensorFile:
    """A safetensors file whose tensors are written one by one, in any order, each to its place.

    It is open within a ``with`` block, and complete when all tensors have been written.
    """

    def __init__(self, path: Path, tensors: Iterable[Planned], metadata: Mapping[str, str]) -> None:
        """Plan a file. ``tensors`` are all that it will have, and of the metadata only the length must stay."""
        self.tensors = sorted(tensors, key=lambda tensor: (-_ORDER[tensor.dtype], tensor.name))
        self._path, self._header = path, header_bytes(self.tensors, metadata)
        ends = accumulate((tensor.nbytes for tensor in self.tensors), initial=len(self._header))
        self._starts = {tensor.name: start for tensor, start in zip(self.tensors, ends, strict=False)}

    def __enter__(self) -> Self:
        """Create the file, with its header."""
        self._file = self._path.open("wb", buffering=0)
        try:
            self._write_at(0, self._header)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._file.close()

    def write(self, tensor: Planned, wrote: Callable[[int, str], object] | None = None) -> None:
        """Write a tensor. ``wrote`` is called after each piece with its size in bytes and the name of its tensor."""
        start = self._starts[tensor.name]
        end = start + tensor.nbytes
        for piece in tensor.pieces():
            assert piece.dtype == tensor.dtype, f"{tensor.name} was planned as {tensor.dtype}"
            view = bytes_of(piece.contiguous()).numpy().data
            self._write_at(start, view)
            start += len(view)
            if wrote is not None:
                wrote(len(view), tensor.name)
        assert start == end, f"{tensor.name} does not have the size that it was planned with"

    def write_metadata(self, metadata: Mapping[str, str]) -> None:
        """Replace the metadata by others that are as long, such as with a checksum that is known at the end."""
        header = header_bytes(self.tensors, metadata)
        assert len(header) == len(self._header), "the tensors have their places"
        self._write_at(0, header)

    def _write_at(self, start: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        self._file.seek(start)
        while view:
            view = view[self._file.write(view) or 0 :]


def write_tensor_file(
    path: Path,
    tensors: Iterable[Planned],
    metadata: Mapping[str, str],
    wrote: Callable[[int, str], object] | None = None,
) -> None:
    """Write a safetensors file from tensors in any order, one by one; ``wrote`` is as for `TensorFile.write`."""
    with TensorFile(path, tensors, metadata) as file:
        for tensor in file.tensors:
            file.write(tensor, wrote)


def header_bytes(tensors: Sequence[Planned], metadata: Mapping[str, str]) -> bytes:
    """Return the length and the header of a file with these tensors in this order."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for tensor in tensors:
        end = start + tensor.nbytes
        name = _NAMES[tensor.dtype]
        header[tensor.name] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text

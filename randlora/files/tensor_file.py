"""The bytes of tensors in safetensors files, read and written some at a time.

The library of that name writes a file from tensors that are all in memory. Its format is the length of a header, the
header as JSON, and the tensors one after the other, which this writes piece by piece: byte for byte what the library
would.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from randlora.checkpoint.tensors_file import DTYPES, LENGTH_BYTES, Entry
from randlora.errors import CheckpointError

CHUNK_BYTES = 1 << 20  # small enough to be in the processor's cache from reading to writing
ALIGNMENT = 8  # of the first tensor's place, in bytes

Write = Callable[[memoryview], int | None]

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True, eq=False)
class Planned:
    """A tensor to be written.

    Attributes:
        name: Its name.
        dtype: Its dtype.
        shape: Its shape.
        pieces: Yields the parts of it, in order, when it is its turn.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def read_tensor(entry: Entry) -> Tensor:
    """Read one tensor into memory of its own.

    Raises:
        CheckpointError: When the file ends before it does.
    """
    return next(_read(entry, max(entry.nbytes, 1))).reshape(entry.shape)


def read_pieces(entry: Entry) -> Iterator[Tensor]:
    """Read one tensor as flat pieces, so that a large one never is in memory whole; a piece lasts until the next.

    Raises:
        CheckpointError: When the file ends before the tensor does.
    """
    return _read(entry, CHUNK_BYTES)


def _read(entry: Entry, step: int) -> Iterator[Tensor]:
    buffer = torch.empty(min(entry.nbytes, step), dtype=torch.uint8)
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        for start in range(0, max(entry.nbytes, 1), step):
            piece = buffer[: entry.nbytes - start]
            if not _read_fully(file.readinto, piece.numpy().data):
                raise CheckpointError(f"{entry.file} ends within {entry.name}: it was cut while it was read")
            yield piece.view(entry.dtype)


def _read_fully(readinto: Callable[[memoryview], int | None], view: memoryview) -> bool:
    """Fill a buffer; one call to the system need not, and gives at most 2 GB."""
    while len(view):
        count = readinto(view)
        if not count:
            return False
        view = view[count:]
    return True


def write_tensor_file(
    path: Path, tensors: Sequence[Planned], metadata: Mapping[str, str], wrote: Callable[[int, str], object]
) -> None:
    """Write a safetensors file tensor by tensor, and make sure that it is on the disk.

    Args:
        path: A file that does not exist yet.
        tensors: What it shall hold, in any order.
        metadata: Strings for its header.
        wrote: Told after each piece how many bytes it had, and of which tensor.

    Raises:
        OSError: When the disk refuses.
    """
    ordered = sorted(tensors, key=lambda tensor: (-_ORDER[tensor.dtype], tensor.name))
    try:
        with path.open("xb", buffering=0) as file:
            _write_fully(file.write, memoryview(dump_header(ordered, metadata)))
            for tensor in ordered:
                _write_tensor(file.write, tensor, wrote)
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or os.fspath(path)  # which a full disk does not name
        raise


def _write_tensor(write: Write, tensor: Planned, wrote: Callable[[int, str], object]) -> None:
    left = tensor.nbytes
    for piece in tensor.pieces():
        assert piece.dtype == tensor.dtype, f"{tensor.name} was planned as {tensor.dtype}"
        view = piece.contiguous().reshape(-1).view(torch.uint8).numpy().data
        _write_fully(write, view)
        left -= len(view)
        wrote(len(view), tensor.name)
    assert left == 0, f"{tensor.name} has not the size it was planned with"


def _write_fully(write: Write, view: memoryview) -> None:
    while len(view):
        view = view[write(view) or 0 :]


def dump_header(tensors: Iterable[Planned], metadata: Mapping[str, str]) -> bytes:
    """Write the length and the header of a file that holds these tensors in this order."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for tensor in tensors:
        end = start + tensor.nbytes
        header[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text

"""What safetensors files hold, and reading one tensor by tensor, so that no more is in memory than somebody keeps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from randlora.errors import CheckpointError

CHUNK_BYTES = 2**20
LENGTH_BYTES = 8  # a file begins with the length of its header, little-endian

DTYPES: dict[str, torch.dtype] = {
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
"""What safetensors calls torch's dtypes, in its order: a file holds the last of these first."""


@dataclass(frozen=True)
class Entry:
    """One tensor, as the header of its file describes it.

    Attributes:
        name: Its name in the file.
        file: The file.
        dtype: Its dtype.
        shape: Its shape.
        offset: Where its bytes begin in the file.
        nbytes: How many there are.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file.

    Attributes:
        path: The file.
        entries: Its tensors, in the order of their bytes.
        metadata: The strings that its header carries.
    """

    path: Path
    entries: tuple[Entry, ...]
    metadata: dict[str, str]


@dataclass(frozen=True, eq=False)
class TensorsFile:
    """An open safetensors file.

    The library safetensors hands out mapped memory, of which every page once looked at counts as this process's until
    all is closed, and which need not be aligned. So values are read from the file as from any other.

    Attributes:
        entries: Its tensors, by sorted names.
        metadata: The strings that its header carries.
    """

    entries: dict[str, Entry]
    metadata: dict[str, str]
    _raw: BufferedReader

    def read(self, name: str) -> Tensor:
        """Read one tensor into memory of its own.

        Raises:
            OSError: When the file has become too short for it.
        """
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self._raw.seek(entry.offset)
        self._fill(as_bytes(tensor))
        return tensor

    def repeats(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor is one already read, bit for bit; a chunk of it is in memory at a time.

        Args:
            name: The tensor's name.
            tensor: What `read` returned for another name.

        Raises:
            OSError: When the file has become too short for it.
        """
        entry = self.entries[name]
        if (entry.dtype, entry.shape) != (tensor.dtype, tuple(tensor.shape)):
            return False
        self._raw.seek(entry.offset)
        expected, chunk = as_bytes(tensor), np.empty(CHUNK_BYTES, dtype=np.uint8)
        for start in range(0, len(expected), CHUNK_BYTES):
            part = expected[start : start + CHUNK_BYTES]
            if not np.array_equal(self._fill(chunk[: len(part)]), part):
                return False
        return True

    def _fill(self, memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self._raw.readinto(memory.data) != len(memory):
            raise OSError("it has become shorter while it was read")
        return memory


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorsFile]:
    """Open a safetensors file and check its header.

    Args:
        path: The file.

    Raises:
        CheckpointError: When it is truncated or no safetensors file, even where that shows only while it is read.
    """
    with _opened(path) as raw:
        shard = _header(path, raw)
        entries = {entry.name: entry for entry in sorted(shard.entries, key=lambda entry: entry.name)}
        yield TensorsFile(entries, shard.metadata, raw)


def read_shard(path: Path) -> Shard:
    """Read the header of a safetensors file.

    Args:
        path: The file.

    Raises:
        CheckpointError: When it is truncated or no safetensors file, or holds a dtype that torch does not have.
    """
    with _opened(path) as raw:
        return _header(path, raw)


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    try:
        with path.open("rb") as raw:
            yield raw
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}): get an undamaged copy") from error


def _header(path: Path, raw: BufferedReader) -> Shard:
    with safe_open(path, framework="np"):  # checks that header and file fit; "pt" would ask for as much memory
        pass
    length = int.from_bytes(raw.read(LENGTH_BYTES), "little")
    header = json.loads(raw.read(length))
    metadata = header.pop("__metadata__", None) or {}
    entries = [_entry(path, name, facts, LENGTH_BYTES + length) for name, facts in header.items()]
    return Shard(path, tuple(sorted(entries, key=lambda entry: (entry.offset, entry.nbytes))), metadata)


def _entry(path: Path, name: str, facts: Mapping[str, Any], start: int) -> Entry:
    if facts["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{name} in {path} has dtype {facts['dtype']}, which this library does not know: save it in another"
        )
    first, end = facts["data_offsets"]
    return Entry(name, path, DTYPES[facts["dtype"]], tuple(facts["shape"]), start + first, end - first)


def as_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """Look at the memory of a contiguous tensor on the CPU."""
    found: NDArray[np.uint8] = tensor.detach().flatten().view(torch.uint8).numpy()
    return found

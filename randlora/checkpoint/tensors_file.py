"""A safetensors file read tensor by tensor, so that no more of it is in memory than somebody keeps."""

from __future__ import annotations

import json
from collections.abc import Iterator
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


@dataclass(frozen=True, eq=False)
class TensorsFile:
    """An open safetensors file.

    The library safetensors checks the header and says what each tensor is. It hands out mapped memory, of which every
    page once looked at counts as this process's until all is closed, and which need not be aligned. So values are read
    from the file as from any other.

    Attributes:
        keys: Names of the tensors, sorted.
        metadata: The texts in its header.
    """

    keys: tuple[str, ...]
    metadata: dict[str, str]
    _mapped: Any
    _raw: BufferedReader
    _entries: dict[str, dict[str, Any]]
    _start: int

    def read(self, key: str) -> Tensor:
        """Read one tensor into memory of its own.

        Raises:
            OSError: When the file has become too short for it.
        """
        tensor = torch.empty_like(self._mapped.get_tensor(key))  # of the mapped one only dtype and shape are looked at
        self._seek(key)
        self._fill(as_bytes(tensor))
        return tensor

    def repeats(self, key: str, first: str, tensor: Tensor) -> bool:
        """Whether a tensor is another one of the file again, bit for bit; a chunk of it is in memory at a time.

        Args:
            key: The tensor's name.
            first: The other one's name.
            tensor: What `read` returned for that.

        Raises:
            OSError: When the file has become too short for it.
        """
        if any(self._entries[key][fact] != self._entries[first][fact] for fact in ("dtype", "shape")):
            return False
        self._seek(key)
        expected, chunk = as_bytes(tensor), np.empty(CHUNK_BYTES, dtype=np.uint8)
        for start in range(0, len(expected), CHUNK_BYTES):
            part = expected[start : start + CHUNK_BYTES]
            if not np.array_equal(self._fill(chunk[: len(part)]), part):
                return False
        return True

    def _seek(self, key: str) -> None:
        self._raw.seek(self._start + self._entries[key]["data_offsets"][0])

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
    try:
        with path.open("rb") as raw, safe_open(path, framework="pt") as mapped:
            length = int.from_bytes(raw.read(LENGTH_BYTES), "little")
            entries = json.loads(raw.read(length))
            keys = tuple(sorted(mapped.keys()))
            yield TensorsFile(keys, mapped.metadata() or {}, mapped, raw, entries, LENGTH_BYTES + length)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}): get an undamaged copy") from error


def as_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """Look at the memory of a contiguous tensor on the CPU."""
    found: NDArray[np.uint8] = tensor.detach().flatten().view(torch.uint8).numpy()
    return found

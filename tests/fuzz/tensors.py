"""Safetensors files taken apart and put together by code of our own, so that any contradiction can be written.

Also the seal of our header, computed as the format says: SHA-256 over the JSON with sorted keys, then over name, dtype,
shape and bytes of every tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "F32": 4}
SIZES |= {"I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8}
TORCH = {"F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16", "F64": "torch.float64"}
TORCH |= {"U8": "torch.uint8", "I8": "torch.int8", "BOOL": "torch.bool", "I64": "torch.int64"}
LARGEST = 2**16


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: its dtype by the format's name, its shape, and its bytes."""

    dtype: str
    shape: Sequence[int]
    data: bytes

    def with_dtype(self, dtype: str) -> StoredTensor:
        """Return a tensor of the same shape and another dtype, and of the size that goes with it."""
        return replace(self, dtype=dtype).with_shape(self.shape)

    def with_shape(self, shape: Sequence[int]) -> StoredTensor:
        """Return a tensor of another shape, and of the size that goes with it, if that is a size to write at all."""
        size = math.prod(shape) * SIZES.get(self.dtype, 1)
        return replace(self, shape=list(shape), data=self._of_size(size) if 0 <= size < LARGEST else self.data)

    def with_data(self, data: bytes) -> StoredTensor:
        """Return a tensor with other bytes."""
        return replace(self, data=data)

    def _of_size(self, size: int) -> bytes:
        source = self.data or b"\0\0\x80\x3f"
        return (source * (size // len(source) + 1))[:size]


@dataclass
class TensorFile:
    """The contents of a file."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def parse(data: bytes) -> TensorFile | None:
    """Return the contents of a file, or ``None`` if it is too damaged for that."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        values = data[8 + length :]
        metadata = header.pop("__metadata__", {})
        tensors = {
            name: StoredTensor(facts["dtype"], list(facts["shape"]), values[slice(*facts["data_offsets"])])
            for name, facts in header.items()
        }
        for tensor in tensors.values():
            if not isinstance(tensor.dtype, str) or not all(isinstance(side, int) for side in tensor.shape):
                return None
        return TensorFile(tensors, {str(key): str(text) for key, text in metadata.items()})
    except (AttributeError, KeyError, LookupError, RecursionError, TypeError, ValueError):
        return None


def unparse(file: TensorFile, edit: Callable[[Any], Any] = lambda header: header) -> bytes:
    """Return the bytes of a file, whose header is edited before it is written."""
    ordered = sorted(file.tensors.items(), key=lambda item: -SIZES.get(item[1].dtype, 1))
    header: dict[str, Any] = {"__metadata__": file.metadata} if file.metadata else {}
    start = 0
    for name, tensor in ordered:
        offsets = [start, start + len(tensor.data)]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        start = offsets[1]
    text = json.dumps(edit(header), separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(tensor.data for _, tensor in ordered)


def reseal(file: TensorFile) -> None:
    """Give our header the checksum that goes with its facts and the tensors, if there is one."""
    try:
        facts = json.loads(file.metadata["randlora"])
        facts.pop("sha256", None)
        file.metadata["randlora"] = json.dumps({**facts, "sha256": seal(facts, file.tensors)})
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return


def seal(facts: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> str:
    """Return the checksum of a header and of tensors, in which copies of bases count once."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    ours = {_own_name(name): tensor for name, tensor in sorted(tensors.items(), reverse=True)}
    for name, tensor in sorted(ours.items()):
        dtype = TORCH.get(tensor.dtype, tensor.dtype)
        digest.update(f"\n{name} {dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.data)
    return digest.hexdigest()


def _own_name(name: str) -> str:
    last = name.rsplit(".", 1)[-1]
    return f"base_model.{last}" if last in {"randlora_A", "randlora_B"} else name

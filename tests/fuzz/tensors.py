"""Safetensors files taken apart and put together by code of our own, so that any contradiction can be written."""

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "F32": 4}
SIZES |= {"I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8}
TORCH = {"F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16", "F64": "torch.float64"}
TORCH |= {"U8": "torch.uint8", "I8": "torch.int8", "BOOL": "torch.bool", "I64": "torch.int64"}
LARGEST = 2**16


class Stored(NamedTuple):
    """One tensor: its dtype by the format's name, its shape, and its bytes."""

    dtype: str
    shape: list[int]
    data: bytes

    def resized(self) -> "Stored":
        """Return it with the bytes that its dtype and its shape take, if that is a size to write at all."""
        size = math.prod(self.shape) * SIZES.get(self.dtype, 1)
        source = self.data or b"\0\0\x80\x3f"
        return self._replace(data=(source * (size // len(source) + 1))[:size]) if 0 <= size < LARGEST else self


class TensorFile(NamedTuple):
    """The contents of a file, to be changed."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]


def parse(data: bytes) -> TensorFile | None:
    """Return the contents of a file, or ``None`` if it is too damaged for that."""
    try:
        length = int.from_bytes(data[:8], "little")
        header, values = json.loads(data[8 : 8 + length]), data[8 + length :]
        metadata = {str(key): str(text) for key, text in header.pop("__metadata__", {}).items()}
        tensors = {
            name: Stored(facts["dtype"], list(facts["shape"]), values[slice(*facts["data_offsets"])])
            for name, facts in header.items()
        }
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return None
    is_whole = all(
        isinstance(each.dtype, str) and all(isinstance(side, int) for side in each.shape) for each in tensors.values()
    )
    return TensorFile(tensors, metadata) if is_whole else None


def unparse(file: TensorFile, edit: Callable[[Any], Any] = lambda header: header) -> bytes:
    """Return the bytes of a file, whose header is edited before it is written."""
    ordered = sorted(file.tensors.items(), key=lambda item: -SIZES.get(item[1].dtype, 1))
    header: dict[str, Any] = {"__metadata__": file.metadata} if file.metadata else {}
    start = 0
    for name, tensor in ordered:
        offsets = [start, start := start + len(tensor.data)]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(edit(header), separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(tensor.data for _, tensor in ordered)


def reseal(file: TensorFile) -> None:
    """Give our header the checksum that goes with its facts and the tensors, if there is one.

    As the format says, that is SHA-256 over the JSON with sorted keys, then over name, dtype, shape and bytes of every
    tensor, where copies of bases count once.
    """
    try:
        facts = json.loads(file.metadata["randlora"])
        facts.pop("sha256", None)
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for name, tensor in sorted(
            {_own_name(name): each for name, each in sorted(file.tensors.items())[::-1]}.items()
        ):
            dtype = TORCH.get(tensor.dtype, tensor.dtype)
            digest.update(f"\n{name} {dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.data)
        file.metadata["randlora"] = json.dumps({**facts, "sha256": digest.hexdigest()})
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return


def _own_name(name: str) -> str:
    last = name.rsplit(".", 1)[-1]
    return f"base_model.{last}" if last in {"randlora_A", "randlora_B"} else name

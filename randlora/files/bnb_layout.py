"""Checkpoints of bitsandbytes: finding the tensors stored as codes, checking that they can be read, and reading them.

With 4-bit codes, two to a byte, come scales, tables, and a tensor of bytes that is JSON; with 8-bit codes come the
scales of the rows. The checks read headers and that JSON, and no other value.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from randlora.disk.tensor_file import Entry, read_tensor
from randlora.errors import CheckpointError, raise_collected
from randlora.layers import bnb_codes
from randlora.layers.bnb_codes import QUANT_TYPES

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
JSON = re.compile(r"(?P<weight>.+)\.(?P<part>quant_state\.bitsandbytes__(?P<kind>.+))", re.DOTALL)
TABLES, NESTED_TABLES = ("absmax", "quant_map"), ("nested_absmax", "nested_quant_map")
FIELDS = frozenset({"quant_type", "blocksize", "dtype", "shape"})
NESTED_FIELDS = frozenset({"nested_blocksize", "nested_dtype", "nested_offset"})
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
LEVELS, NESTED_LEVELS = 16, 256  # of codes, and of scales that are codes themselves

SCALES, FORMAT = "SCB", "weight_format"
IN_ROWS = 0  # the format of codes that are not reordered

PARTS = (*TABLES, *NESTED_TABLES, SCALES, FORMAT)
INCOMPLETE = "get a complete copy"
DAMAGED = "get an undamaged copy, or quantize the model again"
REPACKED = (
    "bitsandbytes wrote it after a forward pass on a CPU, for which it rounds and reorders scales: load the model "
    "again, and save it before it computes anything"
)


@dataclass(frozen=True, eq=False)
class StoredCodes:
    """A tensor that is stored as codes.

    Attributes:
        entry: The codes.
        parts: The tensors needed to read them, by their names without the codes' name.
        kind: ``"nf4"``, ``"fp4"`` or ``"8 bits"``.
        shape: The shape of the tensor that was quantized.
        dtype: Its dtype; ``None`` if the files do not say, as for 8 bits.
    """

    entry: Entry
    parts: Mapping[str, Entry]
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None

    @property
    def needs_bitsandbytes(self) -> bool:
        """Whether `read` needs bitsandbytes."""
        return self.kind in QUANT_TYPES

    def read(self) -> Tensor:
        """Return the dequantized tensor in float32, rounded once."""
        codes = read_tensor(self.entry)
        if not self.needs_bitsandbytes:
            return bnb_codes.write_out_8bit(codes, read_tensor(self.parts[SCALES]))
        from bitsandbytes.functional import QuantState  # noqa: PLC0415  # an optional extra

        state = QuantState.from_dict({name: read_tensor(part) for name, part in self.parts.items()}, device="cpu")
        # as one row: bitsandbytes 0.50 misreads blocks that continue in the next row on a CPU
        state.shape = torch.Size([2 * self.entry.nbytes])
        return bnb_codes.write_out_4bit(codes, state).flatten()[: math.prod(self.shape)].reshape(self.shape)


def find_codes(entries: Mapping[str, Entry]) -> dict[str, StoredCodes]:
    """Return the tensors of a checkpoint that bitsandbytes stored as codes, by name.

    Args:
        entries: The tensors of the checkpoint by name.

    Raises:
        CheckpointError: If something is missing, damaged or unknown. All problems are named.
    """
    found: dict[str, StoredCodes] = {}
    problems = []
    for name in entries:
        try:
            if (match := JSON.fullmatch(name)) is not None:
                found[match["weight"]] = _four_bits(entries, match)
            elif name.endswith(f".{SCALES}"):
                module = name.removesuffix(f".{SCALES}")
                found[f"{module}.weight"] = _eight_bits(entries, module)
        except CheckpointError as error:
            problems.append(str(error))
    raise_collected(CheckpointError, problems or _left_over(entries, found), doing="read the quantized tensors")
    return found


def _four_bits(entries: Mapping[str, Entry], match: re.Match[str]) -> StoredCodes:
    """Return 4-bit codes after checking them against their JSON."""
    weight, blob = match["weight"], entries[match[0]]
    if match["kind"] not in QUANT_TYPES:
        known = ", ".join(QUANT_TYPES)
        raise CheckpointError(f"{weight} in {blob.file} has codes of type {match['kind']!r}, expected one of {known}")
    fields = _fields(blob, match["kind"])
    needed = TABLES + (NESTED_TABLES if fields.keys() >= NESTED_FIELDS else ())
    _require(entries, blob, [weight, *(f"{weight}.{part}" for part in needed)])
    parts = {part: entries[f"{weight}.{part}"] for part in needed} | {match["part"]: blob}
    codes = StoredCodes(entries[weight], parts, match["kind"], tuple(fields["shape"]), FLOATS[fields["dtype"]])
    if problems := list(_misfits(codes, fields)):
        raise CheckpointError(f"in {codes.entry.file} {'; '.join(problems)}")
    return codes


def _fields(blob: Entry, kind: str) -> dict[str, Any]:
    """Return the JSON of 4-bit codes after checking it."""
    try:
        fields = json.loads(read_tensor(blob).view(torch.uint8).numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{blob.name} in {blob.file} cannot be read ({error}): {DAMAGED}") from error
    if not isinstance(fields, dict) or fields.keys() not in (FIELDS, FIELDS | NESTED_FIELDS):
        raise CheckpointError(
            f"{blob.name} in {blob.file} says {fields!r:.200}, expected {', '.join(sorted(FIELDS))} or these and "
            f"{', '.join(sorted(NESTED_FIELDS))}: {DAMAGED}"
        )
    rules = {"quant_type": lambda value: value == kind, **RULES}
    if wrong := [f"{name} = {value!r}" for name, value in fields.items() if not rules[name](value)]:
        raise CheckpointError(f"{blob.name} in {blob.file} says {', '.join(wrong)}, which cannot be: {DAMAGED}")
    return fields


def _is_size(value: object) -> bool:
    return type(value) is int and value >= 0  # JSON's true is an int too


def _is_block_size(value: object) -> bool:
    return _is_size(value) and value in BLOCK_SIZES


RULES: dict[str, Callable[[Any], bool]] = {
    "blocksize": _is_block_size,
    "dtype": lambda value: isinstance(value, str) and value in FLOATS,
    "shape": lambda value: isinstance(value, list) and all(map(_is_size, value)),
    "nested_blocksize": _is_block_size,
    "nested_dtype": lambda value: isinstance(value, str) and value in FLOATS,
    "nested_offset": lambda value: isinstance(value, float) and math.isfinite(value),
}
"""Which values the fields of the JSON may have."""


def _misfits(codes: StoredCodes, fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield which tensors contradict the JSON in size or dtype."""
    count, scales = math.prod(codes.shape), codes.parts["absmax"]
    blocks = -(-count // fields["blocksize"])
    if len(scales.shape) == 2 and scales.dtype == torch.bfloat16:
        yield f"{scales.name} has two dimensions and is in bfloat16: {REPACKED}"
        return
    shape = "x".join(map(str, codes.shape))
    if codes.entry.nbytes != (nbytes := -(-count // 2)):  # of any dtype
        yield f"{codes.entry.name} has {codes.entry.nbytes} bytes, expected {nbytes} for {shape}: {DAMAGED}"
    expected = {"quant_map": (LEVELS, torch.float32), "absmax": (blocks, torch.float32)}
    if "nested_absmax" in codes.parts:
        outer = -(-blocks // fields["nested_blocksize"])
        expected |= {"absmax": (blocks, torch.uint8), "nested_absmax": (outer, torch.float32)}
        expected["nested_quant_map"] = NESTED_LEVELS, torch.float32
    for part, (size, dtype) in expected.items():
        entry = codes.parts[part]
        if (found := math.prod(entry.shape)) != size or entry.dtype != dtype:
            yield f"{entry.name} has {found} of {entry.dtype}, expected {size} of {dtype} for {shape}: {DAMAGED}"


def _eight_bits(entries: Mapping[str, Entry], module: str) -> StoredCodes:
    """Return 8-bit codes after checking them against their scales."""
    scales, style = entries[f"{module}.{SCALES}"], entries.get(f"{module}.{FORMAT}")
    _require(entries, scales, [f"{module}.weight"])
    codes = entries[f"{module}.weight"]
    if codes.dtype != torch.int8 or len(codes.shape) != 2 or scales.shape != codes.shape[:1]:
        raise CheckpointError(
            f"{codes.name} in {codes.file} is {codes.dtype} of shape {codes.shape} with scales of shape "
            f"{scales.shape}, expected a matrix of torch.int8 with a scale for each row: {DAMAGED}"
        )
    parts = {SCALES: scales} | ({} if style is None else {FORMAT: style})  # the first versions wrote no format
    if style is not None and (found := read_tensor(style).flatten().tolist()) != [IN_ROWS]:
        raise CheckpointError(
            f"{style.name} in {style.file} holds {found}, expected {IN_ROWS}, for codes in their order: load and save "
            "the model with a newer bitsandbytes"
        )
    return StoredCodes(codes, parts, "8 bits", codes.shape)


def _require(entries: Mapping[str, Entry], part: Entry, names: list[str]) -> None:
    if missing := [name for name in names if name not in entries]:
        raise CheckpointError(f"{part.file} has {part.name} but nothing has {', '.join(missing)}: {INCOMPLETE}")


def _left_over(entries: Mapping[str, Entry], found: Mapping[str, StoredCodes]) -> list[str]:
    """Return which tensors of quantization belong to no codes."""
    used = {part.name for codes in found.values() for part in codes.parts.values()}
    return [
        f"{entry.file} has {name} without the codes that it belongs to: {INCOMPLETE}"
        for name, entry in entries.items()
        if name.endswith(tuple(f".{part}" for part in PARTS)) and name not in used
    ]

"""How bitsandbytes lays its codes out in a checkpoint: finding them, and checking that all is there to read them.

Beside codes of 4 bits stand scales, tables, and a tensor of bytes that is JSON; beside codes of 8 bits stand scales.
What they are shows from headers and that JSON. No other value is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from randlora.checkpoint.tensors_file import Entry
from randlora.errors import CheckpointError, raise_collected
from randlora.files.codes import FLOATS, Codes, Codes4bit, Codes8bit
from randlora.files.tensor_file import read_tensor
from randlora.layers.bnb_codes import QUANT_TYPES

JSON = re.compile(r"(?P<weight>.+)\.(?P<part>quant_state\.bitsandbytes__(?P<kind>.+))", re.DOTALL)
TABLES, NESTED_TABLES = ("absmax", "quant_map"), ("nested_absmax", "nested_quant_map")
FIELDS = frozenset({"quant_type", "blocksize", "dtype", "shape"})
NESTED_FIELDS = frozenset({"nested_blocksize", "nested_dtype", "nested_offset"})
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
LEVELS, NESTED_LEVELS = 16, 256  # of codes, and of scales that are codes themselves

SCALES, FORMAT = "SCB", "weight_format"
IN_ROWS = 0  # the format of codes that lie in their order

PARTS = (*TABLES, *NESTED_TABLES, SCALES, FORMAT)
INCOMPLETE = "get a complete copy"
DAMAGED = "get an undamaged copy, or quantize the model again"
REPACKED = (
    "bitsandbytes wrote it after a forward pass on a CPU, for which it rounds and reorders scales: load the model "
    "again, and save it before it computes anything"
)


def find_codes(entries: Mapping[str, Entry]) -> dict[str, Codes]:
    """Find the tensors that bitsandbytes stored as codes.

    Args:
        entries: The tensors of a checkpoint by name.

    Returns:
        The codes by the name of their tensor.

    Raises:
        CheckpointError: When something is missing, damaged or unknown. All such things are named.
    """
    found: dict[str, Codes] = {}
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
    raise_collected(CheckpointError, problems or _left_over(entries, found), doing="read what is quantized")
    return found


def _four_bits(entries: Mapping[str, Entry], match: re.Match[str]) -> Codes4bit:
    """Check codes of 4 bits by the JSON beside them."""
    weight, blob = match["weight"], entries[match[0]]
    if match["kind"] not in QUANT_TYPES:
        known = ", ".join(QUANT_TYPES)
        raise CheckpointError(f"{weight} in {blob.file} has codes of type {match['kind']!r}, expected one of {known}")
    fields = _fields(blob, match["kind"])
    needed = TABLES + (NESTED_TABLES if fields.keys() >= NESTED_FIELDS else ())
    _require(entries, blob, [weight, *(f"{weight}.{part}" for part in needed)])
    parts = {part: entries[f"{weight}.{part}"] for part in needed} | {match["part"]: blob}
    codes = Codes4bit(entries[weight], parts, fields)
    if problems := list(_misfits(codes)):
        raise CheckpointError(f"in {codes.entry.file} {'; '.join(problems)}")
    return codes


def _fields(blob: Entry, kind: str) -> dict[str, Any]:
    """Read the JSON beside codes of 4 bits, and check it."""
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


def _is_float(value: object) -> bool:
    return isinstance(value, str) and value in FLOATS


def _is_size(value: object) -> bool:
    return type(value) is int and value >= 0  # JSON's true is an int too


def _is_block_size(value: object) -> bool:
    return _is_size(value) and value in BLOCK_SIZES


RULES: dict[str, Callable[[Any], bool]] = {
    "blocksize": _is_block_size,
    "dtype": _is_float,
    "shape": lambda value: isinstance(value, list) and all(map(_is_size, value)),
    "nested_blocksize": _is_block_size,
    "nested_dtype": _is_float,
    "nested_offset": lambda value: isinstance(value, float) and math.isfinite(value),
}
"""What the fields of the JSON may hold."""


def _misfits(codes: Codes4bit) -> Iterator[str]:
    """Say which tensors have not the size or the dtype that the JSON lets expect."""
    count, scales = math.prod(codes.shape), codes.parts["absmax"]
    blocks = -(-count // codes.fields["blocksize"])
    if len(scales.shape) == 2 and scales.dtype == torch.bfloat16:
        yield f"{scales.name} has two dimensions and is in bfloat16: {REPACKED}"
        return
    shape = "x".join(map(str, codes.shape))
    if codes.entry.nbytes != (nbytes := -(-count // 2)):  # of any dtype
        yield f"{codes.entry.name} has {codes.entry.nbytes} bytes, expected {nbytes} for {shape}: {DAMAGED}"
    expected = {"quant_map": (LEVELS, torch.float32), "absmax": (blocks, torch.float32)}
    if "nested_absmax" in codes.parts:
        outer = -(-blocks // codes.fields["nested_blocksize"])
        expected |= {"absmax": (blocks, torch.uint8), "nested_absmax": (outer, torch.float32)}
        expected["nested_quant_map"] = NESTED_LEVELS, torch.float32
    for part, (size, dtype) in expected.items():
        entry = codes.parts[part]
        if (found := math.prod(entry.shape)) != size or entry.dtype != dtype:
            yield f"{entry.name} has {found} of {entry.dtype}, expected {size} of {dtype} for {shape}: {DAMAGED}"


def _eight_bits(entries: Mapping[str, Entry], module: str) -> Codes8bit:
    """Check codes of 8 bits by the scales beside them."""
    scales, style = entries[f"{module}.{SCALES}"], entries.get(f"{module}.{FORMAT}")
    _require(entries, scales, [f"{module}.weight"])
    codes = entries[f"{module}.weight"]
    if codes.dtype != torch.int8 or len(codes.shape) != 2 or scales.shape != codes.shape[:1]:
        raise CheckpointError(
            f"{codes.name} in {codes.file} is {codes.dtype} of shape {codes.shape} with scales of shape "
            f"{scales.shape}, expected a matrix of torch.int8 with a scale for each row: {DAMAGED}"
        )
    if style is None:  # which the first versions did not write
        return Codes8bit(codes, {SCALES: scales})
    if (found := read_tensor(style).flatten().tolist()) != [IN_ROWS]:
        raise CheckpointError(
            f"{style.name} in {style.file} holds {found}, expected {IN_ROWS}, for codes in their order: load and save "
            "the model with a newer bitsandbytes"
        )
    return Codes8bit(codes, {SCALES: scales, FORMAT: style})


def _require(entries: Mapping[str, Entry], part: Entry, names: list[str]) -> None:
    if missing := [name for name in names if name not in entries]:
        raise CheckpointError(f"{part.file} has {part.name} but nothing has {', '.join(missing)}: {INCOMPLETE}")


def _left_over(entries: Mapping[str, Entry], found: Mapping[str, Codes]) -> list[str]:
    """Say what stands beside codes that nothing says how to read."""
    used = {part.name for codes in found.values() for part in codes.parts.values()}
    return [
        f"{entry.file} has {name} but nothing that says what codes it is of: {INCOMPLETE}"
        for name, entry in entries.items()
        if name.endswith(tuple(f".{part}" for part in PARTS)) and name not in used
    ]

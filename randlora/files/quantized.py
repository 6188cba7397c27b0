"""Quantized checkpoints: those of bitsandbytes are read as if they were not quantized, others are refused.

With 4-bit codes, two to a byte, come scales, tables, and a tensor of bytes that is JSON; with 8-bit codes come the
scales of the rows. The checks read headers and that JSON, and no other value. Of a file on the Hub they read its header
alone, and take from the model's class what the JSON would say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from randlora.disk.tensor_file import Entry, bytes_of, read_tensor
from randlora.disk.untrusted import is_there, parse_json
from randlora.errors import CheckpointError, raise_collected
from randlora.files.model_directory import QUANTIZATION, ModelDirectory
from randlora.files.transformers_model import TransformersModel
from randlora.layers import bnb_codes
from randlora.layers.bnb_codes import QUANT_TYPES

MARKS = {
    ".qweight": "GPTQ or AWQ",
    ".weight_scale_inv": "blocks of 8-bit floats",
    ".weight_packed": "compressed-tensors",
}
"""Parts of tensor names that show another quantization, and which one."""

METHOD = "bitsandbytes"
UNSAID = "float16"
"""The dtype of dequantized 8-bit codes if ``config.json`` has none: bitsandbytes rounds to it before it quantizes."""

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
JSON = re.compile(r"(?P<weight>.+)\.(?P<part>quant_state\.bitsandbytes__(?P<kind>.+))", re.DOTALL)
TABLES, NESTED_TABLES = ("absmax", "quant_map"), ("nested_absmax", "nested_quant_map")
LONGEST_JSON = 2**16
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

    ``parts`` are the tensors needed to read them, by their names without the codes' name. ``kind`` is ``"nf4"``,
    ``"fp4"`` or ``"8 bits"``. ``shape`` and ``dtype`` are those of the tensor that was quantized; files of 8 bits do
    not say the dtype.
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

        parts = {name: read_tensor(part) for name, part in self.parts.items()}
        with torch.device("cpu"):  # it makes a tensor without a device
            state = QuantState.from_dict(parts, device="cpu")
        # as one row: bitsandbytes 0.50 misreads blocks that continue in the next row on a CPU
        state.shape = torch.Size([2 * self.entry.nbytes])
        return bnb_codes.write_out_4bit(codes, state).flatten()[: math.prod(self.shape)].reshape(self.shape)


@dataclass(frozen=True, eq=False)
class DenseView:
    """A checkpoint as if it were not quantized.

    ``directory`` has the shapes and dtypes that quantized tensors had, without the other tensors of the quantization
    and without the quantization in its config. Of the ``codes``, by name, those in ``transposed`` were transposed
    before they were quantized.
    """

    directory: ModelDirectory
    codes: Mapping[str, StoredCodes]
    transposed: frozenset[str] = frozenset()

    def read(self, entry: Entry) -> Tensor:
        """Return a tensor of the directory, dequantized to float32 if it is stored as codes."""
        if (codes := self.codes.get(entry.name)) is None:
            return read_tensor(entry)
        return codes.read().T if entry.name in self.transposed else codes.read()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of codes."""
        return tuple(sorted({codes.kind for codes in self.codes.values()}))


def as_dense(directory: ModelDirectory, model: TransformersModel | str) -> DenseView:
    """Return a checkpoint as if it were not quantized; ``model`` is the result of `build_model` for it.

    A quantized one needs the model's class, which determines the weights that were transposed before the quantization.
    """
    _refuse_others(directory)
    has_codes = any(JSON.fullmatch(name) or name.endswith(f".{SCALES}") for name in directory.entries)
    if not has_codes and not isinstance(directory.config.get(QUANTIZATION), dict):
        return DenseView(directory, {})
    if isinstance(model, str) and (directory.architecture or directory.model_type):
        raise CheckpointError(f"{directory.path} is quantized, and cannot be read without its model: {model}")
    said = directory.config.get("dtype", directory.config.get("torch_dtype"))
    dtype = said if isinstance(said, str) and said in FLOATS else UNSAID
    codes = find_codes(directory.entries, _by_class(directory, model, dtype))
    problems = [
        f"{entry.file} has {name} in {entry.dtype} without the scales needed to read it: {INCOMPLETE}"
        for name, entry in directory.entries.items()
        if name.endswith(".weight") and entry.dtype in (torch.int8, torch.uint8) and name not in codes
    ]
    raise_collected(CheckpointError, problems, doing="read the quantized tensors")
    transposed = frozenset() if isinstance(model, str) else model.transposed & codes.keys()
    dense = {}
    for name, found in codes.items():
        shape = found.shape[::-1] if name in transposed else found.shape
        wide = found.dtype or FLOATS[dtype]
        nbytes = torch.Size(shape).numel() * wide.itemsize
        dense[name] = replace(found.entry, dtype=wide, shape=shape, nbytes=nbytes)
    parts = {part.name for found in codes.values() for part in found.parts.values()}
    entries = ((shard, [entry for entry in shard.entries if entry.name not in parts]) for shard in directory.shards)
    # a file may have had nothing but parts of codes
    shards = tuple(replace(shard, entries=tuple(dense.get(e.name, e) for e in kept)) for shard, kept in entries if kept)
    index = directory.index
    if index is not None:
        places = {name: file for name, file in index["weight_map"].items() if name not in parts}
        index = {**index, "weight_map": places}
    config = {name: value for name, value in directory.config.items() if name != QUANTIZATION}
    return DenseView(ModelDirectory(directory.path, config, shards, index), codes, transposed)


def _refuse_others(directory: ModelDirectory) -> None:
    advice = "only codes of bitsandbytes can be read: take the checkpoint in a floating dtype"
    for name in directory.entries:
        for mark, origin in MARKS.items():
            if mark in f"{name}.":
                raise CheckpointError(f"{directory.path} is quantized ({name} is of {origin}): {advice}")
    settings = directory.config.get(QUANTIZATION)
    if not isinstance(settings, dict):
        return
    # the first checkpoints of bitsandbytes do not name it
    is_unnamed = "quant_method" not in settings and ("load_in_4bit" in settings or "load_in_8bit" in settings)
    if not is_unnamed and settings.get("quant_method") != METHOD:
        method = settings.get("quant_method", "an unnamed method")
        raise CheckpointError(f"{directory.path} is quantized (config.json says with {method}): {advice}")


def _by_class(directory: ModelDirectory, model: TransformersModel | str, dtype: str) -> dict[str, dict[str, Any]]:
    """Return what the JSON of 4-bit codes would say of the tensors in files on the Hub, by name."""
    found: dict[str, dict[str, Any]] = {}
    if isinstance(model, str):
        return found
    for held in model.census.parameters:
        for name in model.names_of(held.parameter):
            if not is_there(directory.entries[name].file):
                shape = tuple(held.parameter.shape)
                found[name] = {"shape": shape[::-1] if name in model.transposed else shape, "dtype": dtype}
    return found


def find_codes(
    entries: Mapping[str, Entry], by_class: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, StoredCodes]:
    """Return the tensors of a checkpoint that bitsandbytes stored as codes, by name, after checking their parts.

    ``by_class`` has what the JSON would say of tensors in files that are not here.
    """
    found: dict[str, StoredCodes] = {}
    problems = []
    for name in entries:
        try:
            if (match := JSON.fullmatch(name)) is not None:
                found[match["weight"]] = _four_bits(entries, match, by_class or {})
            elif name.endswith(f".{SCALES}"):
                module = name.removesuffix(f".{SCALES}")
                found[f"{module}.weight"] = _eight_bits(entries, module)
        except CheckpointError as error:
            problems.append(str(error))
    raise_collected(CheckpointError, problems or _left_over(entries, found), doing="read the quantized tensors")
    return found


def _four_bits(
    entries: Mapping[str, Entry], match: re.Match[str], by_class: Mapping[str, dict[str, Any]]
) -> StoredCodes:
    """Return 4-bit codes after checking them against their JSON."""
    weight, blob = match["weight"], entries[match[0]]
    if match["kind"] not in QUANT_TYPES:
        known = ", ".join(QUANT_TYPES)
        raise CheckpointError(f"{weight} in {blob.file} has codes of type {match['kind']!r}, expected one of {known}")
    fields = by_class[weight] if weight in by_class else _fields(blob, match["kind"])
    is_nested = f"{weight}.nested_absmax" in entries if weight in by_class else fields.keys() >= NESTED_FIELDS
    needed = TABLES + (NESTED_TABLES if is_nested else ())
    _require(entries, blob, [weight, *(f"{weight}.{part}" for part in needed)])
    parts = {part: entries[f"{weight}.{part}"] for part in needed} | {match["part"]: blob}
    codes = StoredCodes(entries[weight], parts, match["kind"], tuple(fields["shape"]), FLOATS[fields["dtype"]])
    if problems := list(_misfits(codes, fields)):
        raise CheckpointError(f"in {codes.entry.file} {'; '.join(problems)}")
    return codes


def _fields(blob: Entry, kind: str) -> dict[str, Any]:
    """Return the JSON of 4-bit codes after checking it."""
    if not is_there(blob.file):
        raise CheckpointError(
            f"{blob.name} is on the Hub, and no class says what is in it: download the model with `hf download`, and "
            "give its directory"
        )
    try:
        if blob.nbytes > LONGEST_JSON:
            raise ValueError(f"it has {blob.nbytes:,} bytes")
        fields = parse_json(bytes_of(read_tensor(blob)).numpy().tobytes().decode(), is_lenient=True)
    except ValueError as error:
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
    if len(scales.shape) == 2 and scales.dtype == torch.bfloat16:
        yield f"{scales.name} has two dimensions and is in bfloat16: {REPACKED}"
        return
    shape = "x".join(map(str, codes.shape))
    if codes.entry.nbytes != (nbytes := -(-count // 2)):  # of any dtype
        yield f"{codes.entry.name} has {codes.entry.nbytes} bytes, expected {nbytes} for {shape}: {DAMAGED}"
    if "blocksize" not in fields:  # by the model's class
        return
    blocks = -(-count // fields["blocksize"])
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
    is_here = style is not None and is_there(style.file)
    if style is not None and is_here and (found := read_tensor(style).flatten().tolist()) != [IN_ROWS]:
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

"""Reading an adapter's two files and checking names, dtypes, shapes, finiteness and checksums, without a model."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Container, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import cached_property
from io import BufferedReader
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from randlora.bases.spec import KINDS, count_bases
from randlora.checkpoint.header import HEADER_KEY, SEAL_WORD, Header, parse_header
from randlora.checkpoint.peft_layout import (
    BASES,
    CLASS_FIELDS,
    CONFIG_FILE,
    MODEL_PREFIX,
    PEFT_TYPE,
    TENSORS_FILE,
    UNREAD_FIELDS,
    PeftFields,
    basis_keys,
    from_peft_fields,
    most_common,
    pattern_fields,
    peft_kind,
    trained_fqn,
    trained_key,
    value_keys,
)
from randlora.config import LayerOptions, RandLoRAConfig, Stream
from randlora.disk.formats import TORCH_DTYPES, Shard, bytes_of, is_there, open_shard, read_json, read_tensor
from randlora.disk.hub import local_path
from randlora.errors import CheckpointError, raise_collected
from randlora.hints import mistyped, shortly
from randlora.targets.options import options_by_target, options_listed

VALUE_KEY = re.compile(r"base_model\.model\.(.*)\.randlora_(?:lambda|gamma)", re.DOTALL)
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """The contents of an adapter's files, checked as far as is possible without a model."""

    fields: dict[str, Any]
    config: RandLoRAConfig  # with r and alpha of each target by FQN where they differ
    header: Header | None  # none in a file that PEFT wrote
    values: dict[str, tuple[Tensor, Tensor]]  # Λ, (r, num_bases), and Γ, (num_bases, min_dim), by target
    trained: dict[str, Tensor] = field(default_factory=dict)  # other parameters, by FQN
    bases: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """A, ``(r, 1, min_dim)``, and B, ``(max_dim, num_bases, r)``, by r."""
    doubts: tuple[str, ...] = ()  # warnings about the files
    where: str = ""  # it was taken from, for messages
    rule: str = ""  # by which its targets are chosen, for reports
    stream: Stream | None = None  # of the bases, if the caller gave it

    @property
    def buffers(self) -> tuple[str, ...]:
        """The names in ``trained`` that are buffers, if the file tells. In PEFT's files: tensors not floating."""
        if self.header is not None:
            return self.header.buffers
        return tuple(fqn for fqn, tensor in self.trained.items() if not tensor.is_floating_point())

    @property
    def rows(self) -> dict[str, tuple[int, ...]]:
        """Of the tables in ``trained`` of which it has only rows, these, by FQN. PEFT's RandLoRA trains none."""
        rows = None if self.header is None else self.config.train_rows
        return {fqn: tuple(own) for fqn, own in (rows or {}).items() if fqn in self.trained}

    @cached_property
    def options(self) -> dict[str, LayerOptions]:
        """The r and the alpha of each target."""
        return options_listed(self.config, self.values)

    def diagonals(self, fqn: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return Λ and Γ of a target in float32, or in float64 if they are in float64."""
        lam, gamma = (part.to(device, torch.promote_types(part.dtype, torch.float32)) for part in self.values[fqn])
        return lam.contiguous(), gamma.contiguous()

    def renamed(self, rename: Callable[[str], str], how: str) -> AdapterFile:
        """Return the adapter with different FQNs, and without the fields that name the class it was trained on."""
        targets = tuple(map(rename, self.header.shapes if self.header else self.values))
        rows = {rename(fqn): rows for fqn, rows in self.rows.items()}
        also = tuple(rename(fqn) for fqn in self.trained if fqn not in self.rows) or None
        config = replace(self.config, targets=targets, train_also=also, train_rows=rows or None)
        config = options_by_target(config, {rename(fqn): options for fqn, options in self.options.items()})
        header = self.header and replace(
            self.header,
            config=config,
            shapes={rename(fqn): shape for fqn, shape in self.header.shapes.items()},
            transposed=self.header.transposed and tuple(map(rename, self.header.transposed)),
            kinds={rename(fqn): kind for fqn, kind in self.header.kinds.items()},
            model_class=None,
            buffers=tuple(map(rename, self.header.buffers)),
        )
        return replace(
            self,
            fields={name: value for name, value in self.fields.items() if name not in CLASS_FIELDS},
            config=config,
            header=header,
            values={rename(fqn): pair for fqn, pair in self.values.items()},
            trained={rename(fqn): tensor for fqn, tensor in self.trained.items()},
            rule=f"{self.rule}, {how}",
        )


def locate(source: str | os.PathLike[str], revision: str | None, subfolder: str | None = None) -> Path:
    """Return the directory of an adapter's files, given it, the safetensors file in it, or a repository on the Hub."""
    within = PurePosixPath(subfolder or ".")
    path = local_path(source, revision, [(within / name).as_posix() for name in (CONFIG_FILE, TENSORS_FILE)])
    if not (is_there(path) and path.is_file()):
        return path / within
    if subfolder is not None or path.name != TENSORS_FILE:
        raise CheckpointError(f"it is a file: expected a directory, or the file {TENSORS_FILE} in one, no subfolder")
    return path.parent


def read_adapter(directory: Path, stream: Stream | None = None) -> AdapterFile:
    """Read an adapter's directory, after checking each of its files, and one against the other.

    If the JSON contradicts our header or is missing, the header decides, and a doubt is added. Without our header the
    JSON has the options: it must be the same before and after the tensors are read, which may be replaced meanwhile.
    """
    path, fields = directory / TENSORS_FILE, _read_fields(directory)
    if not is_there(path):
        raise CheckpointError(f"there is no {path}: only safetensors files are read, nothing is unpickled")
    with open_shard(path) as (shard, opened):
        text = _header_text(shard)
        tensors = _read_tensors(shard, opened, has_copies=text is None)
    header = None if text is None else parse_header(text, tensors)
    if header is None and fields is None:
        raise _unreadable(directory, os.strerror(errno.ENOENT))
    if header is None and fields != _read_fields(directory):
        raise CheckpointError(f"{str(directory)!r} was replaced while it was read: load it again")
    file = sort_contents(fields or {"peft_type": PEFT_TYPE}, header, tensors, stream, doing=f"read {str(directory)!r}")
    return replace(file, doubts=disagreements(fields, header))


def sort_contents(
    fields: dict[str, Any], header: Header | None, tensors: dict[str, Tensor], stream: Stream | None, *, doing: str
) -> AdapterFile:
    """Return an adapter's contents, given all that its files hold, after checking them; the tensors are taken out."""
    if header is None and (lost := [name for name in UNREAD_FIELDS if fields.get(name) not in (None, {})]):
        raise CheckpointError(f"the tensors have lost the header that goes with {lost[0]}: get an undamaged copy")
    by_key = dict(tensors)
    values = _take_values(tensors, header)
    bases = _take_bases(tensors, header.bases.keys() if header else {fields.get("r", 0)})
    trained = _trained(tensors, values, header)
    config = header.config if header else from_peft_fields(fields, values, trained, stream)
    file = AdapterFile(fields, config, header, values, trained, bases, stream=stream)
    buffers = {id(trained[fqn]) for fqn in file.buffers}
    flaws = {key: flaw_of(tensor, is_buffer=id(tensor) in buffers) for key, tensor in by_key.items()}
    problems = [f"{key} {flaw}" for key, flaw in flaws.items() if flaw is not None]
    raise_collected(CheckpointError, problems + _shape_problems(file), doing=doing)
    return file


def _read_fields(directory: Path) -> dict[str, Any] | None:
    """Return the fields of the JSON, or ``None`` if there is none beside the tensors."""
    path = directory / CONFIG_FILE
    try:
        fields = read_json(path)
    except CheckpointError:
        raise
    except OSError as error:
        if isinstance(error, FileNotFoundError) and is_there(directory / TENSORS_FILE):
            return None
        raise _unreadable(directory, error.strerror) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}): get an undamaged copy") from error
    kind = fields.get("peft_type") if isinstance(fields, dict) else None
    if kind != PEFT_TYPE:
        expected = f"expected peft_type={PEFT_TYPE!r}, got {shortly(kind)}"
        raise CheckpointError(f"{path} describes no RandLoRA adapter: {expected}")
    raise_collected(CheckpointError, [*mistyped(fields, PeftFields, "")], doing=f"read {str(path)!r}")
    return dict(fields)


def _unreadable(directory: Path, reason: str | None) -> CheckpointError:
    # PEFT saves an adapter that is not called "default" one level down
    places = directory.glob(f"*/{CONFIG_FILE}") if is_there(directory) else ()
    inside = ", ".join(sorted(place.parent.name for place in places))
    expected = f"expected a directory with {CONFIG_FILE} and {TENSORS_FILE}"
    expected += f"; there are some inside it: {inside}" if inside else ""
    return CheckpointError(f"cannot read {directory / CONFIG_FILE} ({reason}): {expected}")


def _header_text(shard: Shard) -> str | None:
    """Return the text of our header, or ``None`` for a file of PEFT's, after checking the names of its tensors."""
    if HEADER_KEY in shard.metadata:  # its checksum and its version say what else belongs in the file
        return shard.metadata[HEADER_KEY]
    if any(SEAL_WORD in text for text in shard.metadata.values()):
        raise CheckpointError(f"{shard.path} has a header under a damaged name: get an undamaged copy")
    problems = [
        f"{entry.name!r} is not the name of an adapter's tensor"
        for entry in shard.entries
        if not entry.name.startswith(MODEL_PREFIX) and entry.name not in BASES.values()
    ]
    raise_collected(CheckpointError, problems, doing=f"read {str(shard.path)!r}")
    return None


def _read_tensors(shard: Shard, file: BufferedReader, *, has_copies: bool) -> dict[str, Tensor]:
    """Read the tensors by key. Where there may be copies of the bases, they are compared with the first, not kept."""
    tensors: dict[str, Tensor] = {}
    for entry in sorted(shard.entries, key=lambda entry: entry.name):
        name = BASES.get(entry.name.rsplit(".", 1)[-1], entry.name) if has_copies else entry.name
        tensor = read_tensor(entry, file)
        first = tensors.setdefault(name, tensor)
        is_same = (tensor.dtype, tensor.shape) == (first.dtype, first.shape)
        if tensor is not first and not (is_same and torch.equal(bytes_of(tensor), bytes_of(first))):
            raise CheckpointError(f"{shard.path} has copies of {name} that differ, such as {entry.name}: it is damaged")
    return tensors


def _take_values(tensors: dict[str, Tensor], header: Header | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Take Λ and Γ of each target, which our header names, or else their keys, out of the tensors."""
    if header is not None:
        keys = {fqn: value_keys(fqn, header.shapes) for fqn in header.shapes}
    else:
        keys = {found[1]: value_keys(found[1], ()) for key in tensors if (found := VALUE_KEY.fullmatch(key))}
    problems = [
        f"there is no {key}: expected randlora_lambda and randlora_gamma of each target"
        for key in chain.from_iterable(keys.values())
        if key not in tensors
    ]
    if not keys:
        problems = ["the file holds no randlora_lambda and randlora_gamma: it is not a RandLoRA adapter"]
    raise_collected(CheckpointError, problems, doing="read the adapter's tensors")
    return {fqn: (tensors.pop(lam), tensors.pop(gamma)) for fqn, (lam, gamma) in keys.items()}


def _take_bases(tensors: dict[str, Tensor], ranks: AbstractSet[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """Take the bases of each r, if there are any, out of the tensors."""
    bases = {}
    for r in ranks:
        pair = [tensors.pop(key) for key in basis_keys(r, ranks) if key in tensors]
        if len(pair) == 1:
            raise CheckpointError("the file holds one of the two bases: expected both or none")
        if pair:
            bases[r] = (pair[0], pair[1])
    return bases


def _trained(tensors: Mapping[str, Tensor], targets: Container[str], header: Header | None) -> dict[str, Tensor]:
    """Return the parameters trained with the adapter by FQN, which all other tensors must be."""
    fqns = {key: trained_fqn(key, targets) for key in tensors}
    if header is not None:
        named = (*(header.config.train_also or ()), *(header.config.train_rows or ()))
        fqns = {trained_key(fqn, targets): fqn for fqn in named}
    if fqns.keys() != tensors.keys() or len({*fqns.values()}) < len(fqns):
        expected, found = (", ".join(sorted(names)) or "none" for names in ({*fqns.values()}, tensors))
        problem = f"expected the parameters trained with it ({expected}), got {found}: it was edited"
        raise CheckpointError(f"cannot read the adapter's tensors: {problem}")
    return {fqn: tensors[key] for key, fqn in fqns.items()}


def flaw_of(tensor: Tensor, *, is_buffer: bool = False) -> str | None:
    """Return why no file may hold these values, as a phrase that follows the name, or ``None``."""
    dtypes = TORCH_DTYPES.values() if is_buffer else FLOATING
    if tensor.dtype not in dtypes:
        return f"holds {tensor.dtype}: expected one of {', '.join(map(str, dtypes))}"
    if is_buffer:  # such as a mask, which may be infinite
        return "holds NaN" if tensor.isnan().any() else None
    low, high = tensor.aminmax() if tensor.numel() else (tensor, tensor)  # in no further memory
    return None if low.isfinite().all() and high.isfinite().all() else "holds NaN or infinite values"


def _shape_problems(file: AdapterFile) -> list[str]:
    problems = []
    for fqn, (lam, gamma) in file.values.items():
        r = file.options[fqn].r
        if (
            lam.ndim not in (2, 3)  # 3 for a stack of matrices
            or gamma.ndim != lam.ndim
            or not lam.numel() * gamma.numel()
            or lam.shape != (*gamma.shape[:-2], r, gamma.shape[-2])
            or gamma.shape[-2] != count_bases(gamma.shape[-1], r)
        ):
            found = f"randlora_lambda {tuple(lam.shape)} and randlora_gamma {tuple(gamma.shape)}"
            expected = f"({r}, num_bases) and (num_bases, min_dim) with num_bases = ceil(min_dim / {r})"
            problems.append(f"{fqn} has {found}: expected {expected}")
    for r, (basis_A, basis_B) in file.bases.items():
        shape_A, shape_B = tuple(basis_A.shape), tuple(basis_B.shape)
        min_dim = shape_A[-1] if shape_A else 0
        is_empty = not basis_A.numel() * basis_B.numel()
        if is_empty or shape_A != (r, 1, min_dim) or shape_B[1:] != (count_bases(min_dim, r), r) or len(shape_B) != 3:
            problems.append(f"the bases have shapes {shape_A} and {shape_B}, which do not fit r={r}")
    return problems


def disagreements(fields: Mapping[str, Any] | None, header: Header | None) -> tuple[str, ...]:
    """Return whether the JSON is missing or contradicts our header, as if it were edited or from a different save."""
    if header is None:
        return ()
    if fields is None:
        return (f"there is no {CONFIG_FILE}, which PEFT needs and which names the base model: save it again",)
    common = most_common(header.options)
    saved: dict[str, object] = {
        "r": common.r,
        "randlora_alpha": common.alpha,
        **pattern_fields(header.options),
        "randlora_dropout": header.config.dropout,
        "projection_prng_key": header.config.seed,
    }
    said = {name: fields.get(name) for name in saved}
    if KINDS[header.config.basis].peft_flags is not None:
        said["kind of basis"], saved["kind of basis"] = peft_kind(fields), header.config.basis
    differing = [name for name in saved if said[name] != saved[name]]
    words = " and ".join(f"{name}={said[name]!r}, the tensors were saved with {saved[name]!r}" for name in differing)
    reason = "the files come from different saves, or the JSON was edited, which does not change options"
    return (f"{CONFIG_FILE} says {words}; the latter is used: {reason}; save it again",) if differing else ()

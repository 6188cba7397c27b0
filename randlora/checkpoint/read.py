"""Reading an adapter's two files and checking names, dtypes, shapes, finiteness and checksums, without a model."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from io import BufferedReader
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from randlora.bases.spec import KINDS
from randlora.checkpoint.header import HEADER_KEY, SEAL_WORD, Header, parse_header
from randlora.checkpoint.peft_config import (
    BASE_FIELD,
    CLASS_FIELDS,
    CONFIG_FILE,
    PEFT_TYPE,
    UNREAD_FIELDS,
    PeftFields,
    from_peft_fields,
    most_common,
    pattern_fields,
    peft_kind,
)
from randlora.checkpoint.tensors import (
    BASIS_A,
    BASIS_B,
    GAMMA_SUFFIX,
    LAMBDA_SUFFIX,
    MODEL_PREFIX,
    TENSORS_FILE,
    TOP_BASIS_A,
    TOP_BASIS_B,
    basis_keys,
    file_problems,
    trained_fqn,
    trained_key,
    value_keys,
)
from randlora.config import LayerOptions, RandLoRAConfig, Stream
from randlora.disk.formats import Shard, bytes_of, is_there, open_shard, read_json, read_tensor
from randlora.disk.hub import local_path
from randlora.errors import CheckpointError, raise_collected, spelled
from randlora.hints import mistyped, shortly
from randlora.targets.options import options_by_target, options_listed

COPY = re.compile(rf"\.{BASIS_B}(\.r\d+)?$")
"""The end of the key of a copy of B."""

PATIENCE = 0.5  # seconds for another process to finish replacing the files, which takes it milliseconds
PAUSE = 0.02


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
    basis_copies: int = 0  # how many times the file has them
    doubts: tuple[str, ...] = ()  # warnings about the files
    renaming: str = ""  # how names differ from the names in the file
    stream: Stream | None = None  # of the bases, if the caller gave it

    @property
    def buffers(self) -> tuple[str, ...]:
        """The names in ``trained`` that are buffers, if the file tells. In PEFT's files: tensors not floating."""
        if self.header is not None:
            return self.header.buffers
        return tuple(fqn for fqn, tensor in self.trained.items() if not tensor.is_floating_point())

    @cached_property
    def options(self) -> dict[str, LayerOptions]:
        """The r and the alpha of each target."""
        return options_listed(self.config, self.values)

    def renamed(self, rename: Callable[[str], str], how: str) -> AdapterFile:
        """Return the adapter with different FQNs, and without the fields that name the class it was trained on."""
        targets = tuple(map(rename, self.header.shapes if self.header else self.values))
        config = replace(self.config, targets=targets, train_also=tuple(map(rename, self.trained)) or None)
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
        fields = {name: value for name, value in self.fields.items() if name not in CLASS_FIELDS}
        values = {rename(fqn): pair for fqn, pair in self.values.items()}
        trained = {rename(fqn): tensor for fqn, tensor in self.trained.items()}
        renamed = replace(self, fields=fields, config=config, header=header, renaming=how)
        return replace(renamed, values=values, trained=trained)


def locate(source: str | os.PathLike[str], revision: str | None, subfolder: str | None = None) -> Path:
    """Return the directory of an adapter's files, given it, the safetensors file in it, or a repository on the Hub."""
    within = PurePosixPath(subfolder or ".")
    path = local_path(source, revision, [(within / name).as_posix() for name in (CONFIG_FILE, TENSORS_FILE)])
    if not (is_there(path) and path.is_file()):
        return path / within
    if subfolder is not None:
        raise CheckpointError(f"a file has no subfolder, got {subfolder!r}: give the directory around it")
    if path.name != TENSORS_FILE:
        raise CheckpointError(f"it is a file: expected a directory, or the file {TENSORS_FILE} in one")
    return path.parent


def read_adapter(directory: Path, stream: Stream | None = None) -> AdapterFile:
    """Read an adapter's directory, after checking each of its files, and one against the other.

    If the JSON contradicts our header or is missing, the header decides, and a doubt is added. Another process may be
    replacing the files, in the order of `files_of`. So the JSON must be the same before and after the tensors are read,
    and a doubt must persist for a moment after the tensors got their name.
    """
    end = time.monotonic() + PATIENCE
    while True:
        fields = _read_fields(directory)
        try:
            file = _read_beside(fields, directory, stream)
            is_settled = not (file.doubts and _is_new(directory / TENSORS_FILE)) and fields == _read_fields(directory)
            if (is_settled and fields is not None) or time.monotonic() >= end:
                return file
        except CheckpointError:
            if (fields is not None and fields == _read_fields(directory)) or time.monotonic() >= end:
                raise
        time.sleep(PAUSE)


def _is_new(path: Path) -> bool:
    """Whether a file has had its name for so short a time that another may be about to follow it."""
    with suppress(OSError):
        return time.time() - path.stat().st_ctime < PATIENCE
    return False


def _read_beside(fields: dict[str, Any] | None, directory: Path, stream: Stream | None) -> AdapterFile:
    """Read the tensors that the JSON describes, or without it those that our header describes."""
    path = directory / TENSORS_FILE
    if not is_there(path):
        raise CheckpointError(f"there is no {path}: only safetensors files are read, nothing is unpickled")
    with open_shard(path) as (shard, opened):
        text = _header_text(shard)
        tensors = _read_tensors(shard, opened, copies=text is None)
    header = None if text is None else parse_header(text, tensors)
    if fields is None:
        if header is None:
            raise _unreadable(directory, os.strerror(errno.ENOENT))
        fields = {"peft_type": PEFT_TYPE}
        doubts = [f"there is no {CONFIG_FILE}, which PEFT needs and which names the base model: save it again"]
    else:
        doubts = disagreements(fields, header)
    copies = sum(bool(COPY.search(entry.name)) for entry in shard.entries)
    file = sort_contents(fields, header, tensors, stream, doing=f"read {str(directory)!r}")
    return replace(file, basis_copies=int(bool(file.bases)) if header else copies, doubts=tuple(doubts))


def sort_contents(
    fields: dict[str, Any], header: Header | None, tensors: dict[str, Tensor], stream: Stream | None, *, doing: str
) -> AdapterFile:
    """Return an adapter's contents, given all that its files hold, after checking them; the tensors are taken out."""
    if header is None and (lost := [name for name in UNREAD_FIELDS if fields.get(name) not in (None, {})]):
        raise CheckpointError(f"the tensors have lost the header that goes with {lost[0]}: get an undamaged copy")
    keys = [basis_keys(r, header.bases.keys()) for r in header.bases] if header else [(TOP_BASIS_A, TOP_BASIS_B)]
    pairs = [_take_bases(tensors, names) for names in keys]
    values = _take_named(tensors, header.shapes) if header else _take_values(tensors)
    trained = _trained(tensors, values, header)
    config = header.config if header else from_peft_fields(fields, values, trained, stream)
    ranks = header.bases if header else [fields["r"]]
    bases = {r: pair for r, pair in zip(ranks, pairs, strict=True) if pair is not None}
    file = AdapterFile(fields, config, header, values, trained, bases, stream=stream)
    problems = file_problems(values, trained, bases, file.options, file.buffers)
    raise_collected(CheckpointError, problems, doing=doing)
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
    return CheckpointError(
        f"cannot read {directory / CONFIG_FILE} ({reason}): expected a directory with {CONFIG_FILE} and {TENSORS_FILE}"
        f"{f'; there are some inside it: {inside}' if inside else ''}"
    )


def _header_text(shard: Shard) -> str | None:
    """Return the text of our header, or ``None`` for a file of PEFT's, after checking the names of its tensors."""
    if HEADER_KEY in shard.metadata:  # its checksum and its version say what else belongs in the file
        return shard.metadata[HEADER_KEY]
    if any(SEAL_WORD in text for text in shard.metadata.values()):
        raise CheckpointError(f"{shard.path} has a header under a damaged name: get an undamaged copy")
    problems = [
        f"{entry.name!r} is not the name of an adapter's tensor"
        for entry in shard.entries
        if not entry.name.startswith(MODEL_PREFIX) and entry.name not in (TOP_BASIS_A, TOP_BASIS_B)
    ]
    raise_collected(CheckpointError, problems, doing=f"read {str(shard.path)!r}")
    return None


def _read_tensors(shard: Shard, file: BufferedReader, *, copies: bool) -> dict[str, Tensor]:
    """Read the tensors by key. Where there may be copies of the bases, they are compared with the first, not kept."""
    tensors: dict[str, Tensor] = {}
    for entry in sorted(shard.entries, key=lambda entry: entry.name):
        last = entry.name.rsplit(".", 1)[-1]  # PEFT 0.21.2 and older write a copy for every layer
        name = {BASIS_A: TOP_BASIS_A, BASIS_B: TOP_BASIS_B}.get(last, entry.name) if copies else entry.name
        tensor = read_tensor(entry, file)
        first = tensors.setdefault(name, tensor)
        is_same = (tensor.dtype, tensor.shape) == (first.dtype, first.shape)
        if tensor is not first and not (is_same and torch.equal(bytes_of(tensor), bytes_of(first))):
            raise CheckpointError(
                f"{shard.path} holds copies of {name} that differ, such as {entry.name}: it is damaged"
            )
    return tensors


def _take_bases(tensors: dict[str, Tensor], names: tuple[str, str]) -> tuple[Tensor, Tensor] | None:
    if not any(name in tensors for name in names):
        return None
    if not all(name in tensors for name in names):
        raise CheckpointError("the file holds one of the two bases: expected both or none")
    return tensors.pop(names[0]), tensors.pop(names[1])


def _take_named(tensors: dict[str, Tensor], targets: Mapping[str, object]) -> dict[str, tuple[Tensor, Tensor]]:
    """Take Λ and Γ of the targets that a header names out of the tensors."""
    keys = {fqn: value_keys(fqn, targets) for fqn in targets}
    if not tensors.keys() >= {*chain.from_iterable(keys.values())}:
        raise CheckpointError("cannot read the adapter's tensors: the header names other targets than the tensors")
    return {fqn: (tensors.pop(lam), tensors.pop(gamma)) for fqn, (lam, gamma) in keys.items()}


def _take_values(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Take Λ and Γ of each target out of the tensors of a file that PEFT wrote."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key in list(tensors):
        for suffix in (LAMBDA_SUFFIX, GAMMA_SUFFIX):
            if key.startswith(MODEL_PREFIX) and key.endswith(suffix):
                fqn = key.removeprefix(MODEL_PREFIX).removesuffix(suffix)
                pairs.setdefault(fqn, {})[suffix] = tensors.pop(key)
    halves = [fqn for fqn, pair in pairs.items() if len(pair) == 1]
    problems = [f"{fqn} has one of randlora_lambda and randlora_gamma: expected both" for fqn in halves]
    if not pairs:
        problems.append("the file holds no randlora_lambda and randlora_gamma: it is not a RandLoRA adapter")
    raise_collected(CheckpointError, problems, doing="read the adapter's tensors")
    return {fqn: (pair[LAMBDA_SUFFIX], pair[GAMMA_SUFFIX]) for fqn, pair in pairs.items()}


def _trained(tensors: Mapping[str, Tensor], targets: Container[str], header: Header | None) -> dict[str, Tensor]:
    """Return the parameters trained with the adapter by FQN, which all other tensors must be."""
    fqns = {key: trained_fqn(key, targets) for key in tensors}
    if header is not None:
        fqns = {trained_key(fqn, targets): fqn for fqn in header.config.train_also or ()}
    if fqns.keys() != tensors.keys() or len({*fqns.values()}) < len(fqns):
        expected, found = (", ".join(sorted(names)) or "none" for names in ({*fqns.values()}, tensors))
        problem = f"expected the parameters trained with it ({expected}), got {found}: it was edited"
        raise CheckpointError(f"cannot read the adapter's tensors: {problem}")
    return {fqn: tensors[key] for key, fqn in fqns.items()}


def disagreements(fields: Mapping[str, Any], header: Header | None) -> list[str]:
    """Return where the JSON contradicts our header, because it was edited or comes from a different save."""
    if header is None:
        return []
    config, common = header.config, most_common(header.options)
    pairs: dict[str, tuple[object, object]] = {
        "r": (fields.get("r"), common.r),
        "randlora_alpha": (fields.get("randlora_alpha"), common.alpha),
        **{name: (fields.get(name), pattern) for name, pattern in pattern_fields(header.options).items()},
        "randlora_dropout": (fields.get("randlora_dropout"), config.dropout),
        "projection_prng_key": (fields.get("projection_prng_key"), config.seed),
    }
    if KINDS[config.basis].peft_flags is not None:
        pairs["kind of basis"] = (peft_kind(fields), config.basis)
    found = [
        f"{name}={said!r}, the tensors were saved with {saved!r}"
        for name, (said, saved) in pairs.items()
        if said != saved
    ]
    reason = "the files come from different saves, or the JSON was edited, which does not change options"
    return [f"{CONFIG_FILE} says {' and '.join(found)}; the latter is used: {reason}; save it again"] if found else []


def named_base(adapters: Mapping[str, AdapterFile]) -> str:
    """Return the base model that all adapters name. No name, or different names, raise a `CheckpointError`."""
    named = {adapter: file.fields.get(BASE_FIELD) for adapter, file in adapters.items()}
    give = f"give {spelled('base')}, a directory or a repository"
    for adapter, name in named.items():
        if not isinstance(name, str) or not name:
            raise CheckpointError(f"{adapter!r} names no base model ({BASE_FIELD} is {shortly(name)}): {give}")
    first, *others = dict.fromkeys(named.values())
    if others:
        raise CheckpointError(f"the adapters name different base models, {first!r} and {others[0]!r}: {give}")
    return str(first)

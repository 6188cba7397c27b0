"""Reading an adapter's two files: names, dtypes, shapes, finiteness and checksums, before any model is looked at."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from randlora.bases.spec import count_bases
from randlora.checkpoint.header import SEAL_WORD, Header, parse_header
from randlora.checkpoint.layout import (
    BASIS_A,
    BASIS_B,
    CONFIG_FILE,
    GAMMA_SUFFIX,
    HEADER_KEY,
    LAMBDA_SUFFIX,
    MODEL_PREFIX,
    TENSORS_FILE,
    TOP_BASIS_A,
    TOP_BASIS_B,
    trained_fqn,
    trained_key,
)
from randlora.checkpoint.peft_config import PEFT_TYPE, STREAM_FIELD, from_peft_fields, peft_kind
from randlora.checkpoint.tensors_file import TensorsFile, open_tensors
from randlora.config import RandLoRAConfig
from randlora.errors import CheckpointError, raise_collected

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """An adapter as its files hold it, checked as far as it can be without a model.

    Attributes:
        fields: What ``adapter_config.json`` holds.
        config: Its options.
        header: What our own header adds; ``None`` for a file that PEFT wrote.
        values: Λ, ``(r, num_bases)``, and Γ, ``(num_bases, min_dim)``, by target.
        trained: Parameters trained beside the adapter, by FQN.
        bases: A, ``(r, 1, min_dim)``, and B, ``(max_dim, num_bases, r)``, where the file holds them.
    """

    fields: dict[str, Any]
    config: RandLoRAConfig
    header: Header | None
    values: dict[str, tuple[Tensor, Tensor]]
    trained: dict[str, Tensor] = field(default_factory=dict)
    bases: tuple[Tensor, Tensor] | None = None


def read_adapter(directory: Path) -> AdapterFile:
    """Read and check an adapter's directory.

    Raises:
        CheckpointError: When a file is missing, truncated, damaged, foreign, of another format version, or disagrees
            with the other or with itself.
    """
    fields = _read_fields(directory / CONFIG_FILE)
    tensors, text = _read_tensors(directory / TENSORS_FILE)
    header = None if text is None else parse_header(text, tensors)
    if header is None and fields.get(STREAM_FIELD) is not None:
        raise CheckpointError(f"the tensors have lost the header that goes with {STREAM_FIELD}: get an undamaged copy")
    bases = _take_bases(tensors)
    values = _take_values(tensors)
    trained = _trained(tensors, values, header)
    config = header.config if header else from_peft_fields(fields, values, trained)
    problems = [
        *_trained_problems(trained, tensors, config),
        *_disagreements(fields, header),
        *_damage(values, trained, bases),
        *_shape_problems(config.r, values, bases),
    ]
    if header and set(header.shapes) != set(values):
        problems.append("the header names other targets than the tensors")
    raise_collected(CheckpointError, problems, doing=f"read {str(directory)!r}")
    return AdapterFile(fields, config, header, values, trained, bases)


def _read_fields(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path} ({error.strerror}): expected a directory with {CONFIG_FILE} and {TENSORS_FILE}"
            f"{_directories_inside(path.parent)}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): get an undamaged copy") from error
    kind = fields.get("peft_type") if isinstance(fields, dict) else None
    if kind != PEFT_TYPE:
        raise CheckpointError(f"{path} describes no RandLoRA adapter: expected peft_type={PEFT_TYPE!r}, got {kind!r}")
    return dict(fields)


def _directories_inside(directory: Path) -> str:
    """Name adapters one level down, where PEFT puts each that is not called ``default``."""
    inside = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_FILE}"))
    return f"; there are some inside it: {', '.join(inside)}" if inside else ""


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Read every tensor but the repeated copies of the bases, each into memory of its own, and our header's text."""
    if not path.is_file():
        raise CheckpointError(f"there is no {path}: only safetensors files are read, nothing is unpickled")
    with open_tensors(path) as file:
        text = _header_text(file.metadata, path)
        if text is None:  # what else is in a file of ours is for its seal and its version to say
            raise_collected(CheckpointError, _stray(file.entries), doing=f"read {str(path)!r}")
        return _unrepeated(file, path), text


def _unrepeated(file: TensorsFile, path: Path) -> dict[str, Tensor]:
    """Read the tensors; further copies of the bases are held against the first ones and never kept."""
    tensors: dict[str, Tensor] = {}
    firsts: dict[str, str] = {}
    for key in file.entries:
        name = _basis_name(key) or key
        first = firsts.setdefault(name, key)
        if first == key:
            tensors[name] = file.read(key)
        elif not file.repeats(key, tensors[name]):
            raise CheckpointError(f"{path} holds copies of {name} that differ, {first} and {key}: it is damaged")
    return tensors


def _header_text(metadata: Mapping[str, str], path: Path) -> str | None:
    """Return our header's text, ``None`` for a file of PEFT's; a header under a name that was damaged is refused."""
    if HEADER_KEY not in metadata and any(SEAL_WORD in text for text in metadata.values()):
        raise CheckpointError(f"{path} holds a header under a damaged name: get an undamaged copy")
    return metadata.get(HEADER_KEY)


def _basis_name(key: str) -> str | None:
    """Return the top-level name of a basis or of one of the copies that PEFT 0.21.2 and older write for every layer."""
    last = key.rsplit(".", 1)[-1]
    return {BASIS_A: TOP_BASIS_A, BASIS_B: TOP_BASIS_B}.get(last)


def _take_bases(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    basis_A, basis_B = tensors.pop(TOP_BASIS_A, None), tensors.pop(TOP_BASIS_B, None)
    if basis_A is None and basis_B is None:
        return None
    if basis_A is None or basis_B is None:
        raise CheckpointError("the file holds one of the two bases: expected both or none")
    return basis_A, basis_B


def _take_values(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Pair up the Λ and Γ of each target."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key in list(tensors):
        for suffix in (LAMBDA_SUFFIX, GAMMA_SUFFIX):
            if key.startswith(MODEL_PREFIX) and key.endswith(suffix):
                fqn = key.removeprefix(MODEL_PREFIX).removesuffix(suffix)
                pairs.setdefault(fqn, {})[suffix] = tensors.pop(key)
    halves = [fqn for fqn, pair in pairs.items() if len(pair) == 1]
    problems = [f"{fqn} has one of randlora_lambda and randlora_gamma: expected both" for fqn in halves]
    if not pairs:
        problems.append("the file holds no randlora_lambda and randlora_gamma: it is no RandLoRA adapter")
    raise_collected(CheckpointError, problems, doing="read the adapter's tensors")
    return {fqn: (pair[LAMBDA_SUFFIX], pair[GAMMA_SUFFIX]) for fqn, pair in pairs.items()}


def _trained(tensors: Mapping[str, Tensor], targets: Container[str], header: Header | None) -> dict[str, Tensor]:
    """Name the parameters trained beside the adapter as the model does."""
    if header is None:
        return {trained_fqn(key, targets): tensor for key, tensor in tensors.items()}
    keys = {trained_key(fqn, targets): fqn for fqn in header.config.train_also or ()}
    return {fqn: tensors[key] for key, fqn in keys.items() if key in tensors}


def _trained_problems(
    trained: Mapping[str, Tensor], tensors: Mapping[str, Tensor], config: RandLoRAConfig
) -> list[str]:
    if len(trained) == len(tensors) and set(trained) == set(config.train_also or ()):
        return []
    return [f"{len(tensors)} tensors beside Λ and Γ name {len(trained)} parameters: expected those trained beside it"]


def _stray(keys: Iterable[str]) -> list[str]:
    """Tell a whole model or another adapter's file by its names, before any of it is read."""
    strange = [key for key in keys if not key.startswith(MODEL_PREFIX) and key not in (TOP_BASIS_A, TOP_BASIS_B)]
    return [f"{key!r} is no name of an adapter's tensor" for key in strange]


def _disagreements(fields: Mapping[str, Any], header: Header | None) -> list[str]:
    """Compare the two files of one adapter: neither may have come from another save."""
    if header is None:
        return []
    config = header.config
    pairs: dict[str, tuple[object, object]] = {
        "r": (fields.get("r"), config.r),
        "randlora_alpha": (fields.get("randlora_alpha"), config.effective_alpha),
        "randlora_dropout": (fields.get("randlora_dropout"), config.dropout),
        "projection_prng_key": (fields.get("projection_prng_key"), config.seed),
    }
    if config.basis != "block":
        pairs["kind of basis"] = (peft_kind(fields), config.basis)
    return [
        f"{CONFIG_FILE} says {name}={ours!r}, the tensors were saved with {theirs!r}: the files are of two saves"
        for name, (ours, theirs) in pairs.items()
        if ours != theirs
    ]


def _damage(
    values: Mapping[str, tuple[Tensor, Tensor]], trained: Mapping[str, Tensor], bases: tuple[Tensor, Tensor] | None
) -> list[str]:
    named = {
        f"{fqn}{suffix}": part
        for fqn, pair in values.items()
        for suffix, part in zip((LAMBDA_SUFFIX, GAMMA_SUFFIX), pair, strict=True)
    }
    named |= {**trained} | ({} if bases is None else dict(zip((BASIS_A, BASIS_B), bases, strict=True)))
    problems = []
    for name, tensor in named.items():
        if tensor.dtype not in DTYPES:
            problems.append(f"{name} holds {tensor.dtype}: expected one of {', '.join(map(str, DTYPES))}")
        elif not _is_finite(tensor):
            problems.append(f"{name} holds NaN or infinite values")
    return problems


def _is_finite(tensor: Tensor) -> bool:
    """Look at the bounds, which are NaN where any value is: `torch.isfinite` would copy the tensor to find out."""
    return not tensor.numel() or all(bound.isfinite().item() for bound in tensor.aminmax())


def _shape_problems(
    r: int, values: Mapping[str, tuple[Tensor, Tensor]], bases: tuple[Tensor, Tensor] | None
) -> list[str]:
    problems = []
    for fqn, (lam, gamma) in values.items():
        if (
            lam.ndim != 2
            or gamma.ndim != 2
            or lam.shape != (r, len(gamma))
            or len(gamma) != count_bases(gamma.shape[1], r)
        ):
            problems.append(
                f"{fqn} has randlora_lambda {tuple(lam.shape)} and randlora_gamma {tuple(gamma.shape)}: "
                f"expected ({r}, num_bases) and (num_bases, min_dim) with num_bases = ceil(min_dim / {r})"
            )
    if bases is not None:
        shape_A, shape_B = tuple(bases[0].shape), tuple(bases[1].shape)
        min_dim = shape_A[-1] if shape_A else 0
        if shape_A != (r, 1, min_dim) or len(shape_B) != 3 or shape_B[1:] != (count_bases(min_dim, r), r):
            problems.append(f"the bases have shapes {shape_A} and {shape_B}, which do not fit r={r}")
    return problems

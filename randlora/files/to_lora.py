"""An adapter as a LoRA: every update cut to a low rank, with the error of each stated."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from randlora.checkpoint.contents import FORMAT, json_writer, write_tensors
from randlora.checkpoint.layout import CONFIG_FILE, MODEL_PREFIX, TENSORS_FILE, trained_key
from randlora.checkpoint.peft_config import PEFT_VERSION
from randlora.checkpoint.tensors_file import open_tensors
from randlora.checkpoint.write import Writer
from randlora.errors import ConfigError
from randlora.files.adapter import OpenAdapter
from randlora.files.low_rank import LowRank, frobenius_norm, of_rank, within
from randlora.files.progress import Progress
from randlora.files.tensor_file import Planned, write_tensor_file
from randlora.targets.match import has_suffix

DEFAULT_TOLERANCE = 0.05
LISTED = 5

CARRIED_FIELDS = (
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "modules_to_save",
    "revision",
    "task_type",
)
"""Fields that mean the same for a LoRA."""

BIAS = {"randlora_only": "lora_only"}
"""The values of PEFT's field ``bias`` that have another name for a LoRA."""


@dataclass(frozen=True)
class LoraLayer:
    """How one layer was converted.

    Attributes:
        fqn: Its name.
        out_features: Output width.
        in_features: Input width.
        rank: Rank of its LoRA.
        relative_error: ``‖ΔW - lora_B @ lora_A‖ / ‖ΔW‖``, Frobenius norms.
        norm: ``‖ΔW‖``.
    """

    fqn: str
    out_features: int
    in_features: int
    rank: int
    relative_error: float
    norm: float


@dataclass(frozen=True, eq=False)
class Lora:
    """What the files of a LoRA adapter hold.

    Attributes:
        fields: ``adapter_config.json``.
        tensors: ``adapter_model.safetensors``, tensor by tensor.
        layers: How each layer was converted.
    """

    fields: dict[str, Any]
    tensors: tuple[Planned, ...]
    layers: tuple[LoraLayer, ...]

    @property
    def writers(self) -> dict[str, Writer]:
        """How both files are written, with one tensor in memory at a time."""
        return {TENSORS_FILE: self._write_tensors, CONFIG_FILE: json_writer(self.fields)}

    def _write_tensors(self, path: Path) -> None:
        path.unlink()  # which was made empty, and shall be a new file
        write_tensor_file(path, self.tensors, FORMAT, _untold)


def to_lora(adapter: OpenAdapter, rank: int | None, tolerance: float | None, scratch: Path, progress: Progress) -> Lora:
    """Cut every update of an adapter to a low rank, layer by layer.

    Args:
        adapter: The adapter; its layers' shapes must be known.
        rank: Of every layer; ``None`` for the smallest one of each layer that is within the tolerance.
        tolerance: The largest relative error accepted of a layer; ``None`` means 0.05.
        scratch: A directory to keep the factors in, which together may be as large as the model.
        progress: Told of every layer.

    Raises:
        CheckpointError: When the shapes are not known.
        ConfigError: When a layer's error is beyond the tolerance.
    """
    shapes, _ = adapter.require_shapes()
    accepted = DEFAULT_TOLERANCE if tolerance is None else tolerance
    layers: list[LoraLayer] = []
    tensors: list[Planned] = []
    for done, (fqn, shape) in enumerate(shapes.items()):
        progress(done, len(shapes), fqn)
        update = adapter.delta_weight(fqn).float()
        found = within(update, accepted) if rank is None else of_rank(update, rank)
        layers.append(LoraLayer(fqn, *shape, found.rank, found.relative_error, frobenius_norm(update)))
        tensors += _kept(fqn, found, scratch / f"{done}.safetensors")
        del update, found  # before the next ones are made
    progress(len(shapes), len(shapes), "done")
    _refuse_loss(layers, rank, accepted)
    for fqn, tensor in adapter.file.trained.items():
        tensors.append(Planned(trained_key(fqn, shapes), tensor.dtype, tuple(tensor.shape), partial(_one, tensor)))
    return Lora(_fields(adapter, {layer.fqn: layer.rank for layer in layers}), tuple(tensors), tuple(layers))


def _kept(fqn: str, factors: LowRank, path: Path) -> Iterator[Planned]:
    """Put the factors of one layer into a file, and say how they are read back."""
    named = {f"{MODEL_PREFIX}{fqn}.lora_A.weight": factors.right, f"{MODEL_PREFIX}{fqn}.lora_B.weight": factors.left}
    write_tensors(path, named)
    for key, factor in named.items():
        yield Planned(key, factor.dtype, tuple(factor.shape), partial(_read, path, key))


def _read(path: Path, key: str) -> Iterator[Tensor]:
    with open_tensors(path) as file:
        yield file.read(key)


def _untold(count: int, name: str) -> None:
    """Tell nobody: next to the decompositions, writing takes no time."""


def _one(tensor: Tensor) -> Iterator[Tensor]:
    yield tensor


def _refuse_loss(layers: Sequence[LoraLayer], rank: int | None, tolerance: float) -> None:
    lossy = [layer for layer in layers if layer.relative_error > tolerance]
    if not lossy:
        return
    lossy.sort(key=lambda layer: -layer.relative_error)
    listed = ", ".join(f"{layer.fqn} {layer.relative_error:.3g}" for layer in lossy[:LISTED])
    more = f" and {len(lossy) - LISTED} more" if len(lossy) > LISTED else ""
    choice = "the full rank" if rank is None else f"rank={rank}"
    remedy = "" if rank is None else "a larger rank, none for the smallest that is within the tolerance, or "
    raise ConfigError(
        f"cannot convert to LoRA: with {choice} {len(lossy)} of {len(layers)} layers have a relative error beyond "
        f"tolerance={tolerance:g} ({listed}{more}); the largest is {lossy[0].relative_error:.4g}: "
        f"give {remedy}a tolerance that accepts this"
    )


def _fields(adapter: OpenAdapter, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Write the JSON; every scaling is ``alpha / rank = 1``, so the product of the factors is the update."""
    own = adapter.file.fields
    rank = max(ranks.values())
    pattern = {} if set(ranks.values()) == {rank} else _pattern(ranks)
    fields = {
        **{name: own.get(name) for name in CARRIED_FIELDS},
        **_targets(own, tuple(ranks)),
        "alpha_pattern": pattern,
        "bias": BIAS.get(own.get("bias", "none"), own.get("bias", "none")),
        "fan_in_fan_out": bool(own.get("fan_in_fan_out")),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": adapter.file.config.dropout,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": rank,
        "rank_pattern": pattern,
        "use_dora": False,
        "use_rslora": False,
    }
    return dict(sorted(fields.items()))


def _pattern(ranks: Mapping[str, int]) -> dict[str, int]:
    """Give every rank under a regex. PEFT matches it with the ends of names too, so the longest name comes first."""
    return {re.escape(fqn): ranks[fqn] for fqn in sorted(ranks, key=lambda fqn: (-len(fqn), fqn))}


def _targets(fields: Mapping[str, Any], fqns: Sequence[str]) -> dict[str, Any]:
    """Name the layers as the adapter's own JSON does, where that is a list which fits them; else by a regex."""
    named = fields.get("target_modules")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    if all(any(has_suffix(fqn, name) for name in names) for fqn in fqns):
        return {
            "target_modules": names,
            "layers_to_transform": fields.get("layers_to_transform"),
            "layers_pattern": fields.get("layers_pattern"),
        }
    regex = "|".join(re.escape(fqn) for fqn in fqns)
    return {"target_modules": regex, "layers_to_transform": None, "layers_pattern": None}

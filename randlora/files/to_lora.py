"""Converting an adapter to a LoRA: a low-rank approximation of every update, with the error of each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from randlora.checkpoint.format import METADATA
from randlora.checkpoint.keys import MODEL_PREFIX, trained_key
from randlora.checkpoint.peft_config import BASE_FIELD, PEFT_VERSION
from randlora.disk.tensor_file import Planned, read_pieces, read_shard, write_tensor_file
from randlora.errors import ConfigError, raise_collected
from randlora.files.adapter import OpenAdapter
from randlora.files.low_rank import LowRank, frobenius_norm, of_rank, within
from randlora.hints import shortly
from randlora.report import Progress
from randlora.targets.match import has_suffix

DEFAULT_TOLERANCE = 0.05
LISTED = 5
LARGEST_SERVED = 512  # the largest rank that servers have; a higher one than a layer's sides adds zeros

CARRIED_FIELDS = (
    "auto_mapping",
    BASE_FIELD,
    "fan_in_fan_out",
    "modules_to_save",
    "revision",
    "task_type",
)
"""Fields that have the same meaning for a LoRA."""

BIAS = {"randlora_only": "lora_only"}
"""Values of PEFT's field ``bias`` that have another name for a LoRA."""


@dataclass(frozen=True)
class LoraLayer:
    """How one layer was converted.

    Attributes:
        fqn: Its FQN.
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
    """The contents of the files of a LoRA adapter, and how each layer was converted."""

    fields: dict[str, Any]
    tensors: tuple[Planned, ...]
    layers: tuple[LoraLayer, ...]


def to_lora(adapter: OpenAdapter, rank: int | None, tolerance: float | None, scratch: Path, progress: Progress) -> Lora:
    """Approximate every update of an adapter by one of low rank, layer by layer.

    Without a rank, each layer gets the smallest whose relative error is within the tolerance, 0.05 if ``None``. A
    larger error of any layer is a `ConfigError`. ``scratch`` is a directory for the factors, which together may be as
    large as the model.
    """
    shapes = adapter.require_shapes()
    stacks = [
        f"{fqn} is a stack of {shape[0]} matrices, and only linear layers are converted"
        for fqn, shape in shapes.items()
        if len(shape) == 3
    ]
    others = [f"{fqn} is of kind {kind}, and only linear layers are converted" for fqn, kind in adapter.kinds.items()]
    factors = {key for fqn in shapes for key in _factor_keys(fqn)}
    clashes = [
        f"{fqn} would have the name of a factor of an update: rename it"
        for fqn in adapter.file.trained
        if trained_key(fqn, shapes) in factors
    ]
    raise_collected(ConfigError, [*(stacks or others), *clashes], doing="convert to a LoRA")
    highest = max(LARGEST_SERVED, *map(min, shapes.values()))
    if rank is not None and rank > highest:
        raise ConfigError(f"cannot convert to a LoRA: rank must be at most {highest}, got {shortly(rank)}")
    accepted = DEFAULT_TOLERANCE if tolerance is None else tolerance
    layers: list[LoraLayer] = []
    tensors: list[Planned] = []
    for done, (fqn, (out_features, in_features)) in enumerate(shapes.items()):
        progress(done, len(shapes), fqn)
        (update,) = adapter.delta_weights(fqn)
        update = update.float()
        found = within(update, accepted) if rank is None else of_rank(update, rank)
        layers.append(
            LoraLayer(fqn, out_features, in_features, found.rank, found.relative_error, frobenius_norm(update))
        )
        tensors += _stored(fqn, found, scratch / f"{done}.safetensors")
        del update, found  # before the next ones are computed
    progress(len(shapes), len(shapes), "done")
    _refuse_loss(layers, rank, accepted)
    tensors += [Planned.whole(trained_key(fqn, shapes), tensor) for fqn, tensor in adapter.file.trained.items()]
    return Lora(_fields(adapter, {layer.fqn: layer.rank for layer in layers}), tuple(tensors), tuple(layers))


def _factor_keys(fqn: str) -> tuple[str, str]:
    """Return the names of the two factors of one layer's update."""
    return f"{MODEL_PREFIX}{fqn}.lora_A.weight", f"{MODEL_PREFIX}{fqn}.lora_B.weight"


def _stored(fqn: str, factors: LowRank, path: Path) -> Iterator[Planned]:
    """Store the factors of one layer in a file, and yield how they are copied from there."""
    named = zip(_factor_keys(fqn), (factors.right, factors.left), strict=True)
    write_tensor_file(path, [Planned.whole(key, factor) for key, factor in named], METADATA)
    for entry in read_shard(path).entries:
        yield Planned(entry.name, entry.dtype, entry.shape, partial(read_pieces, entry))


def _refuse_loss(layers: Sequence[LoraLayer], rank: int | None, tolerance: float) -> None:
    lossy = [layer for layer in layers if layer.relative_error > tolerance]
    if not lossy:
        return
    lossy.sort(key=lambda layer: -layer.relative_error)
    listed = ", ".join(f"{layer.fqn} {layer.relative_error:.3g}" for layer in lossy[:LISTED])
    more = f" and {len(lossy) - LISTED} more" if len(lossy) > LISTED else ""
    choice = "the full rank" if rank is None else f"rank={rank}"
    remedy = "" if rank is None else "a larger rank, no rank for the smallest within the tolerance, or "
    raise ConfigError(
        f"cannot convert to LoRA: with {choice} {len(lossy)} of {len(layers)} layers have a relative error above "
        f"tolerance={tolerance:g} ({listed}{more}); the largest is {lossy[0].relative_error:.4g}: "
        f"give {remedy}a larger tolerance"
    )


def _fields(adapter: OpenAdapter, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the JSON. Every scaling is ``alpha / rank = 1``, so the product of the factors is the update."""
    own = adapter.file.fields
    rank = max(ranks.values())
    pattern = {}
    if set(ranks.values()) != {rank}:  # PEFT matches each regex with the ends of names too: the longest comes first
        pattern = {re.escape(fqn): ranks[fqn] for fqn in sorted(ranks, key=lambda fqn: (-len(fqn), fqn))}
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


def _targets(fields: Mapping[str, Any], fqns: Sequence[str]) -> dict[str, Any]:
    """Return the fields that name the layers: those of the adapter if they are a list that fits, else a regex."""
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

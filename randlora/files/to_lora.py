"""Converting an adapter to a LoRA: a low-rank approximation of every update, with the error of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from randlora.checkpoint.tensors import METADATA
from randlora.disk.tensor_file import Entry, Planned, read_shard, write_tensor_file
from randlora.errors import ConfigError, spelled
from randlora.files.adapter import OpenAdapter
from randlora.files.low_rank import LowRank, frobenius_norm, of_rank, within
from randlora.hints import shortly
from randlora.report import Progress

DEFAULT_TOLERANCE = 0.05
LISTED = 5
LARGEST_SERVED = 512  # the largest rank that servers have; a higher one than a layer's sides adds zeros


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
class Factors:
    """The factors of one layer's update in a file: ``lora_A``, ``(rank, in)``, and ``lora_B``, ``(out, rank)``."""

    layer: LoraLayer
    lora_A: Entry
    lora_B: Entry


def not_linear(adapter: OpenAdapter) -> list[str]:
    """Return what is wrong with layers that are not linear, whose update is not that of one matrix."""
    stacks = [
        f"{fqn} is a stack of {shape[0]} matrices, and only linear layers are converted"
        for fqn, shape in adapter.require_shapes().items()
        if len(shape) == 3
    ]
    return stacks or [
        f"{fqn} is of kind {kind}, and only linear layers are converted" for fqn, kind in adapter.kinds.items()
    ]


def low_rank_factors(
    adapter: OpenAdapter, rank: int | None, tolerance: float | None, scratch: Path, progress: Progress
) -> tuple[Factors, ...]:
    """Approximate every update of an adapter by one of low rank, layer by layer.

    Without a rank, each layer gets the smallest whose relative error is within the tolerance, 0.05 if ``None``. A
    larger error of any layer is a `ConfigError`. ``scratch`` is a directory for the factors, which together may be as
    large as the model.
    """
    shapes = adapter.require_shapes()
    highest = max(LARGEST_SERVED, *map(min, shapes.values()))
    if rank is not None and rank > highest:
        raise ConfigError(f"cannot convert to a LoRA: rank must be at most {highest}, got {shortly(rank)}")
    accepted = DEFAULT_TOLERANCE if tolerance is None else tolerance
    factors: list[Factors] = []
    for done, (fqn, (out_features, in_features)) in enumerate(shapes.items()):
        progress(done, len(shapes), fqn)
        (update,) = adapter.delta_weights(fqn)
        update = update.float()
        found = within(update, accepted) if rank is None else of_rank(update, rank)
        layer = LoraLayer(fqn, out_features, in_features, found.rank, found.relative_error, frobenius_norm(update))
        factors.append(_stored(layer, found, scratch / f"{done}.safetensors"))
        del update, found  # before the next ones are computed
    progress(len(shapes), len(shapes), "done")
    _refuse_loss([each.layer for each in factors], rank, accepted)
    return tuple(factors)


def _stored(layer: LoraLayer, factors: LowRank, path: Path) -> Factors:
    """Store the factors of one layer in a file of their own."""
    named = {"lora_A": factors.right, "lora_B": factors.left}
    write_tensor_file(path, [Planned.whole(name, factor) for name, factor in named.items()], METADATA)
    return Factors(layer, **{entry.name: entry for entry in read_shard(path).entries})


def _refuse_loss(layers: Sequence[LoraLayer], rank: int | None, tolerance: float) -> None:
    lossy = [layer for layer in layers if layer.relative_error > tolerance]
    if not lossy:
        return
    lossy.sort(key=lambda layer: -layer.relative_error)
    listed = ", ".join(f"{layer.fqn} {layer.relative_error:.3g}" for layer in lossy[:LISTED])
    more = f" and {len(lossy) - LISTED} more" if len(lossy) > LISTED else ""
    choice = "the full rank" if rank is None else spelled("rank", rank)
    remedy = "" if rank is None else "a larger rank, no rank for the smallest within the tolerance, or "
    raise ConfigError(
        f"cannot convert to LoRA: with {choice}, {len(lossy)} of {len(layers)} layers have a relative error above "
        f"{spelled('tolerance', tolerance)} ({listed}{more}); the largest is {lossy[0].relative_error:.4g}: "
        f"give {remedy}a larger tolerance"
    )

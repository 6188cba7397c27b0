"""An adapter as a LoRA, the product of two thin matrices, named and arranged as other programs do it.

It is for PEFT, whose files vLLM, SGLang and llama.cpp's converter read too, or for diffusers. A given rank of a large
matrix is found by a randomized singular value decomposition (Halko et al. 2011), everything else by an exact one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.checkpoint.peft_layout import (
    BASE_FIELD,
    MODEL_PREFIX,
    PEFT_VERSION,
    ROWS_FIELD,
    ROWS_KEY,
    TENSORS_FILE,
    pattern_fields,
    trained_key,
)
from randlora.checkpoint.save import files_of
from randlora.config import LayerOptions
from randlora.disk.formats import METADATA, Planned, write_tensor_file
from randlora.disk.replace import Files
from randlora.errors import ConfigError, named, spelled
from randlora.files.adapter import OpenAdapter
from randlora.files.model_directory import Progress
from randlora.hints import shortly
from randlora.targets.match import has_suffix, shortened

Format = Literal["peft", "native", "lora"]
Layout = Literal["peft", "diffusers"]
Component = Literal["unet", "transformer", "text_encoder", "text_encoder_2"]  # attributes of diffusers' pipelines

WEIGHTS: dict[Layout, str] = {"peft": TENSORS_FILE, "diffusers": "pytorch_lora_weights.safetensors"}
"""The files of the tensors, of which readers of a directory take the one with the name that they expect."""

TRANSPOSED = (
    "the model stores weights transposed, like GPT-2: llama.cpp's converter would transpose the factors too, which is "
    "wrong, so merge for llama.cpp"
)

CARRIED_FIELDS = ("auto_mapping", BASE_FIELD, "fan_in_fan_out", "modules_to_save", "revision", "task_type")
"""Fields that have the same meaning for a LoRA."""

BEGINNINGS: dict[Component, tuple[str, ...]] = {
    "unet": ("down_blocks", "mid_block", "up_blocks"),
    "transformer": ("transformer_blocks", "single_transformer_blocks"),
    "text_encoder": ("text_model", "encoder"),
}
"""The first parts of names that only such a model of a pipeline has."""

Planning = tuple[Files, list[str]]  # files that are to be written, and notes for the user

EXACT_UP_TO = 1024  # the smaller dim up to which the exact decomposition takes half a second
WORTHWHILE = 4  # a randomized one is faster only for ranks below 1 / 4 of the smaller dim
OVERSAMPLING = 16
POWER_ITERATIONS = 4
SEED = 0

DEFAULT_TOLERANCE = 0.05
LARGEST_SERVED = 512  # the largest rank that servers have; a higher one than a layer's sides adds zeros
LISTED = 5


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


class Lora(NamedTuple):
    """The LoRA of one layer: ``lora_A``, ``(rank, in)``, and ``lora_B``, ``(out, rank)``, whose product is the update.

    Each singular value is distributed over both factors by its root.
    """

    layer: LoraLayer
    lora_A: Tensor
    lora_B: Tensor

    def padded(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return both factors with zeros up to a rank."""
        added = rank - self.layer.rank
        return F.pad(self.lora_A, (0, 0, 0, added)), F.pad(self.lora_B, (0, added))


def layout_problems(adapter: OpenAdapter, layout: Layout) -> list[str]:
    """Return the parts of an adapter that a layout cannot hold."""
    trained, shapes = adapter.file.trained, adapter.require_shapes()
    stacks = {fqn: f"a stack of {shape[0]} matrices" for fqn, shape in shapes.items() if len(shape) == 3}
    others = stacks or {fqn: f"of kind {kind}" for fqn, kind in adapter.kinds.items()}
    problems = [f"{fqn} is {what}, and only linear layers are converted" for fqn, what in others.items()]
    if layout == "peft":
        keys = {key for fqn in shapes for key in _keys(MODEL_PREFIX + fqn)}
        taken = [fqn for fqn in trained if trained_key(fqn, shapes) in keys]
        problems += [f"{fqn} would have the name of a factor of an update: rename it" for fqn in taken]
    elif trained:
        other, peft = spelled("format", layout), spelled("format", "peft")
        named = shortened(sorted(trained), LISTED)
        problems.append(f"{other} holds only updates, but the adapter has trained {named} too: use {peft}")
    return problems


def recognized(fqns: Iterable[str]) -> Component:
    """Return the model of a pipeline that layers with such names are in."""
    first = {fqn.partition(".")[0] for fqn in fqns}
    return next((part for part, beginnings in BEGINNINGS.items() if first & set(beginnings)), "transformer")


def peft_files(directory: Path, adapter: OpenAdapter, loras: Sequence[Lora], *, same_rank: bool) -> Planning:
    """Return what PEFT's ``save_pretrained`` would write, and notes."""
    shapes, ranks = adapter.require_shapes(), {lora.layer.fqn: lora.layer.rank for lora in loras}
    rows = adapter.file.rows
    tensors = {
        trained_key(fqn, shapes).removesuffix(".weight") + ROWS_KEY if fqn in rows else trained_key(fqn, shapes): tensor
        for fqn, tensor in adapter.file.trained.items()
    }
    notes = ["parameters trained with the adapter are included: not every server reads them"] if tensors else []
    if same_rank:
        notes = _padding_notes(loras) + notes
        ranks = dict.fromkeys(ranks, max(ranks.values()))
    elif len({*ranks.values()}) > 1:
        mixed = (
            "the ranks differ between layers, as rank_pattern and alpha_pattern say: PEFT and vLLM load that, SGLang "
            f"does not, and llama.cpp would scale layers wrongly; {spelled('same_rank', value=True)} pads all to one "
            f"rank, and {spelled('rank')} cuts all to one"
        )
        notes = [mixed, *notes]
    for lora in loras:
        tensors |= zip(_keys(MODEL_PREFIX + lora.layer.fqn), lora.padded(ranks[lora.layer.fqn]), strict=True)
    fields = _fields(adapter, ranks)
    if rows:
        fields[ROWS_FIELD] = {fqn.removesuffix(".weight"): [*own] for fqn, own in rows.items()}
    if isinstance(fields["target_modules"], str):
        notes.append(
            "target_modules is a regex, because no list of names selects exactly these layers: SGLang reads only a list"
        )
    if adapter.transposed or fields["fan_in_fan_out"]:
        notes.append(TRANSPOSED)
    return _files("peft", directory, tensors, METADATA, fields), notes


def diffusers_files(directory: Path, loras: Sequence[Lora], component: Component) -> Planning:
    """Return what ``save_lora_weights`` of a pipeline would write for one of its models, and notes.

    Older versions of diffusers take one scaling for all layers of a file, so all have one rank. The metadata names the
    layers by a regex, because PEFT would take a list of names for ends of names.
    """
    rank = max(lora.layer.rank for lora in loras)
    tensors: dict[str, Tensor] = {}
    for lora in loras:
        tensors |= zip(_keys(f"{component}.{lora.layer.fqn}"), lora.padded(rank), strict=True)
    config = {"lora_alpha": rank, "r": rank, "target_modules": _regex(lora.layer.fqn for lora in loras)}
    packed = {f"{component}.{name}": value for name, value in config.items()}
    metadata = {**METADATA, "lora_adapter_metadata": json.dumps(packed, sort_keys=True)}
    note = f"for {component!r} of a pipeline: {spelled('component')} names a different one of its models"
    return _files("diffusers", directory, tensors, metadata, None), [note, *_padding_notes(loras)]


def _files(
    layout: Layout, directory: Path, tensors: dict[str, Tensor], metadata: dict[str, str], fields: dict[str, Any] | None
) -> Files:
    planned = [Planned.whole(*item) for item in tensors.items()]
    write = partial(write_tensor_file, tensors=planned, metadata=metadata)
    return files_of(directory, {WEIGHTS[layout]: write}, fields)


def _padding_notes(loras: Sequence[Lora]) -> list[str]:
    ranks = {lora.layer.rank for lora in loras}
    note = f"the factors of all layers are padded with zeros to rank {max(ranks)}, which changes no update"
    return [note] if len(ranks) > 1 else []


def _keys(path: str) -> tuple[str, str]:
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight"


def _fields(adapter: OpenAdapter, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the JSON. Every scaling is ``alpha / rank = 1``, so the product of the factors is the update."""
    own, rank = adapter.file.fields, max(ranks.values())
    bias, targets = own.get("bias", "none"), own.get("target_modules")
    # the adapter's fields name the layers if they are a list that fits, else a regex does
    names = [name for name in targets if isinstance(name, str)] if isinstance(targets, list) else []
    fits = all(any(has_suffix(fqn, name) for name in names) for fqn in ranks)
    fields = {
        **{name: own.get(name) for name in CARRIED_FIELDS},
        "target_modules": names if fits else _regex(ranks),
        "layers_to_transform": own.get("layers_to_transform") if fits else None,
        "layers_pattern": own.get("layers_pattern") if fits else None,
        "alpha_pattern": {},
        "bias": "lora_only" if bias == "randlora_only" else bias,
        "fan_in_fan_out": bool(own.get("fan_in_fan_out")),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": adapter.file.config.dropout,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": rank,
        "rank_pattern": {},
        "use_dora": False,
        "use_rslora": False,
        **pattern_fields({fqn: LayerOptions(own_rank, float(own_rank)) for fqn, own_rank in ranks.items()}),
    }
    return dict(sorted(fields.items()))


def _regex(fqns: Iterable[str]) -> str:
    return "|".join(map(re.escape, fqns))


def low_rank(adapter: OpenAdapter, rank: int | None, tolerance: float | None, progress: Progress) -> list[Lora]:
    """Approximate every update of an adapter by one of low rank, layer by layer.

    Without a rank, each layer gets the smallest whose relative error is within the tolerance, 0.05 if ``None``. A
    larger error of any layer is a `ConfigError`.
    """
    shapes = adapter.require_shapes()
    highest = max(LARGEST_SERVED, *map(min, shapes.values()))
    if rank is not None and rank > highest:
        raise ConfigError(f"cannot convert to a LoRA: {named('rank')} must be at most {highest}, got {shortly(rank)}")
    accepted = DEFAULT_TOLERANCE if tolerance is None else tolerance
    loras: list[Lora] = []
    for done, (fqn, (out_features, in_features)) in enumerate(shapes.items()):
        progress(done, len(shapes), fqn)
        update = next(adapter.delta_weights(fqn)).float()
        lora_B, lora_A, error = within(update, accepted) if rank is None else of_rank(update, rank)
        layer = LoraLayer(fqn, out_features, in_features, len(lora_A), error, frobenius_norm(update))
        loras.append(Lora(layer, lora_A, lora_B))
        del update  # before the next one is computed
    progress(len(shapes), len(shapes), "done")
    if lossy := [lora.layer for lora in loras if lora.layer.relative_error > accepted]:
        lossy.sort(key=lambda layer: -layer.relative_error)
        errors = shortened([f"{layer.fqn} {layer.relative_error:.3g}" for layer in lossy], LISTED)
        choice = "the full rank" if rank is None else spelled("rank", rank)
        remedy = "" if rank is None else "a larger rank, no rank for the smallest within the tolerance, or "
        raise ConfigError(
            f"cannot convert to LoRA: with {choice}, {len(lossy)} of {len(loras)} layers have a relative error above "
            f"{spelled('tolerance', accepted)} ({errors}); the largest is {lossy[0].relative_error:.4g}: "
            f"give {remedy}a larger tolerance"
        )
    return loras


class LowRank(NamedTuple):
    """A matrix as the product of two thin ones, and ``‖matrix - left @ right‖ / ‖matrix‖``, in Frobenius norms."""

    left: Tensor
    right: Tensor
    relative_error: float


def of_rank(matrix: Tensor, rank: int) -> LowRank:
    """Return the nearest matrix of a given rank, padded with zeros if the matrix has a lower one."""
    smaller, wanted = min(matrix.shape), rank + OVERSAMPLING
    if smaller <= EXACT_UP_TO or wanted * WORTHWHILE > smaller:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        left, values, right = _randomized(matrix, wanted)
    return _truncated(matrix, left, values, right, rank)


def within(matrix: Tensor, tolerance: float) -> LowRank:
    """Return the matrix of the smallest rank whose relative error is within a tolerance, or else the full rank."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    # the squared error of each rank from 1: the sum of the squares after it, which is not a difference of large numbers
    squares = values.double().square().flip(0).cumsum(0).flip(0)
    errors = torch.cat([squares[1:], squares.new_zeros(1)])
    rank = int((errors <= (tolerance * frobenius_norm(matrix)) ** 2).nonzero()[0]) + 1
    found = _truncated(matrix, left, values, right, rank)
    while found.relative_error > tolerance and rank < len(values):  # the singular values are rounded too
        rank += 1
        found = _truncated(matrix, left, values, right, rank)
    return found


def frobenius_norm(matrix: Tensor) -> float:
    """Return the root of the sum of squares, summed in float64."""
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def spectral_norm(matrix: Tensor) -> float:
    """Return the largest singular value; for a large matrix, a lower bound within a few percent."""
    if min(matrix.shape) <= EXACT_UP_TO:
        return float(torch.linalg.svdvals(matrix)[0])
    return float(_randomized(matrix, OVERSAMPLING)[1][0])


def _randomized(matrix: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first singular vectors and values, without using the global random generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        left, values, right = torch.svd_lowrank(matrix, q=wanted, niter=POWER_ITERATIONS)
    return left, values, right.T


def _truncated(matrix: Tensor, left: Tensor, values: Tensor, right: Tensor, rank: int) -> LowRank:
    roots = values[:rank].sqrt()
    added = rank - len(roots)
    thin_left = F.pad(left[:, :rank] * roots, (0, added))
    thin_right = F.pad(roots.unsqueeze(1) * right[:rank], (0, 0, 0, added))
    norm, distance = frobenius_norm(matrix), frobenius_norm(torch.addmm(matrix, thin_left, thin_right, alpha=-1))
    return LowRank(thin_left, thin_right, distance / norm if norm else 0.0)

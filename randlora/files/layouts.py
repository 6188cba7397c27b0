"""An adapter as a LoRA, the product of two thin matrices, named and arranged as other programs do it.

It is for PEFT, whose files vLLM, SGLang and llama.cpp's converter read too, or for diffusers. Every scaling is 1, so
that the product is the update. A given rank of a large matrix is found by a randomized singular value decomposition
(Halko et al. 2011), everything else by an exact one, and the error is measured with the resulting factors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.checkpoint.peft_config import BASE_FIELD, PEFT_VERSION, pattern_fields
from randlora.checkpoint.save import files_of
from randlora.checkpoint.tensors import METADATA, MODEL_PREFIX, TENSORS_FILE, trained_key
from randlora.config import Component, LayerOptions, Layout
from randlora.disk.formats import Entry, Planned, read_shard, read_tensor, write_tensor_file
from randlora.disk.replace import write_files
from randlora.errors import ConfigError, spelled
from randlora.files.adapter import OpenAdapter
from randlora.hints import shortly
from randlora.report import Progress
from randlora.targets.match import has_suffix

WEIGHTS: dict[Layout, str] = {"peft": TENSORS_FILE, "diffusers": "pytorch_lora_weights.safetensors"}
"""The files of the tensors, of which readers of a directory take the one with the name that they expect."""

TRANSPOSED = (
    "the model stores weights transposed, like GPT-2: llama.cpp's converter would transpose the factors too, which is "
    "wrong, so merge for llama.cpp"
)

LORA_CONFIG_KEY = "lora_adapter_metadata"
"""Where diffusers has the fields of PEFT's configuration in a file's metadata."""

CARRIED_FIELDS = ("auto_mapping", BASE_FIELD, "fan_in_fan_out", "modules_to_save", "revision", "task_type")
"""Fields that have the same meaning for a LoRA."""

BEGINNINGS: dict[Component, tuple[str, ...]] = {
    "unet": ("down_blocks", "mid_block", "up_blocks"),
    "transformer": ("transformer_blocks", "single_transformer_blocks"),
    "text_encoder": ("text_model", "encoder"),
}
"""The first parts of names that only such a model of a pipeline has."""


@dataclass(frozen=True, eq=False)
class AdapterFiles:
    """The files for a different program: a file of tensors, and a JSON if there are ``fields``."""

    tensors_file: str
    tensors: Sequence[Planned]
    fields: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=lambda: METADATA)
    notes: tuple[str, ...] = ()

    def write(self, directory: Path) -> int:
        """Write the files into a directory, all or none, and return their size in bytes."""
        write = partial(write_tensor_file, tensors=self.tensors, metadata=self.metadata)
        (nbytes,) = write_files(files_of(directory, {self.tensors_file: write}, self.fields))
        return nbytes


def layout_problems(adapter: OpenAdapter, layout: Layout) -> list[str]:
    """Return the parts of an adapter that a layout cannot hold."""
    trained, shapes = adapter.file.trained, adapter.require_shapes()
    stacks = {fqn: f"a stack of {shape[0]} matrices" for fqn, shape in shapes.items() if len(shape) == 3}
    others = stacks or {fqn: f"of kind {kind}" for fqn, kind in adapter.kinds.items()}
    problems = [f"{fqn} is {what}, and only linear layers are converted" for fqn, what in others.items()]
    if layout == "peft":
        keys = {key for fqn in shapes for key in _peft_keys(fqn)}
        alike = [fqn for fqn in trained if trained_key(fqn, shapes) in keys]
        return problems + [f"{fqn} would have the name of a factor of an update: rename it" for fqn in alike]
    if names := sorted(trained):
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        named = f"{', '.join(names[:LISTED])}{more}"
        other, peft = spelled("format", layout), spelled("format", "peft")
        problems.append(f"{other} holds only updates, but the adapter has trained {named} too: use {peft}")
    return problems


def recognized(fqns: Iterable[str]) -> Component:
    """Return the model of a pipeline that layers with such names are in."""
    first = {fqn.partition(".")[0] for fqn in fqns}
    return next((part for part, beginnings in BEGINNINGS.items() if first & set(beginnings)), "transformer")


def peft_files(adapter: OpenAdapter, factors: Sequence[StoredFactors], *, same_rank: bool) -> AdapterFiles:
    """Return what PEFT's ``save_pretrained`` would write."""
    shapes, ranks = adapter.require_shapes(), {each.layer.fqn: each.layer.rank for each in factors}
    tensors = [Planned.whole(trained_key(fqn, shapes), tensor) for fqn, tensor in adapter.file.trained.items()]
    notes: list[str] = []
    if same_rank:
        notes += _padding_notes(factors)
        ranks = dict.fromkeys(ranks, max(ranks.values()))
    elif len({*ranks.values()}) > 1:
        notes.append(
            "the ranks differ between layers, as rank_pattern and alpha_pattern say: PEFT and vLLM load that, SGLang "
            f"does not, and llama.cpp would scale layers wrongly; {spelled('same_rank', value=True)} pads all to one "
            f"rank, and {spelled('rank')} cuts all to one"
        )
    if tensors:
        notes.append("parameters trained with the adapter are included: not every server reads them")
    for each in factors:
        tensors += _padded(_peft_keys(each.layer.fqn), each, ranks[each.layer.fqn])
    fields = _fields(adapter, ranks)
    if isinstance(fields["target_modules"], str):
        notes.append(
            "target_modules is a regex, because no list of names selects exactly these layers: SGLang reads only a list"
        )
    if adapter.transposed or fields["fan_in_fan_out"]:
        notes.append(TRANSPOSED)
    return AdapterFiles(WEIGHTS["peft"], tensors, fields, notes=tuple(notes))


def diffusers_files(factors: Sequence[StoredFactors], component: Component) -> AdapterFiles:
    """Return what ``save_lora_weights`` of a pipeline would write for one of its models.

    Older versions of diffusers take one scaling for all layers of a file, so all have one rank. The metadata names the
    layers by a regex, because PEFT would take a list of names for ends of names.
    """
    rank = _highest(factors)
    paths = [(f"{component}.{each.layer.fqn}", each) for each in factors]
    tensors = [
        planned
        for path, each in paths
        for planned in _padded((f"{path}.lora_A.weight", f"{path}.lora_B.weight"), each, rank)
    ]
    config = {"lora_alpha": rank, "r": rank, "target_modules": _regex(each.layer.fqn for each in factors)}
    packed = {f"{component}.{name}": value for name, value in config.items()}
    metadata = {**METADATA, LORA_CONFIG_KEY: json.dumps(packed, sort_keys=True)}
    note = f"for {component!r} of a pipeline: {spelled('component')} names a different one of its models"
    return AdapterFiles(WEIGHTS["diffusers"], tensors, metadata=metadata, notes=(note, *_padding_notes(factors)))


def _highest(factors: Sequence[StoredFactors]) -> int:
    return max(each.layer.rank for each in factors)


def _padding_notes(factors: Sequence[StoredFactors]) -> tuple[str, ...]:
    rank = _highest(factors)
    if all(each.layer.rank == rank for each in factors):
        return ()
    return (f"the factors of all layers are padded with zeros to rank {rank}, which changes no update",)


def _peft_keys(fqn: str) -> tuple[str, str]:
    """Return the names of the two factors of one layer's update."""
    return f"{MODEL_PREFIX}{fqn}.lora_A.weight", f"{MODEL_PREFIX}{fqn}.lora_B.weight"


def _padded(keys: tuple[str, str], factors: StoredFactors, rank: int) -> list[Planned]:
    """Plan to write the factors of a layer with zeros up to a rank."""

    def pieces(entry: Entry, padding: tuple[int, ...]) -> tuple[Tensor]:
        return (F.pad(read_tensor(entry), padding),)

    added, layer = rank - factors.layer.rank, factors.layer
    of_A = (factors.lora_A, (rank, layer.in_features), (0, 0, 0, added))
    of_B = (factors.lora_B, (layer.out_features, rank), (0, added))
    return [
        Planned(key, entry.dtype, shape, partial(pieces, entry, padding))
        for key, (entry, shape, padding) in zip(keys, (of_A, of_B), strict=True)
    ]


def _fields(adapter: OpenAdapter, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the JSON. Every scaling is ``alpha / rank = 1``, so the product of the factors is the update."""
    own, rank = adapter.file.fields, max(ranks.values())
    bias = own.get("bias", "none")
    fields = {
        **{name: own.get(name) for name in CARRIED_FIELDS},
        **_targets(own, tuple(ranks)),
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
        **pattern_fields({fqn: LayerOptions(each, float(each)) for fqn, each in ranks.items()}),
    }
    return dict(sorted(fields.items()))


def _targets(fields: Mapping[str, Any], fqns: Sequence[str]) -> dict[str, Any]:
    """Return the fields that name the layers: the adapter's fields if they are a list that fits, else a regex."""
    named = fields.get("target_modules")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    if all(any(has_suffix(fqn, name) for name in names) for fqn in fqns):
        kept = {name: fields.get(name) for name in ("layers_to_transform", "layers_pattern")}
        return {"target_modules": names, **kept}
    return {"target_modules": _regex(fqns), "layers_to_transform": None, "layers_pattern": None}


def _regex(fqns: Iterable[str]) -> str:
    return "|".join(map(re.escape, fqns))


EXACT_UP_TO = 1024  # the smaller dim up to which the exact decomposition takes half a second
WORTHWHILE = 4  # a randomized one is faster only for ranks below 1 / 4 of the smaller dim
OVERSAMPLING = 16
POWER_ITERATIONS = 4
SEED = 0

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
class StoredFactors:
    """The factors of one layer's update in a file: ``lora_A``, ``(rank, in)``, and ``lora_B``, ``(out, rank)``."""

    layer: LoraLayer
    lora_A: Entry
    lora_B: Entry


class LowRank(NamedTuple):
    """A matrix as the product of two thin matrices, ``(rows, rank)`` and ``(rank, columns)``.

    Each singular value is distributed over both factors by its root. ``relative_error`` is
    ``‖matrix - left @ right‖ / ‖matrix‖``, in Frobenius norms.
    """

    left: Tensor
    right: Tensor
    relative_error: float

    @property
    def rank(self) -> int:
        """Columns of ``left``, rows of ``right``."""
        return self.left.shape[1]


def low_rank_factors(
    adapter: OpenAdapter, rank: int | None, tolerance: float | None, scratch: Path, progress: Progress
) -> tuple[StoredFactors, ...]:
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
    factors: list[StoredFactors] = []
    for done, (fqn, (out_features, in_features)) in enumerate(shapes.items()):
        progress(done, len(shapes), fqn)
        (update,) = adapter.delta_weights(fqn)
        update = update.float()
        found = within(update, accepted) if rank is None else of_rank(update, rank)
        layer = LoraLayer(fqn, out_features, in_features, found.rank, found.relative_error, frobenius_norm(update))
        named, path = {"lora_A": found.right, "lora_B": found.left}, scratch / f"{done}.safetensors"
        write_tensor_file(path, [Planned.whole(*factor) for factor in named.items()], METADATA)
        factors.append(StoredFactors(layer, **{entry.name: entry for entry in read_shard(path).entries}))
        del update, found, named  # before the next ones are computed
    progress(len(shapes), len(shapes), "done")
    _refuse_loss([each.layer for each in factors], rank, accepted)
    return tuple(factors)


def _refuse_loss(layers: Sequence[LoraLayer], rank: int | None, tolerance: float) -> None:
    lossy = sorted((each for each in layers if each.relative_error > tolerance), key=lambda each: -each.relative_error)
    if not lossy:
        return
    listed = ", ".join(f"{layer.fqn} {layer.relative_error:.3g}" for layer in lossy[:LISTED])
    more = f" and {len(lossy) - LISTED} more" if len(lossy) > LISTED else ""
    choice = "the full rank" if rank is None else spelled("rank", rank)
    remedy = "" if rank is None else "a larger rank, no rank for the smallest within the tolerance, or "
    raise ConfigError(
        f"cannot convert to LoRA: with {choice}, {len(lossy)} of {len(layers)} layers have a relative error above "
        f"{spelled('tolerance', tolerance)} ({listed}{more}); the largest is {lossy[0].relative_error:.4g}: "
        f"give {remedy}a larger tolerance"
    )


def of_rank(matrix: Tensor, rank: int) -> LowRank:
    """Return the nearest matrix of a given rank, padded with zeros if the matrix has a lower one."""
    smaller, wanted = min(matrix.shape), rank + OVERSAMPLING
    is_exact = smaller <= EXACT_UP_TO or wanted * WORTHWHILE > smaller
    return _truncated(matrix, *(_exact(matrix) if is_exact else _randomized(matrix, wanted)), rank)


def within(matrix: Tensor, tolerance: float) -> LowRank:
    """Return the matrix of the smallest rank whose relative error is within a tolerance.

    If rounding keeps even the full rank from the tolerance, the full rank is returned.
    """
    left, values, right = _exact(matrix)
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


def _exact(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def _randomized(matrix: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first singular vectors and values, without using the global random generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        left, values, right = torch.svd_lowrank(matrix, q=wanted, niter=POWER_ITERATIONS)
    return left, values, right.T


def _truncated(matrix: Tensor, left: Tensor, values: Tensor, right: Tensor, rank: int) -> LowRank:
    kept = min(rank, len(values))
    roots = values[:kept].sqrt()
    thin_left, thin_right = matrix.new_zeros(len(matrix), rank), matrix.new_zeros(rank, matrix.shape[1])
    thin_left[:, :kept] = left[:, :kept] * roots
    thin_right[:kept] = roots.unsqueeze(1) * right[:kept]
    norm = frobenius_norm(matrix)
    distance = frobenius_norm(torch.addmm(matrix, thin_left, thin_right, alpha=-1))
    return LowRank(thin_left, thin_right, distance / norm if norm else 0.0)

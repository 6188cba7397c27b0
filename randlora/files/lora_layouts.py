"""The files of a LoRA as its readers name and arrange them: PEFT's, diffusers' and those of mlx-lm.

Every scaling is 1, so that the product of the factors is the update. PEFT's layout is also that of vLLM, SGLang and
llama.cpp's converter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from randlora.checkpoint.peft_config import BASE_FIELD, PEFT_VERSION
from randlora.checkpoint.tensors import METADATA, MODEL_PREFIX, TENSORS_FILE, trained_key
from randlora.checkpoint.write import files_of
from randlora.disk.replace import write_files
from randlora.disk.tensor_file import Entry, Planned, read_pieces, read_tensor
from randlora.errors import spelled
from randlora.files.adapter import OpenAdapter
from randlora.files.to_lora import LISTED, Factors
from randlora.options import Component, Layout
from randlora.targets.match import has_suffix

DIFF_FILE = "diff.safetensors"
WEIGHTS: dict[str, str] = {
    "peft": TENSORS_FILE,
    "diffusers": "pytorch_lora_weights.safetensors",
    "mlx": "adapters.safetensors",
    "diff": DIFF_FILE,
}
"""The files of the tensors, of which readers of a directory take the one with the name that they expect."""

TRANSPOSED = (
    "the model stores weights transposed, as GPT-2 does: llama.cpp's converter would transpose the factors too, which "
    "is wrong, so merge for llama.cpp"
)

LORA_CONFIG_KEY = "lora_adapter_metadata"
"""Where diffusers has the fields of PEFT's configuration in a file's metadata."""

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


@dataclass(frozen=True, eq=False)
class AdapterFiles:
    """What another program reads: a file of tensors, and a JSON if there are ``fields``."""

    tensors_file: str
    tensors: Sequence[Planned]
    fields: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=lambda: METADATA)
    notes: tuple[str, ...] = ()

    def write(self, directory: Path) -> int:
        """Write the files into a directory, all or none, and return their size in bytes."""
        files = files_of(directory, self.tensors_file, self.tensors, self.metadata, self.fields)
        (nbytes,) = write_files(files)
        return nbytes


def layout_problems(adapter: OpenAdapter, layout: Layout) -> list[str]:
    """Return what of an adapter a layout cannot hold."""
    trained, shapes = adapter.file.trained, adapter.require_shapes()
    if layout != "peft":
        return only_updates(adapter, spelled("format", layout))
    keys = {key for fqn in shapes for key in _peft_keys(fqn)}
    return [
        f"{fqn} would have the name of a factor of an update: rename it"
        for fqn in trained
        if trained_key(fqn, shapes) in keys
    ]


def only_updates(adapter: OpenAdapter, what: str) -> list[str]:
    """Return what is wrong with an adapter for a file that holds nothing but updates."""
    names = sorted(adapter.file.trained)
    if not names:
        return []
    named = f"{', '.join(names[:LISTED])}{f' and {len(names) - LISTED} more' if len(names) > LISTED else ''}"
    lora = f"{spelled('to', 'lora')} with {spelled('format', 'peft')}"
    return [f"{what} holds updates alone, and the adapter has trained {named} too: use {lora}"]


def _mixed_ranks() -> str:
    return (
        "the ranks differ between layers, as rank_pattern and alpha_pattern say: PEFT and vLLM load that, SGLang does "
        f"not, and llama.cpp would scale layers wrongly; {spelled('same_rank', value=True)} pads all to one rank, and "
        f"{spelled('rank')} cuts all to one"
    )


def peft_files(adapter: OpenAdapter, factors: Sequence[Factors], *, same_rank: bool) -> AdapterFiles:
    """Return what PEFT's ``save_pretrained`` would write."""
    shapes, rank = adapter.require_shapes(), _highest(factors)
    tensors = [Planned.whole(trained_key(fqn, shapes), tensor) for fqn, tensor in adapter.file.trained.items()]
    notes = []
    if len(set(_ranks(factors).values())) > 1:
        notes.append(_padded_note(rank) if same_rank else _mixed_ranks())
    if tensors:
        notes.append("parameters trained with the adapter are included: not every server reads them")
    for each in factors:
        keys = _peft_keys(each.layer.fqn)
        tensors += _padded(keys, each, rank) if same_rank else _copied(keys, each)
    fields = _fields(adapter, dict.fromkeys(_ranks(factors), rank) if same_rank else _ranks(factors))
    if isinstance(fields["target_modules"], str):
        notes.append("target_modules is a regex, because no list of names tells these layers: SGLang reads only a list")
    if adapter.transposed or fields["fan_in_fan_out"]:
        notes.append(TRANSPOSED)
    return AdapterFiles(TENSORS_FILE, tensors, fields, notes=tuple(notes))


def diffusers_files(factors: Sequence[Factors], component: Component) -> AdapterFiles:
    """Return what ``save_lora_weights`` of a pipeline would write for one of its models.

    Older versions of diffusers take one scaling for all layers of a file, so all have one rank. The metadata names the
    layers by a regex, because PEFT would take a list of names for ends of names.
    """
    rank = _highest(factors)
    tensors = []
    for each in factors:
        path = f"{component}.{each.layer.fqn}"
        tensors += _padded((f"{path}.lora_A.weight", f"{path}.lora_B.weight"), each, rank)
    regex = "|".join(re.escape(each.layer.fqn) for each in factors)
    config = {"lora_alpha": rank, "r": rank, "target_modules": regex}
    packed = {f"{component}.{name}": value for name, value in config.items()}
    notes = (
        f"for {component!r} of a pipeline: {spelled('component')} names another of its models",
        *_notes_of_one_rank(factors),
    )
    metadata = {**METADATA, LORA_CONFIG_KEY: json.dumps(packed, sort_keys=True)}
    return AdapterFiles(WEIGHTS["diffusers"], tensors, metadata=metadata, notes=notes)


def mlx_files(adapter: OpenAdapter, factors: Sequence[Factors]) -> AdapterFiles:
    """Return what ``mlx_lm.lora`` would write: transposed factors, of one rank.

    ``keys`` are whole names. All blocks, ``num_layers`` -1, are searched for them, and then the model.
    """
    rank, base = _highest(factors), adapter.file.fields.get(BASE_FIELD)
    tensors: list[Planned] = []
    for each in factors:
        keys = (f"{each.layer.fqn}.lora_a", f"{each.layer.fqn}.lora_b")
        tensors += _padded(keys, each, rank, is_transposed=True)
    names = [each.layer.fqn for each in factors]
    fields = {
        "fine_tune_type": "lora",
        "lora_parameters": {"dropout": 0.0, "keys": names, "rank": rank, "scale": 1.0},
        "num_layers": -1,
        **({} if base is None else {"model": base}),
    }
    return AdapterFiles(WEIGHTS["mlx"], tensors, fields, notes=_notes_of_one_rank(factors))


def _ranks(factors: Sequence[Factors]) -> dict[str, int]:
    return {each.layer.fqn: each.layer.rank for each in factors}


def _highest(factors: Sequence[Factors]) -> int:
    return max(_ranks(factors).values())


def _notes_of_one_rank(factors: Sequence[Factors]) -> tuple[str, ...]:
    return (_padded_note(_highest(factors)),) if len(set(_ranks(factors).values())) > 1 else ()


def _padded_note(rank: int) -> str:
    return f"the factors of all layers are padded with zeros to rank {rank}, which changes no update"


def _peft_keys(fqn: str) -> tuple[str, str]:
    """Return the names of the two factors of one layer's update."""
    return f"{MODEL_PREFIX}{fqn}.lora_A.weight", f"{MODEL_PREFIX}{fqn}.lora_B.weight"


def _copied(keys: tuple[str, str], factors: Factors) -> list[Planned]:
    """Plan to copy the factors of a layer piece by piece."""
    entries = (factors.lora_A, factors.lora_B)
    return [
        Planned(key, entry.dtype, entry.shape, partial(read_pieces, entry))
        for key, entry in zip(keys, entries, strict=True)
    ]


def _padded(keys: tuple[str, str], factors: Factors, rank: int, *, is_transposed: bool = False) -> list[Planned]:
    """Plan to write the factors of a layer with zeros up to a rank, and each transposed if the reader wants that."""
    added = rank - factors.layer.rank
    shape_A, shape_B = (rank, factors.layer.in_features), (factors.layer.out_features, rank)
    planned = []
    for key, entry, shape, padding in zip(
        keys, (factors.lora_A, factors.lora_B), (shape_A, shape_B), ((0, 0, 0, added), (0, added)), strict=True
    ):
        written = shape[::-1] if is_transposed else shape
        pieces = partial(_padded_piece, entry, padding, is_transposed=is_transposed)
        planned.append(Planned(key, entry.dtype, written, pieces))
    return planned


def _padded_piece(entry: Entry, padding: tuple[int, ...], *, is_transposed: bool) -> tuple[Tensor]:
    factor = F.pad(read_tensor(entry), padding)
    return (factor.T if is_transposed else factor,)


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

"""What ``save_pretrained`` of transformers writes of a model: its config, and each tensor under the names in files.

All of this is asked of objects that the model carries, and of modules that made it. Nothing is imported here, and a
model of another library has its tensors written under the names of its state dict.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from randlora.files.model_directory import MODEL_CONFIG_FILE, QUANTIZATION, copy_config
from randlora.layers.cast import in_own_dtypes
from randlora.layers.in_place import plain_class
from randlora.layers.quantized import QuantizedLayer
from randlora.model.merged_values import modules_of, saved_buffers
from randlora.places import own_class
from randlora.replaced import whole_shape
from randlora.targets.ties import tied_away
from randlora.targets.walk import Census

Saved = Callable[[str, Tensor], Mapping[str, Tensor]]
"""Returns what an entry of a state dict becomes in files, by name: itself, or several tensors, as of experts."""


def left_out(census: Census) -> set[str]:
    """Return the names of the entries of a state dict that transformers does not write: tied ones, and what it says."""
    return tied_away(census) | {*(getattr(census.model, "_keys_to_ignore_on_save", None) or ())}


def write_config(model: nn.Module, directory: Path, dtype: torch.dtype | None) -> list[str]:
    """Write the configs that a model of transformers has, which it keeps as they are, and return notes."""
    config: Any = getattr(model, "config", None)
    if not callable(getattr(config, "save_pretrained", None)):
        kind = plain_class(model).__name__
        return [] if config is None else [f"no config was written: that of a {kind} has no save_pretrained"]
    config = copy.deepcopy(config)
    config.architectures = [own_class(plain_class(model)).__name__]
    with in_own_dtypes(model):
        held = dtype or getattr(model, "dtype", None)
    if held is not None:
        config.dtype = str(held).removeprefix("torch.")
    if getattr(config, QUANTIZATION, None) is not None:
        delattr(config, QUANTIZATION)
    config.save_pretrained(directory)
    if dtype is not None:  # also of the configs inside
        copy_config(directory / MODEL_CONFIG_FILE, directory / MODEL_CONFIG_FILE, dtype)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(directory)
    if getattr(config, "auto_map", None):
        return ["the config names code of the model's, which was not copied: copy its files from the base model"]
    return []


def saved_as(census: Census) -> tuple[Saved, list[str]]:
    """Return what writes an entry under transformers' names, and notes.

    What transformers makes of all entries together is watched on the meta device. If it makes the same of each alone,
    entries are converted one by one; else all keep the names in memory, which ``from_pretrained`` reads too.
    """
    model, transposed = census.model, _transposed(census)
    itself: Saved = lambda fqn, tensor: {fqn: tensor.T if fqn in transposed else tensor}  # noqa: E731
    modeling, loading = (sys.modules.get(f"transformers.{name}") for name in ("modeling_utils", "core_model_loading"))
    undo: Any = getattr(loading, "revert_weight_conversion", None)
    kind = getattr(modeling, "PreTrainedModel", ())
    if undo is None or not isinstance(model, kind):
        return itself, []
    entries = dict(_on_meta(census))
    try:
        together = _shapes(undo(model, dict(entries)))
        alone = {fqn: _shapes(undo(model, {fqn: entry})) for fqn, entry in entries.items()}
        is_same = together == {name: shape for parts in alone.values() for name, shape in parts.items()}
    except Exception:  # whatever an operation raises for a tensor without the others, or for codes
        is_same, alone = False, {}
    if not is_same:
        note = (
            "tensors have the names that they have in memory, which transformers reads; other programs may expect the "
            "names that its save_pretrained writes"
        )
        return itself, [note]
    changed = {fqn for fqn, parts in alone.items() if [*parts] != [fqn]}
    return lambda fqn, tensor: undo(model, {fqn: tensor}) if fqn in changed else itself(fqn, tensor), []


def _transposed(census: Census) -> set[str]:
    """Return the names of weights of quantized layers that were put in the place of transformers' `Conv1D`."""
    kind = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())
    sources = {prefix: vars(module).get("source_cls") for prefix, module in modules_of(census)}
    return {f"{prefix}weight" for prefix, source in sources.items() if source is not None and issubclass(source, kind)}


def _on_meta(census: Census) -> Iterator[tuple[str, Tensor]]:
    """Yield the entries of the state dict as tensors without values, whole and dequantized."""
    without = left_out(census)
    for prefix, module in modules_of(census):
        for attribute, held in (*module._parameters.items(), *saved_buffers(module)):
            if held is not None and f"{prefix}{attribute}" not in without:
                site = census.sites_by_key.get((id(module), attribute))
                is_coded = site is not None and issubclass(site.layer_class, QuantizedLayer)
                shape = site.shape if site is not None and is_coded else whole_shape(held)
                yield f"{prefix}{attribute}", torch.empty(shape, dtype=held.dtype, device="meta")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

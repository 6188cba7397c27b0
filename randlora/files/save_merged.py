"""`randlora.files.save_merged`: the merged model of an adapted one, written as a checkpoint, tensor by tensor.

What ``save_pretrained`` of transformers would write is asked of objects that the model carries, and of modules that
made it. Nothing is imported.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from randlora.disk.formats import METADATA, TORCH_DTYPES, Planned, write_tensor_file
from randlora.disk.replace import new_directory
from randlora.errors import ConfigError, MergeError
from randlora.files.merge import FileMergeReport
from randlora.files.model_directory import (
    INDEX_FILE,
    MODEL_CONFIG_FILE,
    QUANTIZATION,
    SINGLE_FILE,
    copy_config,
    write_json,
)
from randlora.hints import require_types, shortly
from randlora.layers.in_place import plain_class
from randlora.layers.scopes import cast
from randlora.model.install import ENGINES
from randlora.model.merged_tensors import MergedTensors, Share
from randlora.model.train_also import moved_note, untrained_notes
from randlora.model.view import collective
from randlora.places import own_class
from randlora.ranks import on_first_rank
from randlora.replaced import CASTS
from randlora.targets.census import Census
from randlora.targets.left_out import are_tied, named_groups

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # the units of sizes, as in `save_pretrained`

DOING = "save the merged model"
NAMES_IN_MEMORY = "tensors are named as in memory, which transformers reads; other programs may expect other names"

Saved = Callable[[str, Tensor], Mapping[str, Tensor]]
"""Returns the tensors in files for an entry of a state dict, by name: itself, or several, such as for experts."""


@collective(writes=False)
def save_merged(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> FileMergeReport:
    """Write the merged model to a new directory, as ``save_pretrained`` would, without merging the model.

    The files contain the tensors of `randlora.merged_tensors`, in one safetensors file or in several with an index, and
    the model's config if it is a transformers config. The directory appears when it is complete.

    If the model is sharded, such as by `fully_shard` or ZeRO-3, this is a collective: every process calls it, the first
    one writes the files that one process would write, and all get its report or an error. The first process holds the
    tensors of one file in CPU memory. If each process trains a copy of the model, the first one writes.

    Args:
        model: A model with adapters, or a wrapper of torch or DeepSpeed around one.
        directory: The directory to create.
        dtype: The dtype of all floating tensors. ``None`` keeps the dtype of each parameter; dequantized weights get
            the dtype that `merge` would choose.
        max_shard_size: The largest size of a file, in bytes or as ``"5GB"``. A larger tensor gets a separate file.

    Returns:
        A report as from `merge`, with the active adapters by name.

    Raises:
        AdapterError: If the model has no adapter.
        ConfigError: For a dtype that is not floating, or an invalid size.
        MergeError: If the directory exists, the files cannot hold a tensor's dtype, or as for `merged_tensors`.
        OSError: If the disk refuses.
    """
    require_types(save_merged, {"model": model, "directory": directory, "max_shard_size": max_shard_size})
    limit = _bytes_of(max_shard_size)
    tensors = MergedTensors.of(model, dtype, doing=DOING)
    factors = tensors.state.active
    merged = tuple(site.fqn for site in tensors.census.adapted if site.layer.factors(factors))
    out, ranks = Path(directory), tensors.ranks
    if not all(engine.is_first_copy(model) for engine in ENGINES):
        return FileMergeReport(out, dict(factors), merged, (), 0, 0, dtype, ())
    with ExitStack() as stack:
        writer = _Writer(tensors, limit, stack)
        notes = on_first_rank(partial(writer.begin, out))
        for _ in tensors.each(writer.add, Share.WHOLE if ranks is None or ranks.is_first else Share.NONE):
            pass
        shards, nbytes = on_first_rank(writer.end)
    return FileMergeReport(out, dict(factors), merged, (), shards, nbytes, dtype, notes)


def _bytes_of(size: int | str) -> int:
    number, unit = (size[:-2], UNITS.get(size[-2:].upper())) if isinstance(size, str) else (size, 1)
    try:
        found = int(float(number) * (unit or 0))
    except (ValueError, OverflowError):
        found = 0
    if found < 1:
        raise ConfigError(f"max_shard_size must be a number of bytes or a text like '5GB', got {shortly(size)}")
    return found


class _Writer:
    """Writes a merged model, in files of at most ``limit`` bytes and their index. A larger tensor has a file alone.

    The directory appears when the stack is closed without an error.
    """

    saved: Saved
    directory: Path

    def __init__(self, tensors: MergedTensors, limit: int, stack: ExitStack) -> None:
        self.tensors, self.limit, self.stack = tensors, limit, stack
        self.left_out = not_written(tensors.census)
        self.waiting: dict[str, Planned] = {}
        self.files: list[list[str]] = []  # the names of the tensors of each, which has its number
        self.nbytes = 0  # of all tensors
        self.written = 0  # of those in files

    def begin(self, out: Path) -> tuple[str, ...]:
        """Open the directory, write the config into it, and return notes."""
        if os.path.lexists(out):
            raise MergeError(f"cannot {DOING}: {out} exists: choose a different name, or remove it")
        tensors = self.tensors
        self.directory = self.stack.enter_context(new_directory(out))
        self.saved, notes = saved_as(tensors)
        notes += _write_config(tensors.census.model, self.directory, tensors.dtype)
        state, census = tensors.state, Census.of(tensors.root)
        active = [adapter for adapter in state.adapters.values() if adapter.is_active]
        notes += untrained_notes(census, state, active)
        notes += moved_note(census, state, active, "the files have them as they are now, and no file of the adapter")
        return tuple(notes)

    def add(self, fqn: str, tensor: Tensor) -> None:
        """Take an entry of the state dict."""
        if fqn in self.left_out:
            return
        if tensor.dtype not in TORCH_DTYPES.values():
            raise MergeError(f"cannot {DOING}: {fqn} has {tensor.dtype}, which safetensors files do not hold")
        for part in self.saved(fqn, tensor.detach().to("cpu")).items():
            planned = Planned.whole(*part)
            if self.waiting and self.nbytes + planned.nbytes > self.written + self.limit:
                self._write_file()
            self.waiting[planned.name] = planned
            self.nbytes += planned.nbytes

    def end(self) -> tuple[int, int]:
        """Write what is left and the index, and return how many files there are and the size of their tensors."""
        self._write_file()
        count, places = len(self.files), dict[str, str]()
        for number, tensors in enumerate(self.files):
            name = SINGLE_FILE if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"
            (self.directory / str(number)).rename(self.directory / name)
            places |= dict.fromkeys(tensors, name)
        if count > 1:
            metadata = {"total_parameters": self.tensors.census.size, "total_size": self.nbytes}
            index = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
            write_json(self.directory / INDEX_FILE, index)
        self.stack.close()
        return count, self.nbytes

    def _write_file(self) -> None:
        tensors, self.waiting = [*self.waiting.values()], {}
        write_tensor_file(self.directory / str(len(self.files)), tensors, METADATA)
        self.files.append([tensor.name for tensor in tensors])
        self.written = self.nbytes


def not_written(census: Census) -> set[str]:
    """Return the names of the entries of a state dict that transformers does not write: what it says, and tied ones.

    Those are the parameters that transformers ties to others and that are still tied; files may lack them.
    """
    by_fqn = {held.fqn: held for held in census.parameters}
    pairs = [(source, name) for source, *names in named_groups(census) for name in names]
    here = [(by_fqn[source], by_fqn[name]) for source, name in pairs if {source, name} <= by_fqn.keys()]
    tied = {other.fqn for one, other in here if are_tied(one, other)}
    return tied | {*(getattr(census.model, "_keys_to_ignore_on_save", None) or ())}


def _write_config(model: nn.Module, directory: Path, dtype: torch.dtype | None) -> list[str]:
    config: Any = getattr(model, "config", None)
    if not callable(getattr(config, "save_pretrained", None)):
        kind = plain_class(model).__name__
        return [] if config is None else [f"no config was written: the config of a {kind} has no save_pretrained"]
    config = copy.deepcopy(config)
    config.architectures = [own_class(plain_class(model)).__name__]
    with _in_own_dtypes(model):
        held = dtype or getattr(model, "dtype", None)
    if held is not None:
        config.dtype = str(held).removeprefix("torch.")
    if getattr(config, QUANTIZATION, None) is not None:
        delattr(config, QUANTIZATION)
    config.save_pretrained(directory)
    if dtype is not None:  # also of the configs inside
        copy_config(directory / MODEL_CONFIG_FILE, directory / MODEL_CONFIG_FILE, dtype)
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.save_pretrained(directory)
    if getattr(config, "auto_map", None):
        return ["the config names Python files of the model, which were not copied: copy them from the base model"]
    return []


@contextmanager
def _in_own_dtypes(model: nn.Module) -> Iterator[None]:
    """Within the block, have a model hold all parameters in the dtypes that it computes with."""
    casts = [(module, name) for module in model.modules() for name in vars(module).get(CASTS, ())]
    wide = [(module, name, own) for module, name in casts if (own := module._parameters.get(name)) is not None]
    rounded: dict[int, nn.Parameter] = {}  # a tied one stays tied
    try:
        for module, name, parameter in wide:
            if id(parameter) not in rounded:
                value = cast(module, name, parameter.detach())
                rounded[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
            module._parameters[name] = rounded[id(parameter)]
        yield
    finally:
        for module, name, parameter in wide:
            module._parameters[name] = parameter


def saved_as(tensors: MergedTensors) -> tuple[Saved, list[str]]:
    """Return what writes an entry under transformers' names, and notes."""
    model, conv1d = tensors.census.model, getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())
    replaced = [(prefix, vars(module).get("source_cls")) for prefix, module in tensors.census.prefixed]
    # weights of quantized layers that took the place of a `Conv1D`
    transposed = {f"{prefix}weight" for prefix, source in replaced if source and issubclass(source, conv1d)}
    itself: Saved = lambda fqn, tensor: {fqn: tensor.T if fqn in transposed else tensor}  # noqa: E731
    modeling, loading = (sys.modules.get(f"transformers.{name}") for name in ("modeling_utils", "core_model_loading"))
    undo: Any = getattr(loading, "revert_weight_conversion", None)
    if undo is None or not isinstance(model, getattr(modeling, "PreTrainedModel", ())):
        return itself, []
    left_out = not_written(tensors.census)
    entries = {entry.fqn: tensors.on_meta(entry) for entry in tensors.entries if entry.fqn not in left_out}
    try:  # if transformers makes of each entry alone what it makes of all together, they are converted one by one
        together = _shapes(undo(model, dict(entries)))
        alone = {fqn: _shapes(undo(model, {fqn: entry})) for fqn, entry in entries.items()}
        is_same = together == {name: shape for parts in alone.values() for name, shape in parts.items()}
    except Exception:  # whatever an operation raises for a tensor without the others, or for codes
        is_same, alone = False, {}
    if not is_same:
        return itself, [NAMES_IN_MEMORY]
    changed = {fqn for fqn, parts in alone.items() if [*parts] != [fqn]}
    return lambda fqn, tensor: undo(model, {fqn: tensor}) if fqn in changed else itself(fqn, tensor), []


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

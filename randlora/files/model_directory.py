"""A model's directory: its config, the headers of its checkpoint, and the other files that go with a model."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from randlora.checkpoint.peft_layout import CONFIG_FILE
from randlora.disk.formats import Entry, Shard, is_there, open_regular, read_json, read_shard, require_regular, shard_of
from randlora.disk.hub import has_file, is_on_hub, local_path, read_header
from randlora.errors import CheckpointError, raise_collected
from randlora.targets.match import shortened

MODEL_CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
QUANTIZATION = "quantization_config"

HEADS = (MODEL_CONFIG_FILE, INDEX_FILE)  # the files to download if only a model's headers are needed

WHOLE = ("model*.safetensors", "*.json", "*.jinja", "*.md", "*.model", "*.py", "*.tiktoken", "*.txt", "LICENSE*")
"""The files to download to merge into a model: weights in this format only, and the files around them."""

CODES = re.compile(
    r"(?P<weight>.+)\.(?:quant_state\.bitsandbytes__(?P<kind>.+)|(?:nested_)?(?:absmax|quant_map))"
    r"|(?P<module>.+)\.(?:SCB|weight_format)",
    re.DOTALL,
)
"""Names of the tensors that bitsandbytes adds for codes of 4 bits, beside the weight, and of 8 bits."""

WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data"),
    *(".ot", ".tflite", ".npz", ".mlmodel", ".pkl", ".index.json"),
)
"""Ends of the names of files with weights, or of their indexes."""

Progress = Callable[[int, int, str], object]
"""Called with the amount done, the total, and a description of the current step."""

LARGEST_CARRIED = 2**30  # the size above which a file is treated as weights in an unknown format


def no_progress(done: int, total: int, doing: str) -> None:
    """Ignore the progress."""


@dataclass(frozen=True, eq=False)
class ModelDirectory:
    """A directory with a model's weights in one safetensors file or several.

    ``config`` is empty if there is no ``config.json``, and ``index`` is ``None`` unless the checkpoint is sharded.
    """

    path: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None = None

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """All tensors by their names in the files."""
        return {entry.name: entry for shard in self.shards for entry in shard.entries}

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def architecture(self) -> str:
        """The first class that ``config.json`` names, or an empty string."""
        found = self.config.get("architectures")
        return found[0] if isinstance(found, list) and found and isinstance(found[0], str) else ""


class StoredCodes(NamedTuple):
    """A tensor that is stored as codes of a kind, and the size of these and of what belongs to them in bytes."""

    kind: str
    nbytes: int


def find_codes(directory: ModelDirectory) -> dict[str, StoredCodes]:
    """Return the tensors that bitsandbytes quantized, by name. Any other quantization raises a `CheckpointError`."""
    advice = "only codes of bitsandbytes are known: take the checkpoint in a floating dtype"
    entries, kinds, sizes = directory.entries, {}, Counter[str]()
    for name in entries:
        if (part := CODES.fullmatch(name)) is not None:
            weight = part["weight"] or f"{part['module']}.weight"
            sizes[weight] += entries[name].nbytes
            if part["kind"] or name.endswith(".SCB"):
                kinds[weight] = part["kind"] or "8 bits"
    settings = directory.config.get(QUANTIZATION)
    if isinstance(settings, dict):
        # the first checkpoints of bitsandbytes do not name it
        is_unnamed = "quant_method" not in settings and ("load_in_4bit" in settings or "load_in_8bit" in settings)
        if not is_unnamed and settings.get("quant_method") != "bitsandbytes":
            method = settings.get("quant_method", "an unnamed method")
            raise CheckpointError(f"{directory.path} is quantized (config.json says with {method}): {advice}")
    if lost := [name for name in kinds if name not in entries]:
        raise CheckpointError(f"{directory.path} has no {shortened(lost)}, only scales of it: get a complete copy")
    return {name: StoredCodes(kind, entries[name].nbytes + sizes[name]) for name, kind in kinds.items()}


def find_model(source: str | os.PathLike[str], revision: str | None = None) -> tuple[Path, str | None]:
    """Return a model's directory, and the repository on the Hub, if it is one, whose config and index are there."""
    return local_path(source, revision, HEADS, are_patterns=True), source if is_on_hub(source) else None


def read_model_directory(path: Path, repo_id: str | None = None, *, needs_weights: bool = True) -> ModelDirectory:
    """Return the headers of a model's checkpoint, one file or sharded, after checking that they agree.

    Those of the files with weights that are not there are requested from the Hub, if it is a repository. If none has
    such a file, the result has the config alone, unless it ``needs_weights``.
    """
    index, weight_map = None, {}
    if is_there(path / INDEX_FILE) and not is_there(path / SINGLE_FILE):
        index = read_object(path / INDEX_FILE)
        weight_map = _weight_map(path, index)
    elif not is_there(path / SINGLE_FILE):
        may_lack = not needs_weights and is_there(path / MODEL_CONFIG_FILE)
        if may_lack and (repo_id is None or not has_file(repo_id, path.name, SINGLE_FILE)):
            return ModelDirectory(path, read_object(path / MODEL_CONFIG_FILE), ())
        if repo_id is None:
            raise CheckpointError(_what_is_there_instead(path, needs_weights=needs_weights))
    files = sorted(set(weight_map.values())) or [SINGLE_FILE]
    has_config = os.path.lexists(path / MODEL_CONFIG_FILE)  # a link that leads nowhere is no model without a config
    config = read_object(path / MODEL_CONFIG_FILE) if has_config else {}
    shards, places = _read_shards(path, files, repo_id), dict[str, list[str]]()
    for shard in shards:
        for entry in shard.entries:
            places.setdefault(entry.name, []).append(shard.path.name)
    problems = [f"{name} is in {' and in '.join(held)}" for name, held in places.items() if len(held) > 1]
    problems += [
        f"{file} lacks {name}, which the index says it holds"
        for name, file in weight_map.items()
        if file not in places.get(name, ())
    ]
    raise_collected(CheckpointError, problems, doing=f"read the checkpoint in {str(path)!r}")
    return ModelDirectory(path, config, shards, index)


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model, which need not be strict JSON."""
    try:
        content = read_json(path, is_lenient=True)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path} ({error}): get an undamaged copy") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged (not a JSON object): get an undamaged copy")
    return content


def _weight_map(path: Path, index: Mapping[str, Any]) -> dict[str, str]:
    files = index.get("weight_map")
    files = files if isinstance(files, dict) else {}
    if files and all(isinstance(file, str) and Path(file).name == file for file in files.values()):  # of the directory
        return files
    raise CheckpointError(
        f"{path / INDEX_FILE} is damaged: expected 'weight_map' with a file of the directory for each tensor"
    )


def _read_shards(path: Path, files: Iterable[str], repo_id: str | None) -> tuple[Shard, ...]:
    shards, problems = [], []
    for file in files:
        if is_there(path / file):
            try:
                shards.append(read_shard(path / file))
            except CheckpointError as error:
                problems.append(str(error))
        elif repo_id is None:
            problems.append(f"there is no {path / file}, which the index names: get a complete copy")
        else:
            shards.append(shard_of(path / file, *read_header(repo_id, path.name, file)))
    raise_collected(CheckpointError, problems, doing=f"read the checkpoint in {str(path)!r}")
    return tuple(shards)


def _what_is_there_instead(path: Path, *, needs_weights: bool) -> str:
    alone = "" if needs_weights else f", or {MODEL_CONFIG_FILE} alone"
    expected = f"expected a directory with {SINGLE_FILE} or {INDEX_FILE}{alone}"
    if not is_there(path):
        return f"no such directory: {path}"
    if not path.is_dir():
        if path.name in (SINGLE_FILE, *HEADS):
            return f"{path} is a file: give the directory {path.parent}"
        return f"{path} is not a directory: {expected}"
    if is_there(path / CONFIG_FILE):
        return f"{path} holds an adapter, not a model: {expected}"
    return (
        f"{path} holds no weights in safetensors files: {expected}; other formats, such as pickles, are not read: load "
        "the model with transformers and write it with save_pretrained"
    )


class Companions(NamedTuple):
    """The other files of a model's directory, by their paths in it; weights in other formats are ``left_out``."""

    carried: tuple[Path, ...]
    left_out: tuple[Path, ...]


def find_companions(directory: ModelDirectory) -> Companions:
    """Return the files of a model's directory that are not part of its checkpoint, hidden, or of an adapter.

    A pipe, a device, a broken link or a link to a file elsewhere raises a `CheckpointError`.
    """
    own = {shard.path for shard in directory.shards} | {directory.path / INDEX_FILE}
    root = Path(os.path.realpath(directory.path))
    blobs = [parent / "blobs" for parent in [*root.parents][:2]]  # to which the links in the Hub's cache lead
    carried, left_out, problems = list[Path](), list[Path](), list[str]()
    for path in _files(directory.path):
        if path in own or path.name.startswith("adapter_"):
            continue
        try:
            is_weights = path.name.endswith(WEIGHT_SUFFIXES) or require_regular(path).st_size > LARGEST_CARRIED
            # a directory from a stranger could point at secrets, which whoever publishes the output would publish
            found = Path(os.path.realpath(path))
            if not is_weights and root not in found.parents and found.parent not in blobs:
                raise CheckpointError(f"{path} is a link to {found}, outside of the directory")
        except (CheckpointError, OSError) as error:
            problems.append(f"{error}, which would be copied: put a file in its place, or remove it")
            continue
        (left_out if is_weights else carried).append(path.relative_to(directory.path))
    raise_collected(CheckpointError, problems, doing=f"copy the files of {str(directory.path)!r}")
    return Companions(tuple(carried), tuple(left_out))


def copy_companion(source: Path, destination: Path) -> None:
    """Copy one file."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with open_regular(source) as read, destination.open("wb") as written:
        shutil.copyfileobj(read, written)


def copy_config(source: Path, destination: Path, dtype: torch.dtype) -> None:
    """Copy ``config.json`` with a different dtype, also in the configs inside."""
    name = str(dtype).removeprefix("torch.")

    def changed(config: Any) -> Any:
        if not isinstance(config, dict):
            return config
        return {
            key: name if key in ("dtype", "torch_dtype") and value is not None else changed(value)
            for key, value in config.items()
        }

    write_json(destination, changed(read_object(source)))


def write_json(path: Path, content: object) -> None:
    """Write a JSON file as transformers does."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        is_adapter = folder != os.fspath(root) and CONFIG_FILE in names
        folders[:] = [] if is_adapter else sorted(name for name in folders if not name.startswith("."))
        if not is_adapter:
            yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))

"""`randlora.files.inspect`: what an adapter's files say of it, and how large the updates of its layers are."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from randlora.bases.spec import sliced_dims
from randlora.checkpoint.layout import BASIS_B, CONFIG_FILE, HEADER_KEY, TENSORS_FILE
from randlora.checkpoint.peft_config import NEUTRAL_FIELDS, kept_fields
from randlora.checkpoint.read import AdapterFile
from randlora.checkpoint.tensors_file import read_shard
from randlora.files.adapter import OpenAdapter, open_adapter
from randlora.files.low_rank import frobenius_norm, spectral_norm
from randlora.files.progress import Progress, no_progress
from randlora.files.summary import AdapterSummary, BasisSource, BasisSummary, LayerSummary

WITHOUT_SHAPES = "norms need the layers' shapes, which PEFT does not write: give the directory of the base model too"


def inspect(
    directory: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    norms: bool = True,
    progress: Progress = no_progress,
) -> AdapterSummary:
    """Say what an adapter on disk is: options, bases, layers, and the norms of their updates.

    Args:
        directory: What `randlora.save` or PEFT's ``save_pretrained`` wrote.
        base: The directory of its base model, for the layers' shapes, which a file of PEFT's does not say. Only headers
            of it are read.
        norms: Compute every layer's update, one after the other, and its norms.
        progress: Told of every layer.

    Raises:
        CheckpointError: When a file is damaged or foreign, the bases do not come out as they were, or the adapter does
            not fit the base.
    """
    adapter = open_adapter(Path(directory), None if base is None else Path(base))
    file = adapter.file
    layers = [_layer(adapter, fqn) for fqn in adapter.shapes or sorted(file.values, key=_by_number)]
    is_measured = norms and adapter.shapes is not None
    if is_measured:
        layers = [_measured(adapter, layer, progress, done, len(layers)) for done, layer in enumerate(layers)]
        progress(len(layers), len(layers), "done")
    writer, storage = _origin(adapter.directory, file)
    return AdapterSummary(
        directory=adapter.directory,
        writer=writer,
        storage=storage,
        base_model=file.fields.get("base_model_name_or_path"),
        config=file.config,
        bases=_bases(adapter),
        layers=tuple(layers),
        trained={fqn: tuple(tensor.shape) for fqn, tensor in file.trained.items()},
        trainable_parameters=sum(layer.trainable for layer in layers) + sum(t.numel() for t in file.trained.values()),
        nbytes=sum((adapter.directory / name).stat().st_size for name in (CONFIG_FILE, TENSORS_FILE)),
        unknown_fields=tuple(sorted(set(kept_fields(file.fields)) - set(NEUTRAL_FIELDS))),
        notes=() if adapter.shapes else (WITHOUT_SHAPES,),
    )


def _by_number(fqn: str) -> list[tuple[int, str]]:
    """Return a key that sorts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in fqn.split(".")]


def _layer(adapter: OpenAdapter, fqn: str) -> LayerSummary:
    lam, gamma = adapter.file.values[fqn]
    num_bases, min_dim = gamma.shape
    out_features, in_features = (None, None) if adapter.shapes is None else adapter.shapes[fqn]
    return LayerSummary(fqn, min_dim, num_bases, lam.numel() + gamma.numel(), out_features, in_features)


def _measured(adapter: OpenAdapter, layer: LayerSummary, progress: Progress, done: int, total: int) -> LayerSummary:
    progress(done, total, layer.fqn)
    update = adapter.delta_weight(layer.fqn)
    return replace(layer, frobenius=frobenius_norm(update), spectral=spectral_norm(update))


def _bases(adapter: OpenAdapter) -> BasisSummary | None:
    basis = adapter.basis
    if basis is None:
        return None
    used = basis.extent if adapter.shapes is None else sliced_dims(adapter.shapes.values())
    source: BasisSource = "seed" if basis.stored is None else "file"
    return BasisSummary(basis.spec, source, basis.digest(*used), basis.nbytes)


def _origin(directory: Path, file: AdapterFile) -> tuple[str, str]:
    """Say who wrote an adapter, and where its bases are."""
    shard = read_shard(directory / TENSORS_FILE)
    copies = sum(entry.name.endswith(BASIS_B) for entry in shard.entries)
    storage = "stored once in the file" if copies == 1 else f"stored {copies} times in the file"
    if copies == 0:
        storage = "drawn from the seed"
    if file.header is None:
        return f"PEFT {file.fields.get('peft_version') or 'of a version that it does not say'}", storage
    facts = json.loads(shard.metadata[HEADER_KEY])
    return f"randlora {facts['library_version']}, format {facts['format_version']}", storage

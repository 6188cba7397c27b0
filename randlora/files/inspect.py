"""`randlora.files.inspect`: an adapter's options, bases, layers, and the norms of its updates."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from randlora.bases.spec import sliced_dims
from randlora.checkpoint.format import CONFIG_FILE, FORMAT_VERSION, TENSORS_FILE
from randlora.checkpoint.peft_config import NEUTRAL_FIELDS, kept_fields
from randlora.files.adapter import OpenAdapter, open_adapter
from randlora.files.low_rank import frobenius_norm, spectral_norm
from randlora.files.progress import Progress, no_progress
from randlora.files.summary import AdapterSummary, BasisSource, BasisSummary, LayerSummary

WITHOUT_SHAPES = "norms need the layers' shapes, which PEFT does not store: give the directory of the base model too"


def inspect(
    directory: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    norms: bool = True,
    progress: Progress = no_progress,
) -> AdapterSummary:
    """Return what an adapter on disk is: options, bases, layers, and the norms of their updates.

    Args:
        directory: A directory that `randlora.save` or PEFT's ``save_pretrained`` wrote.
        base: The directory of its base model, for the layers' shapes, which PEFT does not store. Only headers are read.
        norms: Whether to compute every layer's update, one at a time, and its norms.
        progress: Called for every layer.

    Raises:
        CheckpointError: If a file is damaged or of another kind, the bases are not reproduced, or the adapter does not
            fit the base.
    """
    adapter = open_adapter(Path(directory), None if base is None else Path(base))
    file = adapter.file
    fqns = [*adapter.shapes] if adapter.shapes else sorted(file.values, key=_natural)
    layers = []
    for done, fqn in enumerate(fqns):
        progress(done, len(fqns), fqn)
        layers.append(_layer(adapter, fqn, norms=norms))
    progress(len(layers), len(layers), "done")
    header = file.header
    if header is None:
        writer = f"PEFT {file.fields.get('peft_version') or 'of an unknown version'}"
    else:
        writer = f"randlora {header.library_version}, format {FORMAT_VERSION}"
    times = {0: "drawn from the seed", 1: "stored once in the file"}
    return AdapterSummary(
        directory=adapter.directory,
        writer=writer,
        storage=times.get(file.basis_copies, f"stored {file.basis_copies} times in the file"),
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


def _natural(fqn: str) -> list[tuple[int, str]]:
    """Return a key that sorts layer 10 after layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in fqn.split(".")]


def _layer(adapter: OpenAdapter, fqn: str, *, norms: bool) -> LayerSummary:
    lam, gamma = adapter.file.values[fqn]
    num_bases, min_dim = gamma.shape
    layer = partial(LayerSummary, fqn, min_dim, num_bases, lam.numel() + gamma.numel())
    if adapter.shapes is None:
        return layer()
    if not norms:
        return layer(*adapter.shapes[fqn])
    update = adapter.delta_weight(fqn)
    return layer(*adapter.shapes[fqn], frobenius_norm(update), spectral_norm(update))


def _bases(adapter: OpenAdapter) -> BasisSummary | None:
    basis = adapter.basis
    if basis is None:
        return None
    used = basis.extent if adapter.shapes is None else sliced_dims(adapter.shapes.values())
    source: BasisSource = "seed" if basis.stored is None else "file"
    return BasisSummary(basis.spec, source, basis.digest(*used), basis.nbytes)

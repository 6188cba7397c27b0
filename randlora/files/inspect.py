"""`randlora.files.inspect`, `AdapterSummary`: an adapter's options, bases, layers, and the norms of its updates."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from randlora.bases.spec import BasisSpec
from randlora.checkpoint.bases import stream_notes
from randlora.checkpoint.peft_config import BASE_FIELD, CONFIG_FILE, NEUTRAL_FIELDS, kept_fields
from randlora.checkpoint.tensors import TENSORS_FILE
from randlora.config import RandLoRAConfig, Stream
from randlora.errors import spelled
from randlora.files.adapter import OpenAdapter, digests, open_adapter
from randlora.files.low_rank import frobenius_norm, spectral_norm
from randlora.hints import require_types
from randlora.layer_options import LayerOptions, described
from randlora.report import Progress, as_bytes, as_lines, no_progress, table

DIGEST_SHOWN = 12


@dataclass(frozen=True)
class BasisSummary:
    """The bases of an adapter, or of its layers of one r.

    Attributes:
        spec: Kind, stream, seed, rank, dims and blocks.
        source: ``"seed"`` if the spec reproduces them, ``"file"`` if only the file holds them.
        digest: SHA-256 of the values that the layers use; see `randlora.bases.basis.Basis.digest`.
        nbytes: Their size in memory, in bytes.
    """

    spec: BasisSpec
    source: Literal["seed", "file"]
    digest: str
    nbytes: int


@dataclass(frozen=True)
class LayerSummary:
    """One adapted layer.

    Attributes:
        fqn: Its FQN.
        r: Rank of one random basis.
        alpha: The update is scaled by ``alpha / r``.
        min_dim: Its smaller dim.
        num_bases: Number of bases.
        trainable: Number of entries of its Λ and Γ.
        out_features: Output width; ``None`` if not known, because PEFT does not store it.
        in_features: Input width, likewise.
        frobenius: Frobenius norm of its update ΔW; ``None`` if it was not computed.
        spectral: The largest singular value of ΔW, likewise; of a stack, the largest of its matrices'. If both dims
            are above 1024, a lower bound within a few percent.
        matrices: Number of matrices of a stack, each with these dims and ``num_bases``.
    """

    fqn: str
    r: int
    alpha: float
    min_dim: int
    num_bases: int
    trainable: int
    out_features: int | None = None
    in_features: int | None = None
    frobenius: float | None = None
    spectral: float | None = None
    matrices: int = 1

    @property
    def stable_rank(self) -> float | None:
        """``(frobenius / spectral)²``, about the number of significant directions of the update; 0 if it is zero."""
        if self.frobenius is None or self.spectral is None:
            return None
        return (self.frobenius / self.spectral) ** 2 if self.spectral else 0.0


@dataclass(frozen=True)
class AdapterSummary:
    """An adapter on disk; prints as a table.

    Attributes:
        directory: Its directory.
        writer: The library that wrote it, with versions.
        storage: A description of where its bases are.
        base_model: The name of its base model, if stored.
        config: Its options, with r and alpha by FQN where layers differ in them.
        bases: Its bases, one entry for each r; none if the file does not hold them and the layers' shapes are not
            known.
        layers: Its layers.
        trained: Shapes of the parameters trained with it, and of buffers, by FQN.
        trainable_parameters: Number of entries of Λ, Γ and those parameters.
        nbytes: Size of its files in bytes.
        unknown_fields: Fields of its JSON that are kept but not understood.
        notes: Other notes for the user.
    """

    directory: Path
    writer: str
    storage: str
    base_model: str | None
    config: RandLoRAConfig
    bases: tuple[BasisSummary, ...]
    layers: tuple[LayerSummary, ...]
    trained: dict[str, tuple[int, ...]]
    trainable_parameters: int
    nbytes: int
    unknown_fields: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return facts, a table of layers, and totals."""
        return as_lines([*self._facts(), *self._layers(), *self._totals(), *self.notes])

    def _facts(self) -> Iterator[str]:
        yield f"RandLoRA adapter in {self.directory}, {as_bytes(self.nbytes)}, written by {self.writer}"
        yield f"base model: {self.base_model or 'not stored'}"
        options = described({layer.fqn: LayerOptions(layer.r, layer.alpha) for layer in self.layers})
        yield f"r={options['r']}, alpha={options['alpha']}, dropout={self.config.dropout:g}"
        if not self.bases:
            yield f"bases: {self.config.basis}, seed={self.config.seed}; {self.storage}"
        for bases in self.bases:
            yield f"{bases.spec}; {self.storage}"
            yield f"SHA-256 of the bases {bases.digest[:DIGEST_SHOWN]}…, {as_bytes(bases.nbytes)} in memory"

    def _layers(self) -> list[str]:
        options = {name: [f"{getattr(layer, name):g}" for layer in self.layers] for name in LayerOptions._fields}
        mixed = {name: values for name, values in options.items() if len({*values}) > 1}
        has_stacks = any(layer.matrices > 1 for layer in self.layers)
        sizes = ("matrices", "in", "out") if has_stacks else ("in", "out")
        headings = ("layer", *sizes, *mixed, "num_bases", "trainable", "‖ΔW‖F", "‖ΔW‖2", "stable rank")
        rows = [
            (
                layer.fqn,
                *([layer.matrices] if has_stacks else []),
                "?" if layer.in_features is None else layer.in_features,
                "?" if layer.out_features is None else layer.out_features,
                *(values[index] for values in mixed.values()),
                layer.num_bases,
                layer.trainable,
                *(
                    "-" if norm is None else f"{norm:.3g}"
                    for norm in (layer.frobenius, layer.spectral, layer.stable_rank)
                ),
            )
            for index, layer in enumerate(self.layers)
        ]
        return table(headings, rows)

    def _totals(self) -> Iterator[str]:
        yield f"{len(self.layers)} layers, {self.trainable_parameters:,} trained parameters"
        for fqn, shape in self.trained.items():
            yield f"trained with it: {fqn} {'x'.join(map(str, shape)) or 'scalar'}"
        if self.unknown_fields:
            yield f"fields of the JSON that are not understood: {', '.join(self.unknown_fields)}"


def _without_shapes() -> str:
    base = spelled("base")
    return f"norms need the layers' shapes, which PEFT does not store: give {base}, the directory of its base model"


def inspect(
    directory: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    base_revision: str | None = None,
    prefix: str | None = None,
    stream: Stream | None = None,
    norms: bool = True,
    progress: Progress = no_progress,
) -> AdapterSummary:
    """Return what an adapter on disk is: options, bases, layers, and the norms of their updates.

    Args:
        directory: A directory that `randlora.save` or PEFT's ``save_pretrained`` wrote, or a repository on the Hub.
        base: Its base model, a directory or a repository on the Hub, for the layers' shapes, which PEFT does not store.
            Only headers are read.
        revision: Branch, tag or commit of the adapter's repository.
        base_revision: Branch, tag or commit of the base model's repository.
        prefix: The prefix by which the names in the adapter and in the base model differ, as in `randlora.load`.
        stream: The stream of the bases, as in `randlora.load`.
        norms: Whether to compute every layer's update, one at a time, and its norms.
        progress: Called for every layer.

    Raises:
        ConfigError: If ``prefix`` is not a name, or is given without ``base``, or ``stream`` is not a stream.
        CheckpointError: If a file is damaged or of another kind, the bases are not reproduced, or the adapter does not
            fit the base.
    """
    require_types(inspect, locals())
    adapter = open_adapter(directory, base, prefix, stream, revision, base_revision)
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
        writer = f"randlora {header.library_version}, format {header.format_version}"
    times = {0: "drawn from the seed", 1: "stored once in the file"}
    return AdapterSummary(
        directory=Path(directory),
        writer=writer,
        storage=times.get(file.basis_copies, f"stored {file.basis_copies} times in the file"),
        base_model=file.fields.get(BASE_FIELD),
        config=file.config,
        bases=tuple(
            BasisSummary(basis.spec, "seed" if basis.stored is None else "file", digest, basis.nbytes)
            for basis, digest in digests(file, adapter.shapes, adapter.bases)
        ),
        layers=tuple(layers),
        trained={fqn: tuple(tensor.shape) for fqn, tensor in file.trained.items()},
        trainable_parameters=sum(layer.trainable for layer in layers)
        + sum(each.numel() for fqn, each in file.trained.items() if fqn not in file.buffers),
        nbytes=sum(_size(adapter.directory / name) for name in (CONFIG_FILE, TENSORS_FILE)),
        unknown_fields=tuple(sorted(set(kept_fields(file.fields)) - set(NEUTRAL_FIELDS))),
        notes=(*file.doubts, *stream_notes(file), *(() if adapter.shapes else (_without_shapes(),))),
    )


def _size(path: Path) -> int:
    """Return the size of a file in bytes; the JSON may be missing, or withdrawn by another process."""
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _natural(fqn: str) -> list[tuple[int, str]]:
    """Return a key that sorts layer 10 after layer 9, however long a number is."""
    parts = ((part.lstrip("0"), part) for part in fqn.split("."))
    return [(len(digits), digits) if part.isdecimal() else (-1, part) for digits, part in parts]


def _layer(adapter: OpenAdapter, fqn: str, *, norms: bool) -> LayerSummary:
    lam, gamma = adapter.file.values[fqn]
    *stack, num_bases, min_dim = gamma.shape
    layer = partial(
        LayerSummary,
        fqn,
        *adapter.file.options[fqn],
        min_dim,
        num_bases,
        lam.numel() + gamma.numel(),
        matrices=stack[0] if stack else 1,
    )
    if adapter.shapes is None:
        return layer()
    *_, out_features, in_features = adapter.shapes[fqn]
    if not norms:
        return layer(out_features, in_features)
    found = [(frobenius_norm(update), spectral_norm(update)) for update in adapter.delta_weights(fqn)]
    frobenius, spectral = zip(*found, strict=True)
    return layer(out_features, in_features, math.hypot(*frobenius), max(spectral))

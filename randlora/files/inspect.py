"""`randlora.files.inspect` and `verify`: what an adapter on disk is, and whether it is sound and fits a base model."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from randlora.bases.spec import BasisSpec
from randlora.checkpoint.bases import Known, stream_notes
from randlora.checkpoint.peft_layout import BASE_FIELD, CONFIG_FILE, NEUTRAL_FIELDS, TENSORS_FILE, kept_fields
from randlora.checkpoint.read import AdapterFile, locate, read_adapter
from randlora.config import LayerOptions, RandLoRAConfig, Stream, described
from randlora.disk.formats import is_there
from randlora.errors import CheckpointError, spelled
from randlora.files.adapter import (
    OpenAdapter,
    adapter_bases,
    fit_base,
    known_shapes,
    open_adapter,
    read_base,
    require_base_for,
    shapes_in,
)
from randlora.files.layouts import frobenius_norm, spectral_norm
from randlora.files.model_directory import Progress, find_model, no_progress
from randlora.hints import require_types
from randlora.report import as_bytes, as_lines, table

DIGEST_SHOWN = 12


@dataclass(frozen=True)
class BasisSummary:
    """The bases of the layers of one r.

    Attributes:
        spec: Kind, stream, seed, rank, dims and blocks.
        source: ``"seed"`` if the spec reproduces them, ``"file"`` if only the file contains them.
        digest: SHA-256 of the values that the layers use.
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
        out_features: Output width; like ``in_features``, ``None`` in a file of PEFT without its base.
        in_features: Input width.
        frobenius: Frobenius norm of its update ΔW; like ``spectral``, ``None`` if it was not computed.
        spectral: Its largest singular value; a lower bound within a few percent if both dims are above 1024.
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
        config: Its options, with r and alpha by FQN if they differ between layers.
        bases: Its bases, one entry for each r; none if neither they nor the layers' shapes are known.
        layers: Its layers.
        trained: Shapes of the parameters trained with it, and of buffers, by FQN.
        trainable_parameters: Number of entries of Λ, of Γ unless Λ alone was trained, and of those parameters.
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
        options = described({layer.fqn: LayerOptions(layer.r, layer.alpha) for layer in self.layers})
        alone = ", Λ alone trained" * (self.config.train == "lambda")
        lines = [
            f"RandLoRA adapter in {self.directory}, {as_bytes(self.nbytes)}, written by {self.writer}",
            f"base model: {self.base_model or 'not stored'}",
            f"r={options['r']}, alpha={options['alpha']}, dropout={self.config.dropout:g}{alone}",
        ]
        if not self.bases:
            lines.append(f"bases: {self.config.basis}, seed={self.config.seed}; {self.storage}")
        for bases in self.bases:
            lines.append(f"{bases.spec}; {self.storage}")
            lines.append(f"SHA-256 of the bases {bases.digest[:DIGEST_SHOWN]}…, {as_bytes(bases.nbytes)} in memory")
        lines += self._layers()
        lines.append(f"{len(self.layers)} layers, {self.trainable_parameters:,} trained parameters")
        for fqn, shape in self.trained.items():
            lines.append(f"trained with it: {fqn} {'x'.join(map(str, shape)) or 'scalar'}")
        if self.unknown_fields:
            lines.append(f"fields of the JSON that are not understood: {', '.join(self.unknown_fields)}")
        return as_lines([*lines, *self.notes])

    def _layers(self) -> list[str]:
        layers = self.layers
        matrices = {"matrices": [layer.matrices for layer in layers]}
        options = {name: [f"{getattr(layer, name):g}" for layer in layers] for name in LayerOptions._fields}
        columns = {
            "layer": [layer.fqn for layer in layers],
            **(matrices if any(layer.matrices > 1 for layer in layers) else {}),
            "in": ["?" if layer.in_features is None else layer.in_features for layer in layers],
            "out": ["?" if layer.out_features is None else layer.out_features for layer in layers],
            **{name: values for name, values in options.items() if len({*values}) > 1},
            "num_bases": [layer.num_bases for layer in layers],
            "trainable": [layer.trainable for layer in layers],
            "‖ΔW‖F": [_short(layer.frobenius) for layer in layers],
            "‖ΔW‖2": [_short(layer.spectral) for layer in layers],
            "stable rank": [_short(layer.stable_rank) for layer in layers],
        }
        return table(tuple(columns), [*zip(*columns.values(), strict=True)])


def _short(norm: float | None) -> str:
    return "-" if norm is None else f"{norm:.3g}"


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
    """Return a summary of an adapter on disk: options, bases, layers, and the norms of their updates.

    Args:
        directory: A directory that `randlora.save` or PEFT's ``save_pretrained`` wrote, or a repository on the Hub.
        base: Its base model, a directory or a repository on the Hub, which has the shapes that PEFT does not store.
        revision: Branch, tag or commit of the adapter's repository.
        base_revision: Branch, tag or commit of the base model's repository.
        prefix: The prefix by which the names in the adapter and in the base model differ, as in `randlora.load`.
        stream: The stream of the bases, as in `randlora.load`.
        norms: Whether to compute every layer's update, one at a time, and its norms.
        progress: Called for every layer.

    Returns:
        The summary, which prints as a table.

    Raises:
        CheckpointError: If a file is damaged, the bases are not reproduced, or the adapter does not fit the base.
    """
    require_types(inspect, locals())
    adapter = open_adapter(directory, base, prefix, stream, revision, base_revision)
    file = adapter.file
    fqns = [*adapter.shapes] if adapter.shapes else sorted(file.values, key=_natural)
    layers: list[LayerSummary] = []
    for done, fqn in enumerate(fqns):
        progress(done, len(fqns), fqn)
        layers.append(_layer(adapter, fqn, norms=norms))
    progress(len(layers), len(layers), "done")
    if file.header is None:
        writer = f"PEFT {file.fields.get('peft_version') or 'of an unknown version'}"
    else:
        writer = f"randlora {file.header.library_version}, format {file.header.format_version}"
    notes = [*file.doubts, *stream_notes(file)]
    if adapter.shapes is None:
        base = spelled("base")
        notes.append(f"norms need shapes, which PEFT does not store: give {base}, the directory of its base model")
    paths = [adapter.directory / name for name in (CONFIG_FILE, TENSORS_FILE)]
    return AdapterSummary(
        directory=Path(directory),
        writer=writer,
        storage="stored in the file" if file.bases else "drawn from the seed",
        base_model=file.fields.get(BASE_FIELD),
        config=file.config,
        bases=tuple(
            BasisSummary(basis.spec, "seed" if basis.stored is None else "file", digest, basis.nbytes)
            for basis, digest in adapter.digests()
        ),
        layers=tuple(layers),
        trained={fqn: tuple(tensor.shape) for fqn, tensor in file.trained.items()},
        trainable_parameters=sum(layer.trainable for layer in layers)
        + sum(tensor.numel() for fqn, tensor in file.trained.items() if fqn not in file.buffers),
        nbytes=sum(path.stat().st_size for path in paths if is_there(path)),  # the JSON may be missing
        unknown_fields=tuple(sorted(set(kept_fields(file.fields)) - set(NEUTRAL_FIELDS))),
        notes=tuple(notes),
    )


def _natural(fqn: str) -> list[str]:
    """Return a key that sorts layer 10 after layer 9."""
    return [part.zfill(20) if part.isdecimal() else part for part in fqn.split(".")]


def _layer(adapter: OpenAdapter, fqn: str, *, norms: bool) -> LayerSummary:
    (lam, gamma), options = adapter.file.values[fqn], adapter.file.options[fqn]
    *stack, num_bases, min_dim = gamma.shape
    out_features, in_features = (None, None) if adapter.shapes is None else adapter.shapes[fqn][-2:]
    frobenius, spectral = None, None
    if norms and adapter.shapes is not None:
        found = [(frobenius_norm(update), spectral_norm(update)) for update in adapter.delta_weights(fqn)]
        frobenius, spectral = math.hypot(*(norm for norm, _ in found)), max(norm for _, norm in found)
    return LayerSummary(
        fqn=fqn,
        r=options.r,
        alpha=options.alpha,
        min_dim=min_dim,
        num_bases=num_bases,
        trainable=lam.numel() + (gamma.numel() if adapter.file.config.train == "both" else 0),
        out_features=out_features,
        in_features=in_features,
        frobenius=frobenius,
        spectral=spectral,
        matrices=stack[0] if stack else 1,
    )


Outcome = Literal["passed", "failed", "not checked"]


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: ``files``, ``checksum``, ``base`` or ``bases``.
        outcome: ``"passed"``, ``"failed"``, or ``"not checked"`` if the files have nothing to compare with.
        words: The finding.
    """

    name: str
    outcome: Outcome
    words: str

    def __str__(self) -> str:
        """Return one line, or several if there are several reasons."""
        first, *others = self.words.split("\n")
        indented = (line if line.startswith("  ") else f"  {line}" for line in others)  # only a check begins a line
        return "\n".join([f"{self.outcome}: {self.name}: {first}", *indented])


@dataclass(frozen=True)
class Verification:
    """The report of `randlora.files.verify`.

    Attributes:
        directory: The adapter.
        checks: The checks, in order. If the files cannot be read, the others are missing.
    """

    directory: Path
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.outcome != "failed" for check in self.checks)

    def __str__(self) -> str:
        """Return the checks and the verdict."""
        verdict = "sound" if self.passed else "NOT sound"
        return "\n".join([*map(str, self.checks), f"{self.directory} is {verdict}"])


def verify(
    directory: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    base_revision: str | None = None,
    prefix: str | None = None,
    stream: Stream | None = None,
    progress: Progress = no_progress,
) -> Verification:
    """Check an adapter's files: contents, checksum, bases, and whether they fit a base model.

    Args:
        directory: A directory that `randlora.save` or PEFT's ``save_pretrained`` wrote, or a repository on the Hub.
        base: Its base model, a directory or a repository on the Hub, of which only headers are read.
        revision: Branch, tag or commit of the adapter's repository.
        base_revision: Branch, tag or commit of the base model's repository.
        prefix: The prefix by which the names in the adapter and in the model differ, as in `randlora.load`.
        stream: The expected stream of the bases, as in `randlora.load`. A different stream is a failed check.
        progress: Called for every step.

    Returns:
        All checks. A damaged file is a failed check, not an exception.

    Raises:
        CheckpointError: If there is no such adapter, or no such base model.
    """
    require_types(verify, locals())
    require_base_for(base, prefix=prefix, base_revision=base_revision)
    found = locate(directory, revision)
    model = None if base is None else find_model(base, base_revision)
    if missing := [place for place in (found, *(model or ())[:1]) if not is_there(place)]:
        raise CheckpointError(f"no such directory: {missing[0]}")
    directory = Path(directory)
    progress(0, 3, "reading the files")
    try:
        file = read_adapter(found, stream)
        shapes = known_shapes(file)
    except CheckpointError as error:
        return Verification(directory, (Check("files", "failed", str(error)),))
    checks = [_files(file)]
    if file.header is None:
        checks.append(Check("checksum", "not checked", "PEFT wrote the file, and does not store one"))
    else:
        checks.append(Check("checksum", "passed", "the SHA-256 over header and tensors is the recorded one"))
    known: Known | None = None
    progress(1, 3, "checking the base model")
    if model is not None:
        try:
            base_model = read_base(*model)
            fit, known = fit_base(base_model, file, prefix), base_model.all_shapes
        except CheckpointError as error:
            checks.append(Check("base", "failed", str(error)))
        else:
            shapes = shapes_in(fit.weights_of(file))
            words = f"{base} has all {len(shapes)} layers, in the shapes of the adapter"
            checks.append(Check("base", "passed", words))
    progress(2, 3, "drawing the bases")
    try:
        file, bases = adapter_bases(file, shapes, known)
    except CheckpointError as error:
        checks.append(Check("bases", "failed", str(error)))
    else:
        checks += _bases(OpenAdapter(found, file, shapes, bases))
    progress(3, 3, "done")
    return Verification(directory, tuple(checks))


def _files(file: AdapterFile) -> Check:
    if file.doubts:
        return Check("files", "failed", "; ".join(file.doubts))
    count = len(file.trained)
    others = f" and {count} tensor{'s' * (count > 1)} trained with them" if count else ""
    values = f"Λ and Γ of {len(file.values)} layers{others}: names, dtypes and shapes fit"
    return Check("files", "passed", f"{values} r={described(file.options)['r']}, all values are finite")


def _bases(adapter: OpenAdapter) -> list[Check]:
    file = adapter.file
    if not adapter.bases:
        base = spelled("base")
        reason = f"PEFT stored neither the bases nor the layers' shapes: give {base}, the directory of its base model"
        return [Check("bases", "not checked", reason)]
    checks = []
    for basis, digest in adapter.digests():
        is_drawn = basis.stored is None
        outcome: Outcome = "passed"
        if file.header is not None:
            words = "drawn again, as recorded" if is_drawn else "in the file, as recorded"
        elif not file.bases:
            doubts = "".join(f"; {note}" for note in stream_notes(file))
            outcome = "not checked"
            words = f"drawn from the key; PEFT stored nothing to compare them with{doubts}"
        elif is_drawn:
            words = "drawn again, as stored in the file"
        else:
            words = "in the file; its key gives different ones here, so those in the file are used"
        checks.append(Check("bases", outcome, f"{basis.spec}, SHA-256 {digest[:DIGEST_SHOWN]}…: {words}"))
    return checks

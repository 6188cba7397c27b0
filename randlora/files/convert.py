"""`randlora.files.convert` and `join`: an adapter for this library, for PEFT, or as a LoRA."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.bases.basis import Basis
from randlora.bases.spec import BasisSpec, count_bases
from randlora.checkpoint.bases import require_drawable, stored_bases, stream_notes
from randlora.checkpoint.header import Header, facts_of, seal_of
from randlora.checkpoint.peft_layout import (
    BASE_FIELD,
    TENSORS_FILE,
    UNREAD_FIELDS,
    basis_keys,
    option_fields,
    peft_obstacle,
    trained_key,
    value_keys,
)
from randlora.checkpoint.read import AdapterFile
from randlora.checkpoint.save import CARD_FILE, files_of, is_generated
from randlora.config import Stream
from randlora.disk.formats import METADATA, Planned, write_tensor_file
from randlora.disk.replace import Files, flush, write_files
from randlora.errors import CheckpointError, ConfigError, named, raise_collected, spelled, typed
from randlora.files.adapter import OpenAdapter, open_adapter, out_problems
from randlora.files.layouts import (
    WEIGHTS,
    Component,
    Format,
    Layout,
    LoraLayer,
    diffusers_files,
    layout_problems,
    low_rank,
    peft_files,
    recognized,
)
from randlora.files.model_directory import Progress, no_progress
from randlora.hints import require_types
from randlora.report import as_bytes, as_lines, table
from randlora.targets.match import shortened
from randlora.targets.options import options_by_target


@dataclass(frozen=True)
class ConversionReport:
    """The report of `randlora.files.convert`; prints with the errors of a LoRA.

    Attributes:
        source: The directory of the adapter.
        out: The directory written.
        to: The format.
        nbytes: Size of the files written, in bytes.
        layers: For a LoRA, how each layer was converted; the other formats are exact.
        notes: Other notes for the user.
    """

    source: Path
    out: Path
    to: Format
    nbytes: int
    layers: tuple[LoraLayer, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def relative_error(self) -> float:
        """The error of all layers together: ``sqrt(Σ ‖ΔW - LoRA‖² / Σ ‖ΔW‖²)``; 0 for exact formats."""
        whole = sum(layer.norm**2 for layer in self.layers)
        lost = sum((layer.relative_error * layer.norm) ** 2 for layer in self.layers)
        return float((lost / whole) ** 0.5) if whole else 0.0

    def __str__(self) -> str:
        """Return a table of layers for a LoRA, and what was written."""
        rows = [
            (layer.fqn, layer.in_features, layer.out_features, layer.rank, f"{layer.relative_error:.3g}")
            for layer in self.layers
        ]
        lines = table(("layer", "in", "out", "rank", "relative error"), rows) if rows else []
        if rows:
            lines.append(f"relative error of all layers together {self.relative_error:.3g}")
        return as_lines([*lines, f"wrote {self.out} ({self.to}), {as_bytes(self.nbytes)}", *self.notes])


def convert(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: Format = "peft",
    *,
    format: Layout | None = None,  # noqa: A002 - what the files are called
    rank: int | None = None,
    tolerance: float | None = None,
    same_rank: bool = False,
    component: Component | None = None,
    base: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
    prefix: str | None = None,
    stream: Stream | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> ConversionReport:
    """Convert an adapter to a different format, and write it to a new directory.

    ``"peft"`` can be loaded by PEFT 0.21.2: the file contains the bases if PEFT would draw different ones. ``"native"``
    has this library's header with its checksums, and contains the bases only if no seed reproduces them. ``"lora"`` is
    for servers that support only LoRA: a low-rank approximation of every layer's update.

    Args:
        directory: A directory that `randlora.save` or PEFT's ``save_pretrained`` wrote, or a repository on the Hub.
        out: The directory to write to, different from ``directory``.
        to: The format.
        format: For ``"lora"``, whose files to write: ``"peft"``, the default, which vLLM, SGLang and llama.cpp's
            converter read too, or ``"diffusers"``.
        rank: For ``"lora"``, the rank of every layer; ``None`` means each layer's smallest rank within the tolerance.
        tolerance: For ``"lora"``, the largest accepted relative error of a layer's update, in the Frobenius norm;
            ``None`` means 0.05. 1 accepts anything.
        same_rank: For ``"lora"``, whether to pad all factors with zeros to the highest rank, as diffusers, SGLang and
            llama.cpp need it.
        component: For diffusers, which of a pipeline's models the adapter is for. ``None`` recognizes the model by the
            names of layers.
        base: The base model, a directory or a repository on the Hub, whose headers give the layers' shapes. Files of
            PEFT, which does not store them, need it for ``"native"`` and ``"lora"``.
        revision: Branch, tag or commit of the adapter's repository.
        base_revision: Branch, tag or commit of the base model's repository.
        prefix: The prefix by which the names in the adapter, which keeps its names, and in the base model differ.
        stream: The stream of the bases, as in `randlora.load`. A ``"native"`` file records it.
        overwrite: Whether to replace an adapter in ``out``.
        progress: Called for every layer.

    Returns:
        A report, with the error of every layer.

    Raises:
        ConfigError: For invalid options, or if the error of a LoRA exceeds the tolerance.
        CheckpointError: If the adapter cannot be read or does not fit the base, or ``out`` is not empty.
        OSError: If the disk refuses.
    """
    require_types(convert, locals())
    source, target = Path(directory), Path(out)
    problems, lora = [], spelled("to", "lora")
    if to != "lora" and (rank is not None or tolerance is not None):
        problems.append(f"{spelled('rank')} and {spelled('tolerance')} are for {lora}: {typed(to)} is exact")
    if to != "lora" and (format is not None or same_rank):
        problems.append(f"{spelled('format')} and {spelled('same_rank')} are for {lora}, not {typed(to)}")
    if component is not None and format != "diffusers":
        problems.append(f"{spelled('component')} is for {lora} with {spelled('format', 'diffusers')}")
    if rank is not None and rank <= 0:
        problems.append(f"{named('rank')} must be a positive integer, got {rank}")
    if tolerance is not None and not 0 <= tolerance <= 1:
        problems.append(f"{named('tolerance')} must be a number in [0, 1], got {typed(tolerance)}")
    raise_collected(ConfigError, problems, doing="convert")
    inputs = [source, *([] if base is None else [base])]
    raise_collected(CheckpointError, out_problems(target, inputs, overwrite=overwrite), doing="convert")
    layout = format or "peft"
    if beside := [name for other, name in WEIGHTS.items() if other != layout and (target / name).exists()]:
        raise CheckpointError(f"{target} holds {beside[0]}, of a different format: choose a different directory")
    adapter = open_adapter(directory, base, prefix, stream, revision, base_revision)
    assumed = (*adapter.file.doubts, *stream_notes(adapter.file))
    if to in ("peft", "native"):
        fields, tensors, header, notes = contents_as(to, adapter)
        nbytes = _written(adapter_files(target, fields, tensors, header))
        return ConversionReport(source, target, to, nbytes, (), (*assumed, *notes))
    raise_collected(ConfigError, layout_problems(adapter, layout), doing="convert to a LoRA")
    loras = low_rank(adapter, rank, tolerance, progress)
    if layout == "diffusers":
        planned, more = diffusers_files(target, loras, component or recognized(adapter.require_shapes()))
    else:
        planned, more = peft_files(target, adapter, loras, same_rank=same_rank)
    nbytes = _written(planned)
    return ConversionReport(source, target, to, nbytes, tuple(lora.layer for lora in loras), (*assumed, *more))


def tensors_of(file: AdapterFile) -> dict[str, Tensor]:
    """Return Λ, Γ and the parameters trained with an adapter, by key, in the dtypes of the file."""
    tensors = dict[str, Tensor]()
    for fqn, pair in file.values.items():
        tensors |= zip(value_keys(fqn, file.values), pair, strict=True)
    return tensors | {trained_key(fqn, file.values): tensor for fqn, tensor in file.trained.items()}


def adapter_files(
    directory: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], header: Header | None
) -> Files:
    """Return an adapter's files, to be written. Tensors must be contiguous and on the CPU."""
    planned = [Planned.whole(*item) for item in tensors.items()]
    metadata = METADATA if header is None else seal_of(facts_of(header), tensors).metadata
    write = partial(write_tensor_file, tensors=planned, metadata=metadata)
    return files_of(directory, {TENSORS_FILE: write}, fields, has_header=header is not None)


def _written(files: Files) -> int:
    """Write an adapter's files, and return their size. A card that `randlora.save` made for the one before goes."""
    (nbytes,) = write_files(files)
    with suppress(OSError):  # the new adapter is whole by now, and no program reads a card
        if is_generated(card := files.directory / CARD_FILE):
            card.unlink()
            flush(files.directory)
    return nbytes


def contents_as(
    to: Format, adapter: OpenAdapter
) -> tuple[dict[str, Any], dict[str, Tensor], Header | None, tuple[str, ...]]:
    """Return the fields of the JSON, the tensors, our header, and notes."""
    file = adapter.file
    tensors = tensors_of(file)
    # without shapes, which only "peft" can do without, all stays as PEFT wrote it, and a stream given would be lost
    if to == "peft" and adapter.shapes is None and (file.stream is None or file.bases):
        for r, pair in file.bases.items():
            tensors |= zip(basis_keys(r, file.bases.keys()), pair, strict=True)
        return dict(file.fields), tensors, None, ()
    shapes = adapter.require_shapes()
    if to == "peft" and (reason := peft_obstacle(file.options, adapter.kinds, file.rows)) is not None:
        raise CheckpointError(f"cannot convert to 'peft': {reason}; this library loads the adapter as it is")
    model_class = None if file.header is None else file.header.model_class
    header = Header.of(
        file.config,
        file.options,
        adapter.bases,
        shapes,
        file.trained,
        transposed=adapter.transposed,
        kinds=adapter.kinds,
        model_class=model_class,
        buffers=file.buffers,
    )
    specs = {r: basis.spec for r, basis in adapter.bases.items()}
    is_peft_draw = all(
        spec.stream == "torch" and (spec.max_dim, spec.min_dim) == header.rectangles[r] for r, spec in specs.items()
    )
    is_stored = not header.is_reproducible or (to == "peft" and not is_peft_draw)
    notes: tuple[str, ...] = ()
    if to == "peft":  # which has bases as wide as the widest layer and as high as the highest
        require_drawable([(spec, header.rectangles[r]) for r, spec in specs.items()], file, adapter.known)
    if is_stored:
        stored = {planned.name: planned.read() for planned in stored_bases(adapter.bases, header)}
        tensors |= _filled_up(stored, header) if to == "peft" else stored
        reason = "PEFT would draw different ones from the seed" if to == "peft" else "no seed reproduces them"
        notes = (f"the bases are in the file: {reason}",)
    kept = {name: value for name, value in file.fields.items() if name not in UNREAD_FIELDS}
    kept["target_modules"] = kept.get("target_modules") or "|".join(map(re.escape, shapes))
    (stream,) = {spec.stream for spec in specs.values()}
    own = option_fields(file.config, header.options, stream, stored=is_stored)  # whose order decides between equals
    return dict(sorted({**kept, **own}.items())), tensors, header, notes


def _filled_up(stored: Mapping[str, Tensor], header: Header) -> dict[str, Tensor]:
    """Return bases padded to the dims that PEFT expects with zeros, which no layer uses."""
    wide = {}
    for r, (max_dim, min_dim) in header.rectangles.items():
        key_A, key_B = basis_keys(r, header.bases.keys())
        basis_A, basis_B, num_bases = stored[key_A], stored[key_B], count_bases(min_dim, r)
        wide[key_A] = F.pad(basis_A, (0, min_dim - basis_A.shape[-1])).contiguous()
        padding = (0, 0, 0, num_bases - basis_B.shape[1], 0, max_dim - len(basis_B))
        wide[key_B] = F.pad(basis_B, padding).contiguous()
    return wide


OF_LAYERS = ("targets", "exclude", "train_also", "train_rows", "r", "alpha")
"""The options that may differ between parts; all others must be equal."""


@dataclass(frozen=True)
class JoinReport:
    """The report of `randlora.files.join`.

    Attributes:
        out: The directory written.
        parts: The directories joined.
        layers: How many layers the adapter has.
        nbytes: Size of the files written, in bytes.
    """

    out: Path
    parts: tuple[Path, ...]
    layers: int
    nbytes: int

    def __str__(self) -> str:
        """Return one line."""
        return f"wrote {self.out}, {self.layers} layers of {len(self.parts)} parts, {as_bytes(self.nbytes)}"


def join(
    parts: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, overwrite: bool = False
) -> JoinReport:
    """Join the adapters of a pipeline's stages into one adapter, and write it to a new directory.

    The parts have the same options and different layers, with their names from the whole model. The bases of each part
    must be a part of the bases that one process would have drawn for all layers, as with ``stream="portable"``. The
    files are the same as `randlora.save` writes for the whole model, without a model card.

    Args:
        parts: Directories that `randlora.save` wrote, in the order of the layers, or repositories on the Hub.
        out: The directory to write to, different from the parts.
        overwrite: Whether to replace an adapter in ``out``.

    Raises:
        CheckpointError: If a part cannot be read or was written by PEFT, parts share a layer or differ in options or
            bases, no seed reproduces their bases, or ``out`` is not empty.
        OSError: If the disk refuses.
    """
    require_types(join, locals())
    target, opened = Path(out), [open_adapter(part) for part in parts]
    directories = tuple(part.directory for part in opened)
    problems = [*_part_problems(opened), *out_problems(target, directories, overwrite=overwrite)]
    raise_collected(CheckpointError, problems, doing="join")
    whole = _joined(opened)
    fields, tensors, header, _ = contents_as("native", whole)
    nbytes = _written(adapter_files(target, fields, tensors, header))
    return JoinReport(target, directories, len(whole.file.values), nbytes)


def _part_problems(parts: Sequence[OpenAdapter]) -> list[str]:
    if len(parts) < 2:
        return [f"expected two or more parts, got {len(parts)}"]
    if problems := [
        f"{part.directory} was written by PEFT: convert it to 'native' first"
        if part.file.header is None
        else f"the bases of {part.directory} came from a file, and no seed reproduces them"
        for part in parts
        if part.file.header is None or not part.file.header.is_reproducible
    ]:
        return problems
    options: dict[str, tuple[OpenAdapter, object]] = {}
    layers: dict[str, OpenAdapter] = {}
    specs: dict[int, tuple[OpenAdapter, BasisSpec]] = {}
    trained: dict[str, tuple[OpenAdapter, Tensor]] = {}
    for part in parts:  # of which the first with an option, a layer, bases or a tensor is compared with the others
        own = {name: value for name, value in vars(part.file.config).items() if name not in OF_LAYERS}
        for name, value in {**own, "the base model": part.file.fields.get(BASE_FIELD)}.items():
            first, expected = options.setdefault(name, (part, value))
            if value != expected:
                problems.append(f"{name} is {expected!r} in {first.directory} and {value!r} in {part.directory}")
        if both := [fqn for fqn in part.file.values if fqn in layers]:
            problems.append(f"{layers[both[0]].directory} and {part.directory} both have {shortened(both)}")
        layers |= dict.fromkeys(part.file.values, part)
        for r, basis in part.bases.items():
            first, spec = specs.setdefault(r, (part, basis.spec))
            if spec != basis.spec and (spec.family != basis.spec.family or not spec.is_prefix_stable):
                problems.append(
                    f"{first.directory} has {spec} and {part.directory} {basis.spec}, and no model can use both at "
                    "once: train the parts with stream='portable', and block bases with the same blocks="
                )
        for fqn, tensor in part.file.trained.items():  # as an embedding tied to a head in another stage
            first, known = trained.setdefault(fqn, (part, tensor))
            if not torch.equal(tensor, known) or part.file.rows.get(fqn) != first.file.rows.get(fqn):
                problems.append(f"{fqn} has different values in {first.directory} and in {part.directory}")
    return problems


def _joined(parts: Sequence[OpenAdapter]) -> OpenAdapter:
    files, first = [part.file for part in parts], parts[0].file
    options = {fqn: option for file in files for fqn, option in file.options.items()}
    shapes = {fqn: shape for part in parts for fqn, shape in part.require_shapes().items()}
    stored = [part.transposed for part in parts]
    specs = {r: basis.spec for part in parts for r, basis in part.bases.items()}
    known = [file.header.model_class for file in files if file.header is not None and file.header.model_class]
    is_one = len({(each.library, each.name) for each in known}) == 1
    assert first.header is not None, "parts of PEFT are refused"
    header = replace(
        first.header,
        kinds={fqn: kind for part in parts for fqn, kind in part.kinds.items()},
        model_class=max(known, key=lambda each: each.labels is not None) if is_one else None,  # one has the head
        buffers=tuple(dict.fromkeys(fqn for file in files for fqn in file.buffers)),
    )
    config = first.config
    if any(file.config.alpha != config.alpha for file in files):  # a part with one alpha does not list it by layer
        config = replace(config, alpha={fqn: option.alpha for fqn, option in options.items()})
    config = replace(config, train_rows={fqn: rows for file in files for fqn, rows in file.rows.items()} or None)
    named = [file.fields.get("target_modules") for file in files]
    modules = [name for file in files for name in file.fields.get("modules_to_save") or ()]
    fields = {
        **first.fields,
        "fan_in_fan_out": all(file.fields.get("fan_in_fan_out") for file in files),
        "modules_to_save": list(dict.fromkeys(modules)) or None,
        # what all parts have, which is exact in each, else a regex of all layers
        "target_modules": named[0] if all(each == named[0] for each in named) else "|".join(map(re.escape, shapes)),
    }
    whole = replace(
        replace(first, fields=fields, config=options_by_target(config, options), header=header),
        values={fqn: pair for file in files for fqn, pair in file.values.items()},
        trained={fqn: tensor for file in files for fqn, tensor in file.trained.items()},
    )
    bases = {r: Basis(spec) for r, spec in specs.items()}  # the header says what part of them the layers use
    transposed = None if None in stored else tuple(fqn for own in stored for fqn in own or ())
    return OpenAdapter(parts[0].directory, whole, shapes, bases, transposed)

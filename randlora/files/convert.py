"""`randlora.files.convert`: writing an adapter for this library, for PEFT, or as a LoRA."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from randlora.bases.spec import count_bases
from randlora.checkpoint.bases import stream_notes
from randlora.checkpoint.format import (
    Header,
    adapter_tensors,
    stored_bases,
)
from randlora.checkpoint.keys import basis_keys
from randlora.checkpoint.limits import require_drawable
from randlora.checkpoint.peft_config import UNREAD_FIELDS, option_fields, peft_obstacle, unknown_to_peft
from randlora.checkpoint.write import write_adapter, write_planned
from randlora.config import Stream
from randlora.disk.replace import NEW, scratch_for
from randlora.errors import CheckpointError, ConfigError, raise_collected
from randlora.files.adapter import OpenAdapter, open_adapter
from randlora.files.to_lora import Lora, LoraLayer, to_lora
from randlora.hints import require_types
from randlora.report import Progress, as_bytes, as_lines, no_progress, table

Format = Literal["peft", "native", "lora"]


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
        lines = []
        if self.layers:
            rows = [
                (layer.fqn, layer.in_features, layer.out_features, layer.rank, f"{layer.relative_error:.3g}")
                for layer in self.layers
            ]
            lines += [*table(("layer", "in", "out", "rank", "relative error"), rows)]
            lines.append(f"relative error of all layers together {self.relative_error:.3g}")
        return as_lines([*lines, f"wrote {self.out} ({self.to}), {as_bytes(self.nbytes)}", *self.notes])


def convert(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: Format = "peft",
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    base: str | os.PathLike[str] | None = None,
    prefix: str | None = None,
    stream: Stream | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> ConversionReport:
    """Write an adapter in another format, to another directory.

    ``"peft"`` can be loaded by PEFT 0.21.2: the file holds the bases if PEFT would draw others. ``"native"`` has this
    library's header with its checksums, and the bases only if no seed reproduces them. ``"lora"`` is a PEFT LoRA, which
    other servers read too: a low-rank approximation of every layer's update. Nothing is written if the error of a layer
    exceeds the tolerance.

    Args:
        directory: A directory that `randlora.save` or PEFT's ``save_pretrained`` wrote; it does not change.
        out: Another directory, to write to.
        to: The format.
        rank: For ``"lora"``, the rank of every layer; ``None`` for the smallest of each layer within the tolerance.
        tolerance: For ``"lora"``, the largest accepted relative error of a layer's update, in the Frobenius norm;
            ``None`` means 0.05. 1 accepts anything.
        base: The directory of the base model, whose headers give the layers' shapes. PEFT does not store them, so its
            files need it for ``"native"`` and ``"lora"``.
        prefix: The prefix by which the names in the adapter and in the base model differ, as in `randlora.load`. The
            adapter keeps its names.
        stream: The stream of the bases, as in `randlora.load`. A ``"native"`` file says it.
        overwrite: Whether to replace an adapter in ``out``.
        progress: Called for every layer.

    Returns:
        A report, with the error of every layer.

    Raises:
        ConfigError: For invalid options, or if the error of a LoRA exceeds the tolerance.
        CheckpointError: If the adapter cannot be read or does not fit the base, or ``out`` is not empty.
        OSError: If the disk refuses. Nothing is left half written.
    """
    require_types(convert, locals())
    source, target = Path(directory), Path(out)
    raise_collected(ConfigError, _option_problems(to, rank, tolerance), doing="convert")
    whole = Path(os.path.realpath(target))  # unlike Path.resolve, of links in a circle too
    if Path(os.path.realpath(source)) in (whole, *whole.parents):
        raise CheckpointError(f"cannot convert {str(source)!r} into itself: choose another directory")
    if os.path.lexists(target) and not target.is_dir():
        raise CheckpointError(f"{target} is a file or a broken link: expected the name of a directory to write to")
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise CheckpointError(f"{target} exists and is not empty: choose another name, or ask for overwriting")
    adapter = open_adapter(source, base, prefix, stream)
    assumed = (*adapter.file.doubts, *stream_notes(adapter.file))
    if to == "lora":
        with scratch_for(target.resolve()) as scratch:
            (factors := scratch / NEW).mkdir()
            lora = to_lora(adapter, rank, tolerance, factors, progress)
            nbytes = write_planned(target, lora.fields, lora.tensors)
        return ConversionReport(source, target, to, nbytes, lora.layers, (*assumed, *_lora_notes(lora)))
    fields, tensors, header, notes = _contents(adapter, to)
    nbytes = write_adapter(target, fields, tensors, header)
    return ConversionReport(source, target, to, nbytes, (), (*assumed, *notes))


def _option_problems(to: Format, rank: int | None, tolerance: float | None) -> list[str]:
    problems = []
    if to != "lora" and (rank is not None or tolerance is not None):
        problems.append(f"rank and tolerance are for to='lora': {to!r} is exact")
    if rank is not None and rank <= 0:
        problems.append(f"rank must be a positive integer, got {rank!r}")
    if tolerance is not None and not 0 <= tolerance <= 1:
        problems.append(f"tolerance must be a number in [0, 1], got {tolerance!r}")
    return problems


def _contents(
    adapter: OpenAdapter, to: Format
) -> tuple[dict[str, Any], dict[str, Tensor], Header | None, tuple[str, ...]]:
    """Return the fields of the JSON, the tensors, our header, and notes.

    Without known shapes, which only ``"peft"`` can do without, everything remains as PEFT wrote it. Then a stream that
    the caller names would be lost, which is an error. Fields that depend on a model always remain.
    """
    file = adapter.file
    tensors = adapter_tensors(file.values, file.trained)
    if to == "peft" and adapter.shapes is None and (file.stream is None or file.bases):
        for r, pair in file.bases.items():
            tensors |= zip(basis_keys(r, file.bases.keys()), pair, strict=True)
        return dict(file.fields), tensors, None, ()
    shapes = adapter.require_shapes()
    if to == "peft" and (reason := unknown_to_peft(adapter.kinds)) is not None:
        raise CheckpointError(f"cannot convert for PEFT: {reason}; this library loads the adapter as it is")
    if to == "peft" and (reason := peft_obstacle(file.options)) is not None:
        raise CheckpointError(f"cannot convert to 'peft': {reason}; a 'lora' has a rank for each layer")
    header = Header.of(
        file.config, file.options, adapter.bases, shapes, file.trained, adapter.transposed, adapter.kinds
    )
    specs = {r: basis.spec for r, basis in adapter.bases.items()}
    is_peft_draw = all(
        spec.stream == "torch" and (spec.max_dim, spec.min_dim) == header.rectangles[r] for r, spec in specs.items()
    )
    is_stored = not header.is_reproducible or (to == "peft" and not is_peft_draw)
    notes: tuple[str, ...] = ()
    if to == "peft":  # which has bases as wide as the widest layer and as high as the highest
        for r, spec in specs.items():
            require_drawable(spec, header.rectangles[r], file, adapter.known)
    if is_stored:
        stored = stored_bases(adapter.bases, header)
        tensors |= _filled_up(stored, header) if to == "peft" else stored
        reason = "PEFT would draw others from the seed" if to == "peft" else "no seed reproduces them"
        notes = (f"the bases are in the file: {reason}",)
    kept = {name: value for name, value in file.fields.items() if name not in UNREAD_FIELDS}
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


def _lora_notes(lora: Lora) -> tuple[str, ...]:
    notes = []
    if lora.fields["rank_pattern"]:
        notes.append(
            "the ranks differ between layers: a server must read rank_pattern and alpha_pattern, as PEFT does, or use "
            "a scaling of 1; rank=N gives all layers one rank"
        )
    if len(lora.tensors) > 2 * len(lora.layers):
        notes.append("parameters trained with the adapter are included: not every server reads them")
    return tuple(notes)

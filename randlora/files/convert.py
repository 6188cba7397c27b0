"""`convert`: an adapter on disk written anew for another reader: this library, PEFT, or whatever knows LoRA."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from randlora.bases.spec import count_bases
from randlora.checkpoint.contents import describe, file_writers, peft_can_draw, stored_bases
from randlora.checkpoint.header import Header
from randlora.checkpoint.layout import (
    GAMMA_SUFFIX,
    LAMBDA_SUFFIX,
    MODEL_PREFIX,
    TOP_BASIS_A,
    TOP_BASIS_B,
    master_copy,
    trained_key,
)
from randlora.checkpoint.peft_config import STREAM_FIELD, option_fields
from randlora.config import is_integer
from randlora.errors import CheckpointError, ConfigError, raise_collected
from randlora.files.adapter import OpenAdapter, open_adapter
from randlora.files.output import check_output, scratch_near, write_output
from randlora.files.progress import Progress, no_progress
from randlora.files.to_lora import Lora, LoraLayer, to_lora
from randlora.report import as_bytes, table

Format = Literal["peft", "native", "lora"]


@dataclass(frozen=True)
class ConversionReport:
    """What `randlora.files.convert` wrote; prints with the errors of a LoRA.

    Attributes:
        source: The adapter that was read.
        out: The directory that was written.
        to: The format.
        nbytes: Bytes of its files.
        layers: For a LoRA, how each layer was converted; the other formats lose nothing.
        notes: What else the user should know.
    """

    source: Path
    out: Path
    to: Format
    nbytes: int
    layers: tuple[LoraLayer, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def relative_error(self) -> float:
        """The error of all layers together: ``sqrt(Σ ‖ΔW - LoRA‖² / Σ ‖ΔW‖²)``; 0 where nothing was lost."""
        whole = sum(layer.norm**2 for layer in self.layers)
        lost = sum((layer.relative_error * layer.norm) ** 2 for layer in self.layers)
        return float((lost / whole) ** 0.5) if whole else 0.0

    def __str__(self) -> str:
        """Lay it out: a table of layers for a LoRA, then what was written."""
        lines = []
        if self.layers:
            rows = [
                (layer.fqn, layer.in_features, layer.out_features, layer.rank, f"{layer.relative_error:.3g}")
                for layer in self.layers
            ]
            lines += [*table(("layer", "in", "out", "rank", "relative error"), rows)]
            lines.append(f"relative error of all layers together {self.relative_error:.3g}")
        return "\n".join([*lines, f"wrote {self.out} ({self.to}), {as_bytes(self.nbytes)}", *self.notes])


def convert(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: Format = "peft",
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    base: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> ConversionReport:
    """Write an adapter in another format, to another directory.

    ``"peft"`` is what PEFT 0.21.2 loads: with the bases in the file wherever PEFT would draw others. ``"native"`` has
    this library's header with its checksums, and the bases in the file only where no seed brings them back. ``"lora"``
    is a PEFT LoRA, which other servers read too: every layer's update cut to a low rank, which loses something; nothing
    is written where a layer loses more than the tolerance.

    Args:
        directory: What `randlora.save` or PEFT's ``save_pretrained`` wrote; it is not touched.
        out: Where to write; another directory.
        to: The format.
        rank: For ``"lora"``, the rank of every layer; ``None`` for the smallest one of each layer within the tolerance.
        tolerance: For ``"lora"``, the largest relative error accepted of a layer's update, in the Frobenius norm;
            ``None`` means 0.05. 1 accepts anything.
        base: The directory of the base model, whose headers say the layers' shapes. A file of PEFT's lacks them, and
            becomes ``"native"`` or ``"lora"`` only with it.
        overwrite: Write over an adapter in ``out``.
        progress: Told of every layer.

    Returns:
        What was written, with the error of every layer.

    Raises:
        ConfigError: For options that cannot work, and for a LoRA that would lose more than the tolerance.
        CheckpointError: When the adapter cannot be read or does not fit the base, or ``out`` is taken.
        OSError: When the disk refuses. Nothing is left half written.
    """
    source, target = Path(directory), Path(out)
    raise_collected(ConfigError, _option_problems(to, rank, tolerance), doing="convert")
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise CheckpointError(f"cannot convert {str(source)!r} into itself: the input is never touched")
    check_output(target, overwrite=overwrite)
    adapter = open_adapter(source, None if base is None else Path(base))
    if to == "lora":
        with scratch_near(target) as scratch:
            lora = to_lora(adapter, rank, tolerance, scratch, progress)
            nbytes = write_output(target, lora.writers)
        return ConversionReport(source, target, to, nbytes, lora.layers, _lora_notes(lora))
    fields, tensors, header, notes = _peft_contents(adapter) if to == "peft" else _native_contents(adapter)
    nbytes = write_output(target, file_writers(fields, tensors, header))
    return ConversionReport(source, target, to, nbytes, (), notes)


def _option_problems(to: str, rank: object, tolerance: object) -> list[str]:
    problems = []
    if to not in get_args(Format):
        problems.append(f"to must be one of {', '.join(get_args(Format))}, got {to!r}")
    elif to != "lora" and (rank is not None or tolerance is not None):
        problems.append(f"rank and tolerance are for to='lora': {to!r} loses nothing")
    if rank is not None and not (is_integer(rank) and rank > 0):  # type: ignore[operator]
        problems.append(f"rank must be a positive integer, got {rank!r}")
    if tolerance is not None and not (isinstance(tolerance, int | float) and 0 <= tolerance <= 1):
        problems.append(f"tolerance must be a number in [0, 1], got {tolerance!r}")
    return problems


Contents = tuple[dict[str, Any], dict[str, Tensor], Header | None, tuple[str, ...]]


def _native_contents(adapter: OpenAdapter) -> Contents:
    """Add our header; store the bases only where they must be."""
    shapes, basis = adapter.require_shapes()
    header = describe(adapter.file.config, basis, shapes, adapter.file.trained)
    is_stored = basis.stored is not None
    tensors = _trained_tensors(adapter) | (stored_bases(basis, header) if is_stored else {})
    notes = ("the bases are in the file: no seed brings them back",) if is_stored else ()
    return _native_fields(adapter, stored=is_stored), tensors, header, notes


def _peft_contents(adapter: OpenAdapter) -> Contents:
    """Store the bases where PEFT would draw others; without the layers' shapes, leave them as PEFT wrote them."""
    if adapter.shapes is None or adapter.basis is None:
        bases = adapter.file.bases
        stored = {} if bases is None else dict(zip((TOP_BASIS_A, TOP_BASIS_B), bases, strict=True))
        return dict(adapter.file.fields), _trained_tensors(adapter) | stored, None, ()
    header = describe(adapter.file.config, adapter.basis, adapter.shapes, adapter.file.trained)
    if peft_can_draw(adapter.basis, header):
        return _native_fields(adapter, stored=False), _trained_tensors(adapter), header, ()
    stored = _filled_up(stored_bases(adapter.basis, header), header)
    notes = ("the bases are in the file: PEFT would draw others from the seed",)
    return _native_fields(adapter, stored=True), _trained_tensors(adapter) | stored, header, notes


def _filled_up(stored: Mapping[str, Tensor], header: Header) -> dict[str, Tensor]:
    """Fill bases that were drawn for fewer rows or columns than PEFT allocates up with zeros, which no layer reads."""
    max_dim, min_dim = header.rectangle
    basis_A, basis_B = stored[TOP_BASIS_A], stored[TOP_BASIS_B]
    num_bases = count_bases(min_dim, header.spec.r)
    wide_A = F.pad(basis_A, (0, min_dim - basis_A.shape[-1]))
    wide_B = F.pad(basis_B, (0, 0, 0, num_bases - basis_B.shape[1], 0, max_dim - len(basis_B)))
    return {TOP_BASIS_A: wide_A.contiguous(), TOP_BASIS_B: wide_B.contiguous()}


def _native_fields(adapter: OpenAdapter, *, stored: bool) -> dict[str, Any]:
    """Write the JSON anew where it speaks of options and bases; what needs a model stays as it was."""
    assert adapter.basis is not None, "the shapes are known, so the bases are"
    kept = {name: value for name, value in adapter.file.fields.items() if name != STREAM_FIELD}
    own = option_fields(adapter.file.config, adapter.basis.spec.stream, stored=stored)
    return dict(sorted({**kept, **own}.items()))


def _trained_tensors(adapter: OpenAdapter) -> dict[str, Tensor]:
    """Name Λ, Γ and what was trained beside them as both libraries do."""
    tensors = {}
    for fqn, (lam, gamma) in adapter.file.values.items():
        tensors[f"{MODEL_PREFIX}{fqn}{LAMBDA_SUFFIX}"] = master_copy(lam, "cpu")
        tensors[f"{MODEL_PREFIX}{fqn}{GAMMA_SUFFIX}"] = master_copy(gamma, "cpu")
    beside = {trained_key(fqn, adapter.file.values): tensor for fqn, tensor in adapter.file.trained.items()}
    return tensors | beside


def _lora_notes(lora: Lora) -> tuple[str, ...]:
    notes = []
    if lora.fields["rank_pattern"]:
        notes.append(
            "the ranks differ from layer to layer: a server must read rank_pattern and alpha_pattern, as PEFT does, or "
            "take every scaling for 1; rank=N gives one rank to all"
        )
    if len(lora.tensors) > 2 * len(lora.layers):
        notes.append("parameters trained beside the adapter are carried over: not every server takes them")
    return tuple(notes)

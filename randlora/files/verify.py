"""`randlora.files.verify`: whether an adapter's files are undamaged, its bases reproduced, and it fits a base model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from randlora.bases.basis import Basis
from randlora.checkpoint.bases import Known, stream_notes
from randlora.checkpoint.read import AdapterFile, locate, read_adapter
from randlora.config import Stream
from randlora.disk.untrusted import is_there
from randlora.errors import CheckpointError, spelled
from randlora.files.adapter import adapter_bases, digests, known_shapes, require_base_for
from randlora.files.base_fit import fit_base, read_base, shapes_in
from randlora.files.inspect import DIGEST_SHOWN
from randlora.files.model_directory import find_model
from randlora.hints import require_types
from randlora.layer_options import described
from randlora.report import Progress, no_progress
from randlora.targets.site import Shapes

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
        checks: The checks, in order. If the files cannot be read, the following ones are missing.
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
        stream: The stream that the bases should be from, as in `randlora.load`. Others are a failed check.
        progress: Called for every step.

    Returns:
        All checks. A damaged file is a failed check, not an exception.

    Raises:
        ConfigError: If ``prefix`` is not a name, or is given without ``base``, or ``stream`` is not a stream.
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
        checks.append(Check("checksum", "not checked", "PEFT wrote the file, and stores none"))
    else:
        checks.append(Check("checksum", "passed", "the SHA-256 over header and tensors is the recorded one"))
    progress(1, 3, "checking the base model")
    known = None
    if model is not None:
        fit, shapes, known = _fit(file, model, shapes, prefix, str(base))
        checks.append(fit)
    progress(2, 3, "drawing the bases")
    checks += _bases(file, shapes, known)
    progress(3, 3, "done")
    return Verification(directory, tuple(checks))


def _files(file: AdapterFile) -> Check:
    """Return the check of files that could be read."""
    if file.doubts:
        return Check("files", "failed", "; ".join(file.doubts))
    count = len(file.trained)
    others = f" and {count} tensor{'s' * (count > 1)} trained with them" if count else ""
    values = f"Λ and Γ of {len(file.values)} layers{others}: names, dtypes and shapes fit"
    return Check("files", "passed", f"{values} r={described(file.options)['r']}, all values are finite")


def _fit(
    file: AdapterFile, found: tuple[Path, str | None], shapes: Shapes | None, prefix: str | None, base: str
) -> tuple[Check, Shapes | None, Known | None]:
    """Compare the adapter with a base model, which also determines the layers' shapes."""
    try:
        model = read_base(*found)
        fit = fit_base(model, file, prefix)
    except CheckpointError as error:
        return Check("base", "failed", str(error)), shapes, None
    shapes = shapes_in(fit.slots_of(file))
    words = f"{base} has all {len(shapes)} layers, in the shapes of the adapter"
    if fit.absent:
        words += f"; {', '.join(fit.absent)} of its class are not in its files"
    return Check("base", "passed", words), shapes, model.all_shapes


def _bases(file: AdapterFile, shapes: Shapes | None, known: Known | None) -> list[Check]:
    """Draw the bases of each r again and compare them with the recorded digest, or with those in the file."""
    try:
        file, bases = adapter_bases(file, shapes, known)
    except CheckpointError as error:
        return [Check("bases", "failed", str(error))]
    if not bases:
        base = spelled("base")
        reason = f"PEFT stored neither the bases nor the layers' shapes: give {base}, the directory of its base model"
        return [Check("bases", "not checked", reason)]
    return [
        Check("bases", *_how_found(file, f"{basis.spec}, SHA-256 {digest[:DIGEST_SHOWN]}…", basis))
        for basis, digest in digests(file, shapes, bases)
    ]


def _how_found(file: AdapterFile, bases: str, basis: Basis) -> tuple[Outcome, str]:
    is_drawn = basis.stored is None
    if file.header is not None:
        origin = "drawn again" if is_drawn else "in the file"
        return "passed", f"{bases}: {origin}, as recorded"
    if not file.bases:
        doubts = "".join(f"; {note}" for note in stream_notes(file))
        return "not checked", f"{bases}: drawn from the key; PEFT stored nothing to compare them with{doubts}"
    if is_drawn:
        return "passed", f"{bases}: drawn again, as stored in the file"
    return "passed", f"{bases}: in the file; its key gives others here, so those in the file are used"

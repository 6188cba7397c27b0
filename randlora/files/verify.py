"""`verify`: whether an adapter's files are whole, their bases come out again, and they fit a base model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from randlora.bases.spec import sliced_dims
from randlora.checkpoint.read import AdapterFile, read_adapter
from randlora.errors import CheckpointError
from randlora.files.adapter import adapter_basis, known_shapes
from randlora.files.base_fit import fit_base, open_base
from randlora.files.model_directory import read_model_directory
from randlora.files.progress import Progress, no_progress
from randlora.files.summary import DIGEST_SHOWN
from randlora.targets.site import Shapes

STEPS = 3

Outcome = Literal["passed", "failed", "not checked"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: ``files``, ``checksum``, ``base`` or ``bases``.
        outcome: ``"passed"``, ``"failed"``, or ``"not checked"`` where the files give nothing to hold against.
        words: What was found.
    """

    name: str
    outcome: Outcome
    words: str

    def __str__(self) -> str:
        """Say it on one line, or on more where there are several reasons."""
        return f"{self.outcome}: {self.name}: {self.words}"


@dataclass(frozen=True)
class Verification:
    """What `randlora.files.verify` looked at.

    Attributes:
        directory: The adapter.
        checks: In order; what follows a failure that leaves nothing to look at is missing.
    """

    directory: Path
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.outcome != "failed" for check in self.checks)

    def __str__(self) -> str:
        """List the checks, and what they come to."""
        verdict = "sound" if self.passed else "NOT sound"
        return "\n".join([*map(str, self.checks), f"{self.directory} is {verdict}"])


def verify(
    directory: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    progress: Progress = no_progress,
) -> Verification:
    """Check an adapter's files: contents, checksum, bases, and whether they fit a base model.

    Args:
        directory: What `randlora.save` or PEFT's ``save_pretrained`` wrote.
        base: The directory of its base model, whose headers are read.
        progress: Told of every step.

    Returns:
        All checks. A damaged file is a check that failed, and no exception.
    """
    directory = Path(directory)
    progress(0, STEPS, "reading the files")
    try:
        file = read_adapter(directory)
        shapes = known_shapes(file)
    except CheckpointError as error:
        return Verification(directory, (Check("files", "failed", str(error)),))
    checks = [Check("files", "passed", _contents(file)), _checksum(file)]
    progress(1, STEPS, "looking at the base model")
    if base is not None:
        fit, shapes = _fit(file, Path(base), shapes)
        checks.append(fit)
    progress(2, STEPS, "drawing the bases")
    checks.append(_bases(file, shapes))
    progress(STEPS, STEPS, "done")
    return Verification(directory, tuple(checks))


def _contents(file: AdapterFile) -> str:
    beside = f" and {len(file.trained)} parameters beside them" if file.trained else ""
    return (
        f"Λ and Γ of {len(file.values)} layers{beside}: names, dtypes and shapes fit r={file.config.r}, "
        "all values are finite"
    )


def _checksum(file: AdapterFile) -> Check:
    if file.header is None:
        return Check("checksum", "not checked", "the file is PEFT's and carries none")
    return Check("checksum", "passed", "the SHA-256 over header and tensors is the recorded one")


def _fit(file: AdapterFile, base: Path, shapes: Shapes | None) -> tuple[Check, Shapes | None]:
    """Hold the adapter against a base, and say the layers' shapes, which those of the base settle."""
    try:
        found = fit_base(open_base(read_model_directory(base)), file)
    except CheckpointError as error:
        return Check("base", "failed", str(error)), shapes
    words = f"{base} has all {len(found.shapes)} layers, in the shapes of the adapter"
    if found.absent:
        words += f"; it lacks {', '.join(found.absent)}, as it would a new head"
    if found.renamed:
        words += f"; {found.renamed[0]} is called {found.renamed[1]} there, and so are others"
    return Check("base", "passed", words), found.shapes


def _bases(file: AdapterFile, shapes: Shapes | None) -> Check:
    """Draw the bases again and hold them against the recorded digest, or against those in the file."""
    try:
        basis = adapter_basis(file, shapes)
    except CheckpointError as error:
        return Check("bases", "failed", str(error))
    if basis is None:
        reason = "PEFT wrote neither the bases nor the layers' shapes: give the directory of the base model too"
        return Check("bases", "not checked", reason)
    digest = basis.digest(*(basis.extent if shapes is None else sliced_dims(shapes.values())))[:DIGEST_SHOWN]
    return Check("bases", *_how_found(file, f"{basis.spec}, SHA-256 {digest}…", is_drawn=basis.stored is None))


def _how_found(file: AdapterFile, bases: str, *, is_drawn: bool) -> tuple[Outcome, str]:
    if file.header is not None:
        origin = "drawn again" if is_drawn else "in the file"
        return "passed", f"{bases}: {origin}, as recorded"
    if file.bases is None:
        return "not checked", f"{bases}: drawn from the key; the file is PEFT's and says nothing to hold them against"
    if is_drawn:
        return "passed", f"{bases}: drawn again, as stored in the file"
    return "passed", f"{bases}: in the file; its key draws others here, so they are taken as they are"

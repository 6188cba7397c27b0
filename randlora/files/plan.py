"""`randlora.files.plan`: the report of an adapter, from the model's class and the headers of its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from randlora.errors import CheckpointError, TargetError, raise_collected
from randlora.files.base_fit import Base, open_base
from randlora.files.model_directory import ModelDirectory
from randlora.files.quantized import DenseView
from randlora.files.transformers_model import TransformersModel
from randlora.hints import require_types
from randlora.model.inject import plan as plan_model
from randlora.report import Report


@dataclass(frozen=True)
class TrainingMemory:
    """The memory that training an adapter needs, in bytes, without activations, which depend on the batch.

    Attributes:
        weights: The model's weights, in the dtypes of the checkpoint.
        parameters: Λ and Γ in float32, and the parameters of ``train_also`` in the model's dtype.
        gradients: The same size.
        optimizer: Twice that size, for the two moments of AdamW.
        bases: The random bases, as stored.
    """

    weights: int
    parameters: int
    gradients: int
    optimizer: int
    bases: int

    @property
    def total(self) -> int:
        """The total."""
        return self.weights + self.parameters + self.gradients + self.optimizer + self.bases


def plan(directory: str | os.PathLike[str], r: int | Mapping[str, int] | None = None, **options: Any) -> Report:
    """Return the report of what `randlora.inject` would do to the model in a directory, without its weights.

    transformers builds the class that ``config.json`` names on the meta device. Nothing is downloaded, and no code that
    came with the checkpoint is run.

    Args:
        directory: A checkpoint as transformers writes it: one safetensors file, or shards with an index.
        r: Rank of one random basis, or ranks by pattern.
        **options: As for `randlora.plan`.

    Returns:
        The report of `randlora.plan` for the model. Parameters of a quantized model are counted as if it were not.

    Raises:
        CheckpointError: If the directory has no checkpoint that can be read, or one that is quantized but not by
            bitsandbytes; if transformers is not installed or does not have the class; or if shapes in the files and in
            the class differ.
        RandLoRAError: As `randlora.plan`.
    """
    require_types(plan, {"directory": directory})  # the others are those of an adapter
    return plan_checkpoint(open_base(directory), r, **options)


def plan_checkpoint(base: Base, r: int | Mapping[str, int] | None = None, **options: Any) -> Report:
    """Return the report of `plan` for a checkpoint whose headers have been read."""
    directory, dense, model = base
    if isinstance(model, str):
        advice = "or build the model on torch.device('meta') and give it to randlora.plan"
        raise CheckpointError(f"cannot plan for {str(directory.path)!r}: {model}; {advice}")
    raise_collected(CheckpointError, _take_dtypes(model, dense), doing=f"plan for {str(directory.path)!r}")
    report = plan_model(model.census.model, r, **options)
    if not dense.codes:
        return report
    codes = {fqn for fqn, names in model.names_by_fqn.items() if dense.codes.keys() & set(names)}
    problems = [f"train_also includes {fqn}, which is quantized" for fqn in report.train_also if fqn in codes]
    raise_collected(TargetError, problems, doing="plan")
    quantized = f"the model is quantized ({', '.join(dense.kinds)}): parameters are counted as if it were not"
    return replace(report, notes=(*report.notes, quantized))


def _take_dtypes(model: TransformersModel, dense: DenseView) -> list[str]:
    """Set the parameters' dtypes to those of the checkpoint, and return which have other shapes there."""
    problems = []
    for held in model.census.parameters:
        for entry in (dense.directory.entries[name] for name in model.names_of(held.parameter)):
            if entry.shape != tuple(held.parameter.shape):
                by_class = tuple(held.parameter.shape)
                problems.append(f"{entry.name} has shape {entry.shape} in the files, {by_class} by its config.json")
            held.parameter.data = held.parameter.data.to(entry.dtype)
    return problems


def training_memory(report: Report, directory: ModelDirectory) -> TrainingMemory:
    """Return the memory that is needed to train the adapter of a report that `plan` returned."""
    trained = report.checkpoint_bytes  # the trained parameters are those that are saved
    return TrainingMemory(directory.nbytes, trained, trained, 2 * trained, report.basis_bytes)

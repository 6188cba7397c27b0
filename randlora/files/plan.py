"""`randlora.files.plan`: what an adapter of a model would be, from its class and the headers of its checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from randlora.errors import CheckpointError, TargetError, raise_collected
from randlora.files.model_directory import ModelDirectory, read_model_directory
from randlora.files.quantized import DenseView, as_dense
from randlora.files.transformers_model import TransformersModel, build_model
from randlora.model.inject import plan as plan_model
from randlora.report import Report


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that training an adapter takes, but for activations, which depend on the batch.

    Attributes:
        weights: The model's own, in the dtypes they are stored in.
        parameters: What is trained: Λ and Γ in float32, and what ``train_also`` names in the model's dtype.
        gradients: As many.
        optimizer: Twice as many, the two moments of AdamW.
        bases: The random bases, as stored.
    """

    weights: int
    parameters: int
    gradients: int
    optimizer: int
    bases: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.parameters + self.gradients + self.optimizer + self.bases


def plan(directory: str | os.PathLike[str], r: int | None = None, **options: Any) -> Report:
    """Return the report of what `randlora.inject` would do to the model in a directory, without its weights.

    The model's class, which ``config.json`` names, is built by transformers on the meta device. Nothing is downloaded,
    and no code that came with the checkpoint is run.

    Args:
        directory: A checkpoint as transformers writes it: one safetensors file, or shards with an index.
        r: Rank of one random basis.
        **options: As for `randlora.plan`.

    Returns:
        The report that `randlora.plan` gives for the model. Of a quantized model, parameters are counted as before it
        was.

    Raises:
        CheckpointError: When the directory holds no checkpoint that can be read, of quantized ones any but those of
            bitsandbytes; when transformers is not installed or has no class of this name; or when the files hold
            parameters of other shapes than the class.
        RandLoRAError: Whatever `randlora.plan` raises.
    """
    checkpoint = read_model_directory(directory)
    model = build_model(checkpoint)
    base = as_dense(checkpoint, model)
    if isinstance(model, str):
        advice = "or build the model on torch.device('meta') and give it to randlora.plan"
        raise CheckpointError(f"cannot plan for {str(directory)!r}: {model}; {advice}")
    raise_collected(CheckpointError, _take_dtypes(model, base), doing=f"plan for {str(directory)!r}")
    report = plan_model(model.census.model, r, **options)
    if not base.codes:
        return report
    codes = {fqn for fqn, names in model.names_by_fqn.items() if base.codes.keys() & set(names)}
    problems = [f"train_also takes in {fqn}, which is quantized" for fqn in report.train_also if fqn in codes]
    raise_collected(TargetError, problems, doing="plan")
    quantized = f"the model is quantized ({', '.join(base.kinds)}): parameters are counted as before it was"
    return replace(report, notes=(*report.notes, quantized))


def _take_dtypes(model: TransformersModel, base: DenseView) -> list[str]:
    """Give the parameters the dtypes that they are stored in, and return which are stored in other shapes."""
    problems = []
    for held in model.census.parameters:
        for entry in (base.directory.entries[name] for name in model.names_of(held.parameter)):
            if entry.shape != tuple(held.parameter.shape):
                by_class = tuple(held.parameter.shape)
                problems.append(f"{entry.name} has shape {entry.shape} in the files, {by_class} by its config.json")
            held.parameter.data = held.parameter.data.to(entry.dtype)
    return problems


def training_memory(report: Report, directory: ModelDirectory) -> TrainingMemory:
    """Count the bytes that training the adapter of a report takes.

    Args:
        report: What `randlora.files.plan` returned.
        directory: The model it is about.
    """
    trained = report.checkpoint_bytes  # what is trained is what is saved
    return TrainingMemory(directory.nbytes, trained, trained, 2 * trained, report.basis_bytes)

"""`randlora.files.plan`: what an adapter of a model would be, from the headers of its checkpoint alone."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from randlora.errors import TargetError, raise_collected
from randlora.files.model_directory import ModelDirectory, read_model_directory
from randlora.files.quantized import as_dense
from randlora.files.skeleton import skeleton
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
    """Say what `randlora.inject` would do to the model in a directory, without its code and its weights.

    Args:
        directory: A checkpoint as transformers writes it: one safetensors file, or shards with an index.
        r: Rank of one random basis.
        **options: As for `randlora.plan`.

    Returns:
        The report that `randlora.plan` gives for the model; notes name what had to be guessed. Of a quantized model,
        parameters are counted as before it was.

    Raises:
        CheckpointError: When the directory holds no checkpoint that can be read; of quantized ones, only those of
            bitsandbytes can.
        RandLoRAError: Whatever `randlora.plan` raises.
    """
    base = as_dense(read_model_directory(directory))
    model = skeleton(base.directory)
    report = plan_model(model, r, **options)
    if not base.codes:
        return replace(report, notes=(*report.notes, *model.doubts))
    codes = {model.naming.fqn(name) for name in base.codes}
    problems = [f"train_also takes in {fqn}, which is quantized" for fqn in report.train_also if fqn in codes]
    raise_collected(TargetError, problems, doing="plan")
    quantized = f"the model is quantized ({', '.join(base.kinds)}): parameters are counted as before it was"
    return replace(report, notes=(*report.notes, *model.doubts, quantized))


def training_memory(report: Report, directory: ModelDirectory) -> TrainingMemory:
    """Count the bytes that training the adapter of a report takes.

    Args:
        report: What `randlora.files.plan` returned.
        directory: The model it is about.
    """
    trained = report.checkpoint_bytes  # what is trained is what is saved
    return TrainingMemory(directory.nbytes, trained, trained, 2 * trained, report.basis_bytes)

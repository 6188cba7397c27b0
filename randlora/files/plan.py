"""`randlora.files.plan` and `training_memory`, from the model's class and the headers of its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from randlora.config import further_options
from randlora.errors import CheckpointError, TargetError, raise_collected
from randlora.files.adapter import Base, open_base
from randlora.files.model_directory import MODEL_CONFIG_FILE, QUANTIZATION
from randlora.files.transformers_model import TransformersModel
from randlora.hints import require_types
from randlora.model.inject import plan as plan_model
from randlora.model.memory import Setup, TrainingMemory, memory_of
from randlora.model.memory import training_memory as training_memory_of_model
from randlora.report import Report


@further_options(plan_model)
def plan(
    directory: str | os.PathLike[str],
    r: int | Mapping[str, int] | None = None,
    *,
    revision: str | None = None,
    **options: Any,
) -> Report:
    """Return the report that `randlora.inject` would return for the model in a directory, without its weights.

    transformers builds the class that ``config.json`` names on the meta device. No code from the checkpoint is run.

    Args:
        directory: A checkpoint as transformers writes it, or a repository on the Hub, ``"org/name"``, of which only
            headers are requested. A ``config.json`` alone suffices: the report has a note.
        r: Rank of one random basis, or ranks by pattern.
        revision: Branch, tag or commit of the repository.
        **options: As for `randlora.plan`.

    Returns:
        The report of `randlora.plan` for the model. Parameters of a quantized model are counted as if it were not.

    Raises:
        CheckpointError: If the checkpoint cannot be read, is quantized but not by bitsandbytes, or differs from the
            class, or if transformers does not have the class.
        RandLoRAError: As `randlora.plan`.
    """
    require_types(plan, {"directory": directory, "revision": revision})
    return plan_checkpoint(open_base(directory, revision, needs_weights=False), r, **options)


def plan_checkpoint(base: Base, r: int | Mapping[str, int] | None = None, **options: Any) -> Report:
    """Return the report of `plan` for a checkpoint whose headers have been read."""
    directory, model, codes = base
    doing = f"plan for {str(directory.path)!r}"
    if isinstance(model, str):
        advice = "or build the model on torch.device('meta') and give it to randlora.plan"
        raise CheckpointError(f"cannot {doing}: {model}; {advice}")
    is_alone = not directory.entries
    problems = ["it is quantized, and only the headers of its files say how"] * (
        is_alone and QUANTIZATION in directory.config
    )
    raise_collected(CheckpointError, [*problems, *_take_dtypes(model, base)], doing=doing)
    report = plan_model(model.census.model, r, **options)
    if is_alone:
        alone = f"planned from {MODEL_CONFIG_FILE} alone: names, shapes and dtypes in a checkpoint were not checked"
        return replace(report, notes=(*report.notes, alone))
    if not codes:
        return report
    coded = _sizes_of_codes(model, base)
    problems = [f"train_also includes {fqn}, which is quantized" for fqn in report.train_also if fqn in coded]
    raise_collected(TargetError, problems, doing="plan")
    quantized = f"the model is quantized ({base.kinds}): parameters are counted as if it were not quantized"
    return replace(report, notes=(*report.notes, quantized))


def _take_dtypes(model: TransformersModel, base: Base) -> list[str]:
    """Set the parameters' dtypes to the dtypes in the checkpoint, and return which tensors there do not fit."""
    problems = []
    for held in model.census.parameters:
        names = (name for name in model.names_of(held.tensor) if name not in base.codes)
        for entry in (base.directory.entries[name] for name in names):
            if entry.shape != (by_class := tuple(held.tensor.shape)):
                problems.append(f"{entry.name} has shape {entry.shape} in the files, {by_class} by its config.json")
            elif held.tensor.is_floating_point() and not entry.dtype.is_floating_point:
                problems.append(f"{entry.name} holds {entry.dtype}, codes of an unknown quantization")
            else:
                held.tensor.data = held.tensor.data.to(entry.dtype)
    return problems


@further_options(training_memory_of_model)
def training_memory(
    directory: str | os.PathLike[str],
    r: int | Mapping[str, int] | None = None,
    *,
    revision: str | None = None,
    **options: Any,
) -> TrainingMemory:
    """Return the memory, in bytes, that training an adapter of the model in a directory takes on each device.

    Args:
        directory: As for `plan`.
        r: Rank of one random basis, or ranks by pattern.
        revision: As for `plan`.
        **options: As for `randlora.training_memory`.

    Returns:
        The sizes of `randlora.training_memory` for the model. Quantized weights count with their stored size.

    Raises:
        CheckpointError: As `plan`.
        RandLoRAError: As `randlora.training_memory`.
    """
    require_types(plan, {"directory": directory, "revision": revision})
    return checkpoint_memory(open_base(directory, revision, needs_weights=False), r, **options)


def checkpoint_memory(base: Base, r: int | Mapping[str, int] | None = None, **options: Any) -> TrainingMemory:
    """Return the result of `training_memory` for a checkpoint whose headers have been read."""
    setup = Setup(**{field.name: options.pop(field.name) for field in fields(Setup) if field.name in options})
    plan_checkpoint(base, r, **options)  # whose errors these are too
    assert not isinstance(base.model, str), "plan_checkpoint() raises an error"
    return memory_of(base.model.census.model, r, setup, _sizes_of_codes(base.model, base), **options)


def _sizes_of_codes(model: TransformersModel, base: Base) -> dict[str, int]:
    names = {fqn: names for fqn, names in model.names_by_fqn.items() if base.codes.keys() & set(names)}
    return {fqn: sum(base.codes[name].nbytes for name in own) for fqn, own in names.items()}

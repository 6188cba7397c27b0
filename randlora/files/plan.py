"""`randlora.files.plan` and `training_memory`, from the model's class and the headers of its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from randlora.checkpoint.header import ModelClass
from randlora.config import LARGEST_RANK, further_options
from randlora.errors import CheckpointError, ConfigError, TargetError, raise_collected
from randlora.files.base_fit import Base, open_base
from randlora.files.transformers_model import TransformersModel
from randlora.hints import require_types, shortly
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
    model_class: str | None = None,
    num_labels: int | None = None,
    **options: Any,
) -> Report:
    """Return the report that `randlora.inject` would return for the model in a directory, without its weights.

    transformers builds the class that ``config.json`` names on the meta device. No weights are downloaded, and no code
    from the checkpoint is run.

    Args:
        directory: A checkpoint as transformers writes it, or a repository on the Hub, ``"org/name"``, of which only
            headers are requested.
        r: Rank of one random basis, or ranks by pattern.
        revision: Branch, tag or commit of the repository.
        model_class: The name of a class of transformers, such as ``"AutoModelForSequenceClassification"``, instead of
            the class that ``config.json`` names.
        num_labels: The number of outputs of a head, instead of the number in ``config.json``.
        **options: As for `randlora.plan`.

    Returns:
        The report of `randlora.plan` for the model. Parameters of a quantized model are counted as if it were not.

    Raises:
        CheckpointError: If the checkpoint cannot be read, is quantized but not by bitsandbytes, or differs from the
            class, or if transformers does not have the class.
        RandLoRAError: As `randlora.plan`.
    """
    return plan_checkpoint(open_to_plan(directory, revision, model_class, num_labels), r, **options)


def open_to_plan(
    directory: str | os.PathLike[str],
    revision: str | None = None,
    model_class: str | None = None,
    num_labels: int | None = None,
) -> Base:
    """Read the headers of a checkpoint for the arguments of `plan` and `training_memory`."""
    require_types(plan, locals())
    if num_labels is not None and not 0 < num_labels <= LARGEST_RANK:
        raise ConfigError(f"num_labels must be a positive integer of at most {LARGEST_RANK}, got {shortly(num_labels)}")
    if model_class is None and num_labels is None:
        return open_base(directory, revision)
    labels = None if num_labels is None else tuple(f"LABEL_{index}" for index in range(num_labels))
    return open_base(directory, revision, ModelClass("transformers", model_class or "", labels))


def plan_checkpoint(base: Base, r: int | Mapping[str, int] | None = None, **options: Any) -> Report:
    """Return the report of `plan` for a checkpoint whose headers have been read."""
    directory, model, codes = base
    doing = f"plan for {str(directory.path)!r}"
    if isinstance(model, str):
        advice = "or build the model on torch.device('meta') and give it to randlora.plan"
        raise CheckpointError(f"cannot {doing}: {model}; {advice}")
    raise_collected(CheckpointError, _take_dtypes(model, base), doing=doing)
    report = plan_model(model.census.model, r, **options)
    if not codes:
        return report
    coded = _sizes_of_codes(model, base)
    problems = [f"train_also includes {fqn}, which is quantized" for fqn in report.train_also if fqn in coded]
    raise_collected(TargetError, problems, doing="plan")
    quantized = f"the model is quantized ({base.kinds}): parameters are counted as if it were not quantized"
    return replace(report, notes=(*report.notes, quantized))


def _take_dtypes(model: TransformersModel, base: Base) -> list[str]:
    """Set the parameters' dtypes to the dtypes in the checkpoint, and return which shapes differ there."""
    problems = []
    for held in model.census.parameters:
        names = (name for name in model.names_of(held.tensor) if name not in base.codes)
        for entry in (base.directory.entries[name] for name in names):
            if entry.shape != tuple(held.tensor.shape) and base.trained_on is None:  # else a head may differ
                by_class = tuple(held.tensor.shape)
                problems.append(f"{entry.name} has shape {entry.shape} in the files, {by_class} by its config.json")
            held.tensor.data = held.tensor.data.to(entry.dtype)
    return problems


@further_options(training_memory_of_model)
def training_memory(
    directory: str | os.PathLike[str],
    r: int | Mapping[str, int] | None = None,
    *,
    revision: str | None = None,
    model_class: str | None = None,
    num_labels: int | None = None,
    **options: Any,
) -> TrainingMemory:
    """Return the memory, in bytes, that training an adapter of the model in a directory takes on each device.

    Args:
        directory: As for `plan`.
        r: Rank of one random basis, or ranks by pattern.
        revision: As for `plan`.
        model_class: As for `plan`.
        num_labels: As for `plan`.
        **options: As for `randlora.training_memory`.

    Returns:
        The sizes of `randlora.training_memory` for the model. Quantized weights count with their stored size.

    Raises:
        CheckpointError: As `plan`.
        RandLoRAError: As `randlora.training_memory`.
    """
    return checkpoint_memory(open_to_plan(directory, revision, model_class, num_labels), r, **options)


def checkpoint_memory(base: Base, r: int | Mapping[str, int] | None = None, **options: Any) -> TrainingMemory:
    """Return the result of `training_memory` for a checkpoint whose headers have been read."""
    setup = Setup(**{field.name: options.pop(field.name) for field in fields(Setup) if field.name in options})
    plan_checkpoint(base, r, **options)  # whose errors these are too
    assert not isinstance(base.model, str), "plan_checkpoint() raises an error"
    return memory_of(base.model.census.model, r, setup, _sizes_of_codes(base.model, base), **options)


def _sizes_of_codes(model: TransformersModel, base: Base) -> dict[str, int]:
    """Return the bytes of the quantized parameters by FQN, with what belongs to their codes."""
    names = {fqn: names for fqn, names in model.names_by_fqn.items() if base.codes.keys() & set(names)}
    return {fqn: sum(base.codes[name].nbytes for name in own) for fqn, own in names.items()}

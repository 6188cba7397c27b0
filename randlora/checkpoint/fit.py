"""Whether an adapter's file fits a model: its layers are there and can carry it, and every shape agrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from randlora.checkpoint.read import AdapterFile
from randlora.errors import CheckpointError, TargetError, raise_collected
from randlora.layers.base import AdapterLayer
from randlora.targets.select import Target, find_targets, obstacles
from randlora.targets.walk import named_parameters, walk


def fit_targets(model: nn.Module, file: AdapterFile, *, needs_values: bool = True) -> tuple[Target, ...]:
    """Find the layers that a file names, and check that all in it fits and can be put beside them.

    Args:
        model: The model, adapted or not.
        file: The adapter.
        needs_values: Refuse layers on the meta device, where what is loaded would be lost.

    Returns:
        Its layers under the names that the file gives them.

    Raises:
        CheckpointError: When something does not fit; all such things are named at once.
    """
    targets = named_targets(model, file)
    problems = [
        *obstacles(model, targets),
        *(_without_values(targets) if needs_values else []),
        *misfits(file, targets),
        *_unknown_parameters(model, file.trained),
        *trained_misfits(model, file.trained),
    ]
    raise_collected(CheckpointError, problems, doing="fit the adapter to this model")
    return targets


def named_targets(model: nn.Module, file: AdapterFile) -> tuple[Target, ...]:
    """Find the layers that a file names, under these names.

    Raises:
        CheckpointError: When one is missing, or cannot carry an adapter of its own.
    """
    modules = {visit.fqn: visit.module for visit in walk(model)}
    problems = [f"the model has no layer {fqn}" for fqn in file.values if fqn not in modules]
    raise_collected(CheckpointError, problems, doing="fit the adapter to this model")
    aliases = {id(modules[fqn]): fqn for fqn in file.values}
    try:
        targets = find_targets(model, lambda fqn, _: fqn in file.values)
    except TargetError as error:
        raise CheckpointError(str(error)) from error
    named = tuple(replace(target, fqn=aliases[id(target.module)]) for target in targets)
    if missing := sorted(set(file.values) - {target.fqn for target in named}):
        problems.append(f"{', '.join(missing)} cannot carry an adapter of its own in this model")
    raise_collected(CheckpointError, problems, doing="fit the adapter to this model")
    return named


def misfits(file: AdapterFile, targets: Sequence[Target]) -> list[str]:
    """Say which layers have other shapes than the adapter was trained on, or reach beyond the bases in the file."""
    problems = []
    for target in targets:
        shape = (target.out_features, target.in_features)
        min_dim = file.values[target.fqn][1].shape[1]
        saved = file.header.shapes[target.fqn] if file.header else shape
        if saved != shape or min_dim != min(shape):
            theirs = f"out x in = {saved[0]} x {saved[1]}" if file.header else f"a smaller side of {min_dim}"
            problems.append(f"{target.fqn} is {shape[0]} x {shape[1]} here, the adapter was trained on {theirs}")
        elif file.bases and (len(file.bases[1]) < max(shape) or file.bases[0].shape[-1] < min_dim):
            problems.append(f"{target.fqn} is {shape[0]} x {shape[1]}, larger than the bases in the file")
    return problems


def trained_misfits(model: nn.Module, trained: Mapping[str, Tensor]) -> list[str]:
    """Say which parameters trained beside an adapter are other ones in the model; those it lacks are passed over."""
    own = {fqn: parameter for fqn, _, _, parameter in named_parameters(model)}
    problems = []
    for fqn, tensor in trained.items():
        if fqn not in own:
            continue
        if not own[fqn].is_floating_point():
            problems.append(f"{fqn} holds {own[fqn].dtype} here, and was trained as {tensor.dtype}")
        elif own[fqn].shape != tensor.shape:
            problems.append(f"{fqn} has shape {tuple(own[fqn].shape)} here, {tuple(tensor.shape)} in the file")
    return problems


def _without_values(targets: Sequence[Target]) -> list[str]:
    weights = {target.fqn: (target.module, target.module._parameters.get("weight")) for target in targets}
    return [
        f"{fqn} holds no values yet (meta), so the adapter's would be lost: materialize it first"
        for fqn, (module, weight) in weights.items()
        if weight is not None and weight.is_meta and not AdapterLayer.is_offloaded(module)
    ]


def _unknown_parameters(model: nn.Module, trained: Mapping[str, Tensor]) -> list[str]:
    own = {fqn for fqn, _, _, _ in named_parameters(model)}
    unknown = [fqn for fqn in trained if fqn not in own]
    return [f"the model has no parameter {fqn}, which the file holds beside the adapter" for fqn in unknown]

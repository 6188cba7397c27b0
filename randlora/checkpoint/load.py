"""`load`: an adapter from a directory into a model, ours or one that PEFT wrote."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from randlora.bank import BasisBank
from randlora.checkpoint.bases import file_basis
from randlora.checkpoint.layout import master
from randlora.checkpoint.peft_config import NEUTRAL_FIELDS, kept_fields
from randlora.checkpoint.read import AdapterFile, read_adapter
from randlora.checkpoint.tied import tied
from randlora.errors import CheckpointError, TargetError, raise_collected
from randlora.install import commit, or_if_first, owned_state, prepare
from randlora.layers.base import AdapterLayer
from randlora.report import Report, adapter_report, standing
from randlora.state import Adapter, ModelState
from randlora.train_also import replacements
from randlora.walk import Selection, Target, find_targets, named_parameters, obstacles, walk


@torch.inference_mode(mode=False)  # what is made here may be trained, whatever mode the caller is in
def load(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    name: str = "default",
    trainable: bool = False,
    active: bool | None = None,
) -> Report:
    """Add the adapter of a directory to a model, in place.

    The file's own names say which layers it belongs to; its ``target_modules`` is never matched against the model.
    Bases that a file brings and the model lacks are added without asking.

    Args:
        model: The model it was trained on, with or without other adapters.
        directory: What `randlora.save` or PEFT's ``save_pretrained`` wrote.
        name: The adapter's name here.
        trainable: Let its parameters require grad.
        active: Make it the only active adapter. ``None``: if it is the model's first.

    Returns:
        A report as from `randlora.inject`.

    Raises:
        CheckpointError: When the files are damaged, foreign or of another version, or do not fit the model.
        AdapterError: When the name is taken, or the model's adapters are merged.
    """
    state = owned_state(model, name, "load")
    active = or_if_first(state, wanted=active)
    try:
        file = read_adapter(Path(directory))
        targets = fit_targets(model, file)
        file = tied(model, file)
        basis = file_basis(file, targets, state.bank if state else BasisBank())
    except CheckpointError as error:
        raise CheckpointError(f"cannot load {str(directory)!r}: {error}") from error
    adapter = Adapter(name, file.config, basis, tuple(target.fqn for target in targets), f"the names in {directory}")
    adapter.peft_fields = kept_fields(file.fields)
    replaced = replacements(model, state or ModelState(), file.trained)
    for fqn, entry in replaced.items():
        own = file.trained[fqn].to(device=entry.original.device, dtype=entry.original.dtype)
        adapter.trained[fqn] = nn.Parameter(own, requires_grad=trainable)
    addition = prepare(state, adapter, targets, values=_placed(file, targets), replaced=replaced, trainable=trainable)
    report = adapter_report(
        model,
        name,
        file.config,
        Selection(targets, adapter.rule, {}),
        basis.spec,
        basis_bytes=basis.nbytes,
        train_also=tuple(file.trained),
        notes=_notes(adapter, is_active=active),
    )
    commit(model, addition, active=active)
    return report


def fit_targets(model: nn.Module, file: AdapterFile, *, needs_values: bool = True) -> tuple[Target, ...]:
    """Find the layers that a file names, and check that everything in it fits them.

    Args:
        model: The model.
        file: The adapter.
        needs_values: Refuse layers on the meta device, where what is loaded would be lost.

    Raises:
        CheckpointError: When a layer or a parameter is not there, or of another shape. All problems are named.
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
    problems = [*obstacles(model, named), *_misfits(file, named), *_trained_misfits(model, file.trained)]
    problems += _without_values(named) if needs_values else []
    if missing := sorted(set(file.values) - {target.fqn for target in named}):
        problems.append(f"{', '.join(missing)} cannot carry an adapter of its own in this model")
    raise_collected(CheckpointError, problems, doing="fit the adapter to this model")
    return named


def _misfits(file: AdapterFile, targets: tuple[Target, ...]) -> list[str]:
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


def _without_values(targets: tuple[Target, ...]) -> list[str]:
    problems = []
    for target in targets:
        weight = target.module._parameters.get("weight")
        if weight is not None and weight.is_meta and not AdapterLayer.is_offloaded(target.module):
            problems.append(
                f"{target.fqn} holds no values yet (meta), so the adapter's would be lost: materialise it first"
            )
    return problems


def _trained_misfits(model: nn.Module, trained: Mapping[str, Tensor]) -> list[str]:
    own = {fqn: parameter for fqn, _, _, parameter in named_parameters(model)}
    problems = []
    for fqn, tensor in trained.items():
        if fqn not in own:
            problems.append(f"the model has no parameter {fqn}, which the file holds beside the adapter")
        elif not own[fqn].is_floating_point():
            problems.append(f"{fqn} holds {own[fqn].dtype} here, and was trained as {tensor.dtype}")
        elif own[fqn].shape != tensor.shape:
            problems.append(f"{fqn} has shape {tuple(own[fqn].shape)} here, {tuple(tensor.shape)} in the file")
    return problems


def _placed(file: AdapterFile, targets: tuple[Target, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """Put Λ and Γ beside their weights."""
    placed = {}
    for target in targets:
        device = AdapterLayer.device_beside(target.module)
        lam, gamma = (master(part, device) for part in file.values[target.fqn])
        placed[target.fqn] = (lam, gamma)
    return placed


def _notes(adapter: Adapter, *, is_active: bool) -> list[str]:
    notes = standing(adapter.name, is_active=is_active, is_trainable=True)  # whoever loads asks for what it may train
    foreign = sorted(set(adapter.peft_fields) - set(NEUTRAL_FIELDS))
    return [*notes, f"fields kept but not understood: {', '.join(foreign)}"] if foreign else notes

"""`load`: an adapter from a directory or the Hub into a model, ours or one that PEFT wrote."""

from __future__ import annotations

import os
import warnings

import torch
from torch import Tensor, nn

from randlora.bases.bank import BasisBank
from randlora.checkpoint.base_model import mismatch
from randlora.checkpoint.bases import file_basis
from randlora.checkpoint.fit import fit_sites
from randlora.checkpoint.layout import master
from randlora.checkpoint.locate import locate
from randlora.checkpoint.peft_config import BASE_FIELD, NEUTRAL_FIELDS, kept_fields
from randlora.checkpoint.read import AdapterFile, read_adapter
from randlora.checkpoint.tied import tied
from randlora.errors import CheckpointError
from randlora.model.install import commit, or_if_first, owned_state, prepare
from randlora.model.train_also import replacements
from randlora.report import Report, adapter_report, next_steps
from randlora.state import Adapter, ModelState
from randlora.targets.site import Site, shapes_of
from randlora.targets.walk import Census


@torch.inference_mode(mode=False)  # what is made here may be trained, whatever mode the caller is in
def load(
    model: nn.Module,
    source: str | os.PathLike[str],
    *,
    name: str = "default",
    trainable: bool = False,
    active: bool | None = None,
    revision: str | None = None,
) -> Report:
    """Add the adapter of a directory, or of a repository on the Hub, to a model, in place.

    The file's own names say which layers it belongs to; its ``target_modules`` is never matched against the model.
    Bases that a file brings and the model lacks are added without asking. Where the file and the model both say which
    base model they are of, and disagree, a ``UserWarning`` names the two.

    Args:
        model: The model it was trained on, with or without other adapters.
        source: What `randlora.save` or PEFT's ``save_pretrained`` wrote, or the safetensors file in it. A string
            ``"user/repo"`` that is no path here means a repository on the Hub, for which huggingface_hub must be
            installed (the extra ``hub``).
        name: The adapter's name here.
        trainable: Let its parameters require grad.
        active: Make it the only active adapter. ``None``: if it is the model's first.
        revision: Branch, tag or commit of a repository; ``None`` means its main branch.

    Returns:
        A report as from `randlora.inject`.

    Raises:
        CheckpointError: When the files are damaged, foreign or of another version, do not fit the model, or cannot be
            had from the Hub.
        AdapterError: When the name is taken, or the model's adapters are merged.
    """
    census = Census.of(model)
    state = owned_state(census, name, "load")
    active = or_if_first(state, wanted=active)
    try:
        file = read_adapter(locate(source, revision))
        sites = fit_sites(census, file)
        file = tied(census, file)
        shapes = shapes_of(sites)
        basis = file_basis(file, shapes, state.bank if state else BasisBank())
    except CheckpointError as error:
        raise CheckpointError(f"cannot load {str(source)!r}: {error}") from error
    doubts = _doubts(model, file)
    rule = f"the names in {source}" + (f" at {revision}" if revision else "")
    adapter = Adapter(name, file.config, basis, tuple(shapes), rule, peft_fields=kept_fields(file.fields))
    replaced = replacements(census, state or ModelState(), file.trained)
    for fqn, entry in replaced.items():
        own = file.trained[fqn].to(device=entry.original.device, dtype=entry.original.dtype)
        adapter.trained[fqn] = nn.Parameter(own, requires_grad=trainable)
    addition = prepare(state, adapter, sites, values=_placed(file, sites), replaced=replaced, trainable=trainable)
    report = adapter_report(
        census,
        name,
        file.config,
        shapes,
        basis.spec,
        rule=rule,
        basis_bytes=basis.nbytes,
        is_active=active,
        is_trainable=trainable,
        train_also=tuple(file.trained),
        notes=[*doubts, *next_steps(name, is_active=active, is_trainable=True), *_foreign_fields(adapter)],
    )
    commit(census, addition, active=active)
    return report


def _placed(file: AdapterFile, sites: tuple[Site, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """Put Λ and Γ beside their weights."""
    placed = {}
    for site in sites:
        device = site.layer_class.device_beside(site.owner)
        lam, gamma = (master(part, device) for part in file.values[site.fqn])
        placed[site.fqn] = (lam, gamma)
    return placed


def _doubts(model: nn.Module, file: AdapterFile) -> list[str]:
    """Warn, at the line that loads, where the file was trained on another base model; return the warning as a note."""
    doubt = mismatch(model, file.fields.get(BASE_FIELD))
    if doubt is None:
        return []
    warnings.warn(doubt, UserWarning, stacklevel=4)  # past `load` and its decorator
    return [doubt]


def _foreign_fields(adapter: Adapter) -> list[str]:
    foreign = sorted(set(adapter.peft_fields) - set(NEUTRAL_FIELDS))
    return [f"fields kept but not understood: {', '.join(foreign)}"] if foreign else []

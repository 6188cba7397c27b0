"""`load`: an adapter from a directory or the Hub into a model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from randlora.checkpoint.base_model import mismatch
from randlora.checkpoint.bases import file_bases, stream_notes
from randlora.checkpoint.fit import fit_sites, parameter_names, with_prefix, without_repeats
from randlora.checkpoint.peft_config import BASE_FIELD, NEUTRAL_FIELDS, kept_fields
from randlora.checkpoint.read import AdapterFile
from randlora.checkpoint.source import Found, Source, read_source
from randlora.checkpoint.tensors import master
from randlora.config import Stream
from randlora.errors import CheckpointError, warn
from randlora.hints import require_types
from randlora.layer_options import by_rank
from randlora.model.install import commit, prepare
from randlora.model.moving import moving_note
from randlora.model.train_also import copy_dtype, half_notes, replacements
from randlora.model.view import View, opened_to_add
from randlora.modes import in_mode, without_modes
from randlora.replaced import like
from randlora.report import Report, adapter_report, next_steps
from randlora.state import Adapter, SavePretrained
from randlora.targets.site import Site, shapes_of


@torch.inference_mode(mode=False)  # what is made here may be trained, whatever mode the caller is in
def load(
    model: nn.Module,
    source: Source,
    *,
    name: str = "default",
    trainable: bool = False,
    active: bool | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    prefix: str | None = None,
    stream: Stream | None = None,
    save_pretrained: SavePretrained | None = None,
) -> Report:
    """Load an adapter from a directory, or from a repository on the Hub, into a model, in place.

    The names in the file determine the layers; its ``target_modules`` is not matched against the model. Bases that the
    model does not have are added. If both the file and the model name their base model and the names differ, a
    ``UserWarning`` says so. Another one says if the JSON file is missing or contradicts the header of the tensors,
    which decides.

    Args:
        model: The model that the adapter was trained on, with or without other adapters.
        source: A directory that `randlora.save` or PEFT's ``save_pretrained`` wrote, or the safetensors file in it. A
            string ``"user/repo"`` that is not a path means a repository on the Hub, for which huggingface_hub must be
            installed (the extra ``hub``). Or what `randlora.adapter_state` returned.
        name: The adapter's name in the model.
        trainable: Whether its parameters require grad.
        active: Whether to make it the only active adapter. ``None``: if it is the model's first.
        revision: Branch, tag or commit of a repository; ``None`` means its main branch.
        subfolder: The directory inside of ``source`` with the adapter's files; ``None`` means ``source`` itself.
        prefix: The prefix by which the names in the file and in the model differ, such as ``"bert"`` for an adapter of
            ``BertModel`` and a model with a head. It is added to the names or removed from them, as the model requires,
            which the report says.
        stream: The stream that the adapter's bases are from, if a file of PEFT without ``dense`` bases does not say it:
            ``"torch-2.11"`` if it was trained under torch 2.11 or older. ``None`` means what the file says, or else
            ``"torch"``, with a note in the report.
        save_pretrained: What the model's method of this name does: see `randlora.inject`.

    Returns:
        A report as from `randlora.inject`.

    Raises:
        ConfigError: If ``prefix`` is not a name, ``stream`` is not a stream, or a flag is neither ``True`` nor
            ``False``.
        CheckpointError: If the files are damaged, of another kind or version, do not fit the model, cannot be
            downloaded, or are from another stream.
        AdapterError: If the name is taken, or the model's adapters are merged.
    """
    given = {"model": model, "source": source, "trainable": trainable, "active": active, "revision": revision}
    given |= {"prefix": prefix, "stream": stream, "subfolder": subfolder, "save_pretrained": save_pretrained}
    require_types(load, given)
    with opened_to_add(model, [name], "load") as view:
        found = read_source(source, revision=revision, subfolder=subfolder, stream=stream)
        return added(view, found, Options(name, trainable, active, prefix, save_pretrained))


class Options(NamedTuple):
    """What `load` is told beside where an adapter is; see there."""

    name: str = "default"
    trainable: bool = False
    active: bool | None = None
    prefix: str | None = None
    save_pretrained: SavePretrained | None = None


def added(view: View, found: Found, options: Options) -> Report:
    """Add an adapter that was read to a model, and return the report."""
    census, state = view.census, view.state
    file, (name, trainable, active, prefix, save_pretrained) = found.file, options
    active = not state.adapters if active is None else active
    try:
        if prefix is not None:
            file = with_prefix(file, prefix, census.sites_by_fqn, parameter_names(census))
        sites = fit_sites(census, file)
        file = without_repeats(census, file)
        shapes = shapes_of(sites, file.config)
        with without_modes():
            file, bases = file_bases(file, by_rank(shapes, file.options), state.bank, census.shapes)
    except CheckpointError as error:
        raise CheckpointError(f"cannot load {found.where}: {error}") from error
    doubts = warn_of_doubts(census.model, file)
    rule = f"{found.rule}, {file.renaming}" if file.renaming else found.rule
    layer_options = {fqn: file.options[fqn] for fqn in shapes}
    adapter = Adapter(name, file.config, bases, layer_options, rule, peft_fields=kept_fields(file.fields))
    unknown = sorted(set(adapter.peft_fields) - set(NEUTRAL_FIELDS))
    foreign = [f"fields kept but not understood: {', '.join(unknown)}"] if unknown else []
    replaced = replacements(census, state, file.trained)
    for fqn, entry in replaced.items():
        own = in_mode(file.trained[fqn]).to(device=entry.original.device, dtype=copy_dtype(entry))
        adapter.trained[fqn] = like(entry.original, own, requires_grad=trainable)
    addition = prepare(
        state,
        adapter,
        sites,
        values=_placed(file, sites),
        replaced=replaced,
        trainable=trainable,
        save_pretrained=save_pretrained,
    )
    report = adapter_report(
        census,
        adapter,
        shapes,
        is_active=active,
        is_trainable=trainable,
        notes=[
            *doubts,
            *stream_notes(file),
            *next_steps(name, is_active=active, is_trainable=True),
            *foreign,
            *([*moving_note(census, adapter.buffers), *half_notes(adapter)] if trainable else ()),
        ],
    )
    commit(census, addition, active=active)
    return report


def _placed(file: AdapterFile, sites: tuple[Site, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return Λ and Γ by FQN, on the devices of their weights."""
    placed = {}
    for site in sites:
        device = site.layer_class.device_beside(site.owner)
        lam, gamma = (master(in_mode(part), device) for part in file.values[site.fqn])
        placed[site.fqn] = (lam, gamma)
    return placed


def warn_of_doubts(model: nn.Module, file: AdapterFile) -> list[str]:
    """Warn of doubts about the files and of another base model; return the warnings."""
    doubt = mismatch(model, file.fields.get(BASE_FIELD))
    doubts = [*file.doubts, *([] if doubt is None else [doubt])]
    for doubt in doubts:
        warn(doubt)
    return doubts

"""`load`, `load_all` and `swap`: adapters from a directory, the Hub or memory into a model, or into its adapters."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from randlora.checkpoint.bases import file_bases, stream_notes
from randlora.checkpoint.contents import AdapterState, file_of
from randlora.checkpoint.fit import fit_sites, with_prefix, without_repeats
from randlora.checkpoint.header import BasisRecord, Header
from randlora.checkpoint.peft_layout import BASE_FIELD, CONFIG_FILE, NEUTRAL_FIELDS, TENSORS_FILE, kept_fields, mismatch
from randlora.checkpoint.read import AdapterFile, locate, read_adapter
from randlora.config import Stream, by_rank, explain_options
from randlora.disk.formats import is_there
from randlora.disk.hub import local_path
from randlora.errors import CheckpointError, raise_collected, refusing, spelled, warn
from randlora.functional.scratch import without_modes
from randlora.hints import require_types
from randlora.model.install import add, lost_parts
from randlora.model.switch import remove
from randlora.model.train_also import copy_dtype, find_tables, replacements, training_notes
from randlora.model.view import View, collective, opened, opened_to_add
from randlora.places import NOT_LASTING, Kept, Place, has_values, place_at, values_within
from randlora.ranks import agree, agreeing, raise_on_every_rank
from randlora.replaced import like, whole_shape
from randlora.report import Report, adapter_report, next_steps
from randlora.state import Adapter, SavePretrained, require_unmerged, require_unused
from randlora.targets.census import Shapes, shapes_of, sizes
from randlora.targets.match import nearest_names, shortened

Source = str | os.PathLike[str] | AdapterState
"""A directory, the safetensors file in it, a repository on the Hub, or what `randlora.adapter_state` returns."""
Sources = Mapping[str, Source] | Mapping[str | None, Source]  # by the name of an adapter; None means the only one


def read_source(
    source: Source, *, revision: str | None = None, subfolder: str | None = None, stream: Stream | None = None
) -> AdapterFile:
    """Read an adapter, without a model. Errors name what it was taken from."""
    where = "the state of an adapter" if isinstance(source, AdapterState) else repr(str(source))
    with refusing(f"load {where}"):
        if not isinstance(source, AdapterState):
            place = f"{subfolder} of {source}" if subfolder else f"{source}"
            rule = f"the names in {place} at {revision}" if revision else f"the names in {place}"
            with without_modes():
                return replace(read_adapter(locate(source, revision, subfolder), stream), where=where, rule=rule)
        if given := [option for option in (revision, subfolder, stream) if option is not None]:
            raise CheckpointError(f"it has no revision, subfolder or stream, got {given[0]!r}")
        return replace(file_of(source), where=where, rule=f"the names in {where}")


IN_ROOT = "default"  # the adapter whose files are not in a subdirectory, in PEFT's layout of several adapters


def adapters_in(directory: Path) -> dict[str, Path]:
    """Return the directories of the adapters in a directory, by name; ``default`` may be in the directory itself."""
    paths = sorted(directory.glob(f"*/{TENSORS_FILE}"))
    found = {path.parent.name: path.parent for path in paths if not path.parent.name.startswith(".")}
    if is_there(directory / TENSORS_FILE):
        if IN_ROOT in found:
            raise CheckpointError(f"{str(directory)!r} has two adapters named {IN_ROOT!r}, in it and in {IN_ROOT}/")
        found = {IN_ROOT: directory, **found}
    if not found:
        raise CheckpointError(f"{str(directory)!r} has no adapters: expected directories with {TENSORS_FILE}")
    return found


@collective(writes=True)
@explain_options
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

    The names in the file determine the layers; its ``target_modules`` is not matched against the model. A
    ``UserWarning`` says if the file and the model name different base models, or if the JSON file is missing or
    contradicts the header of the tensors, which decides. If the model is sharded, all processes call this together.

    Args:
        model: The model that the adapter was trained on, with or without other adapters.
        source: A directory that `randlora.save` or PEFT's ``save_pretrained`` wrote, or the safetensors file in it. A
            string ``"user/repo"`` that is not a path means a repository on the Hub, for which huggingface_hub must be
            installed (the extra ``hub``). Or a state from `randlora.adapter_state`.
        name: The adapter's name in the model.
        trainable: Whether its parameters require grad.
        active: Whether to make it the only active adapter. ``None`` means only if it is the model's first.
        revision: Branch, tag or commit of a repository; ``None`` means its main branch.
        subfolder: The directory inside of ``source`` with the adapter's files; ``None`` means ``source`` itself.
        prefix: The prefix by which the names in the file and in the model differ, such as ``"bert"`` for an adapter of
            ``BertModel`` and a model with a head. It is added or removed, as the model requires; the report says which.
        stream: The stream of the adapter's bases, for a file of PEFT that does not contain its ``dense`` bases:
            ``"torch-2.11"`` if it was trained under torch 2.11 or older. ``None`` means the stream in the file, or else
            ``"torch"``, with a note in the report.
        save_pretrained: What ``model.save_pretrained()`` does: see `randlora.inject`.

    Returns:
        A report as from `randlora.inject`.

    Raises:
        ConfigError: If an option has the wrong type, or ``prefix`` is not a name.
        CheckpointError: If the files are damaged, have an unknown kind or version, do not fit the model, cannot be
            downloaded, or use a different stream.
        AdapterError: If the name is taken, or the model's adapters are merged.
    """
    require_types(load, {option: value for option, value in locals().items() if option != "name"})
    with opened_to_add(model, [name], "load") as view:
        found = read_source(source, revision=revision, subfolder=subfolder, stream=stream)
        return _added(view, name, found, prefix, trainable=trainable, active=active, save_pretrained=save_pretrained)


@collective(writes=True)
@explain_options
def load_all(
    model: nn.Module,
    source: str | os.PathLike[str],
    *,
    names: Sequence[str] | None = None,
    trainable: bool = False,
    revision: str | None = None,
    prefix: str | None = None,
    save_pretrained: SavePretrained | None = None,
) -> list[Report]:
    """Load the adapters in a directory into a model, in place: all of them, or none.

    `randlora.save_all` and PEFT write such directories. Each adapter gets the name of its subdirectory; an adapter in
    ``source`` itself is named ``default``. The first is active if the model had no adapter before. If the model is
    sharded, all processes call this together.

    Args:
        model: The model that the adapters were trained on.
        source: The directory, or a repository on the Hub with the same layout.
        names: The adapters to load; ``None`` means all.
        trainable: Whether their parameters require grad.
        revision: Branch, tag or commit of a repository; ``None`` means its main branch.
        prefix: The prefix by which the names in the files and in the model differ, as for `randlora.load`.
        save_pretrained: What ``model.save_pretrained()`` does: see `randlora.inject`.

    Returns:
        A report for each, as from `randlora.load`.

    Raises:
        CheckpointError: If there is no adapter, none with a given name, or one cannot be loaded; nothing has changed.
        AdapterError: If a name is taken, or the model's adapters are merged.
    """
    require_types(load_all, locals())
    files = [f"{folder}{name}" for folder in ("", "*/") for name in (CONFIG_FILE, TENSORS_FILE)]
    with refusing(f"load {str(source)!r}"):
        directories = adapters_in(local_path(source, revision, files, are_patterns=True))
    chosen = list(dict.fromkeys(directories if names is None else names))
    unknown = [name for name in chosen if name not in directories]
    problems = [f"no adapter named {name!r}; the nearest are {nearest_names(name, directories)}" for name in unknown]
    raise_collected(CheckpointError, problems, doing=f"load {str(source)!r}")
    found = {name: read_source(directories[name]) for name in chosen}
    return add_all(model, found, trainable=trainable, prefix=prefix, save_pretrained=save_pretrained)


@collective(writes=True)
@torch.inference_mode(mode=False)
def add_all(model: nn.Module, found: Mapping[str, AdapterFile], **options: Any) -> list[Report]:
    """Add adapters that were read to a model under these names: all of them, or none if one cannot be added."""
    reports: list[Report] = []
    with opened_to_add(model, found, "load") as view:
        try:
            with raise_on_every_rank(agreeing()):  # else only some of the processes would remove what all have added
                for name, adapter in found.items():
                    now = View(view.root, view.state, view.census.again()) if reports else view
                    reports.append(_added(now, name, adapter, **options))
        except BaseException:
            for name in reversed([*found][: len(reports)]):
                remove(model, name)
            raise
    return reports


def _added(
    view: View,
    name: str,
    found: AdapterFile,
    prefix: str | None = None,
    *,
    trainable: bool = False,
    active: bool | None = None,
    save_pretrained: SavePretrained | None = None,
) -> Report:
    census, state = view.census, view.state
    active = not state.adapters if active is None else active
    with refusing(f"load {found.where}"):
        file = with_prefix(found, prefix, census.sites_by_fqn)
        sites = fit_sites(census, file)
        file = without_repeats(census, file)
        shapes = shapes_of(sites, file.config)
        with without_modes():
            file, bases = file_bases(file, by_rank(shapes, file.options), state.bank, census.shapes)
    doubts = _warn_of_doubts(census.model, file)
    layer_options = {fqn: file.options[fqn] for fqn in shapes}
    tables, _ = find_tables(census, file.rows)
    adapter = Adapter(name, file.config, bases, layer_options, file.rule, peft_fields=kept_fields(file.fields))
    adapter.rows |= {table.fqn: table.rows for table in tables}
    notes = [*doubts, *stream_notes(file), *next_steps(name, is_active=active, is_trainable=True)]
    if unknown := sorted(adapter.peft_fields.keys() - NEUTRAL_FIELDS):
        notes.append(f"fields kept but not understood: {', '.join(unknown)}")
    replaced = replacements(census, state, [fqn for fqn in file.trained if fqn not in file.rows])
    for fqn, entry in replaced.items():
        own = file.trained[fqn].to(device=entry.original.device, dtype=copy_dtype(entry))
        adapter.trained[fqn] = like(entry.original, own, requires_grad=trainable)
    rows = [file.trained[fqn].to(table.weight.device) for fqn, table in zip(file.rows, tables, strict=True)]
    values = {site.fqn: file.diagonals(site.fqn, site.layer_class.device_beside(site.owner)) for site in sites}
    if trainable:
        notes += training_notes(census, adapter)
    report = adapter_report(census, adapter, shapes, is_active=active, is_trainable=trainable, notes=notes)
    add(
        census,
        state,
        adapter,
        sites,
        replaced=replaced,
        active=active,
        trainable=trainable,
        save_pretrained=save_pretrained,
        values=values,
        rows=zip(tables, rows, strict=True),
    )
    return report


def _warn_of_doubts(model: nn.Module, file: AdapterFile) -> list[str]:
    """Warn of doubts about the files and of a different base model; return the warnings."""
    doubts = [*file.doubts, *filter(None, [mismatch(model, file.fields.get(BASE_FIELD))])]
    for doubt in doubts:
        warn(doubt)
    return doubts


@collective(writes=True)
@explain_options
@torch.inference_mode(mode=False)
def swap(
    model: nn.Module,
    source: Source,
    *,
    name: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    prefix: str | None = None,
) -> None:
    """Replace the values of an adapter with the values of a saved adapter, in place.

    Parameters remain the same objects, and the bases are not touched, so nothing is allocated or compiled again. Both
    adapters must have the same layers, r, alpha, bases, ``train`` and parameters of ``train_also``. Whether the adapter
    is active or trainable does not change, nor does its dropout. If the model is sharded, all processes call this
    together.

    Either all values are written or none. No other thread may run the model meanwhile, because its forward pass would
    mix old and new values. An optimizer keeps its moments, which belong to the old values: to train on from the new
    ones, clear its ``state`` or create a new optimizer.

    Args:
        model: A model with adapters.
        source: A directory or a repository on the Hub, as `randlora.load` takes, written by `randlora.save`; or what
            `randlora.adapter_state` returned.
        name: The adapter's name in the model; ``None`` means the only one.
        revision: Branch, tag or commit of a repository; ``None`` means its main branch.
        subfolder: The directory inside of ``source`` with the adapter's files; ``None`` means ``source`` itself.
        prefix: The prefix by which the names in the file and in the model differ, as for `randlora.load`.

    Raises:
        AdapterError: If the model has no such adapter, or it is merged or named by an open `randlora.serving.routed`.
        CheckpointError: If the source is missing or damaged, or differs in more than values. Nothing has changed then.
    """
    require_types(swap, locals())
    swap_each(model, {name: source}, revision=revision, subfolder=subfolder, prefix=prefix)


@collective(writes=True)
@torch.inference_mode(mode=False)
def swap_each(model: nn.Module, sources: Sources, **options: Any) -> None:
    """Swap the values of several adapters, by name, as `swap` does: all of them, or none."""
    with swapped(model, sources, **options):
        pass


@contextmanager
def swapped(model: nn.Module, sources: Sources, **options: Any) -> Iterator[None]:
    """Swap the values of several adapters before the block, in place. If it raises, none are swapped."""
    with opened(model, "swap the values of an adapter") as view, torch.no_grad():
        planned = [_planned(view, name, source, **options) for name, source in sources.items()]
        kept: list[tuple[Place, Kept]] = []
        try:
            for parameter, value in chain.from_iterable(values for _, _, values in planned):
                place = place_at(parameter)
                kept.append((place, place.keep()))
                place.write(value if place.part is None else values_within(value, place.part))
            agree()
            yield
        except BaseException:
            for place, before in reversed(kept):
                place.restore(before.values)
            raise
        for adapter, fields, _ in planned:
            adapter.peft_fields = fields


def _planned(
    view: View, name: str | None, source: Source, *, prefix: str | None = None, **place: Any
) -> tuple[Adapter, dict[str, Any], list[tuple[Tensor, Tensor]]]:
    """Return an adapter, its new fields of PEFT, and its parameters with their new values, after all checks."""
    state, census = view.state, view.census
    adapter = state.adapter(name)
    doing = f"swap the values of {adapter.name!r}"
    require_unmerged(state, doing)
    require_unused(state, adapter.name, doing)
    sites = [site for site in census.adapted if adapter.name in site.layer.adapters]
    raise_collected(CheckpointError, lost_parts(census, state, [adapter]), doing=doing)
    found = read_source(source, **place)
    doing += f" for those of {found.where}"
    with refusing(doing):
        file = without_repeats(census, with_prefix(found, prefix, census.sites_by_fqn))
        if file.header is None:
            raise CheckpointError("randlora.save did not write these files: call randlora.load")
    advice = "make it with the options that it was saved with, or load it as a separate adapter, with a different name="
    shapes = shapes_of([site for site in sites if not site.layer.is_rows], adapter.config)
    problems = [f"{difference}: {advice}" for difference in _differences(adapter, file, file.header, shapes)]
    parameters = list[Tensor](chain.from_iterable(site.layer.diagonals_of(site.owner, adapter.name) for site in sites))
    if not all(place_at(diagonal).is_lasting for diagonal in parameters):
        remedy = "load a checkpoint of DeepSpeed, with engine.load_checkpoint(directory)"
        problems.append(f"{sites[0].fqn} {NOT_LASTING}: {remedy}")
    parameters += adapter.trained.values()
    if not all(map(has_values, parameters)):
        problems.append("the adapter has no values to write to (meta or fake): materialize the model first")
    raise_collected(CheckpointError, problems, doing=doing)
    _warn_of_doubts(view.root, file)
    rows = {site.fqn: (file.trained[f"{site.fqn}.weight"],) for site in sites if site.layer.is_rows}
    values = [value for site in sites for value in (rows.get(site.fqn) or file.values[site.fqn])]
    values += [file.trained[fqn] for fqn in adapter.trained]
    return adapter, kept_fields(file.fields), [*zip(parameters, values, strict=True)]


def _differences(adapter: Adapter, file: AdapterFile, header: Header, shapes: Shapes) -> Iterator[str]:
    """Yield how an adapter differs from the one in the files, except for its values."""
    parameters = file.trained.keys() - set(file.buffers) - set(file.rows)
    if (own_train := adapter.config.train) != file.config.train:  # of Λ alone, Γ stays 1 / min_dim
        yield f"the adapter has {spelled('train', own_train)}, and the files {spelled('train', file.config.train)}"
    if adapter.rows != file.rows:
        yield f"rows of {shortened([*adapter.rows, *file.rows])} differ in number or place"
    for what, own, other in (
        ("layer", shapes.keys(), header.shapes.keys()),
        ("trained parameter", adapter.parameters.keys(), parameters),
        ("buffer", adapter.buffers.keys(), set(file.buffers)),
    ):
        for lacking, names in (("files have", own - other), ("adapter has", other - own)):
            if names:
                yield f"the {lacking} no {what} {shortened(sorted(names))}"
    own_shapes = dict(shapes) | {fqn: whole_shape(copy) for fqn, copy in adapter.trained.items()}
    saved = dict(header.shapes) | {fqn: tuple(file.trained[fqn].shape) for fqn in parameters | set(file.buffers)}
    for fqn in [fqn for fqn in own_shapes if fqn in saved]:
        if own_shapes[fqn] != saved[fqn]:
            yield f"{fqn} has shape {sizes(own_shapes[fqn])}, and in the files {sizes(saved[fqn])}"
        elif fqn in shapes and (was := file.options[fqn]) != (now := adapter.options[fqn]):
            yield f"{fqn} has r={now.r} and alpha={now.alpha:g}, but in the files r={was.r} and alpha={was.alpha:g}"
    if header.shapes == shapes and file.options == adapter.options:
        for r, used in by_rank(shapes, adapter.options).items():
            record = BasisRecord.of(adapter.bases[r], used)
            if record.digest != header.bases[r].digest:
                yield f"the bases are {record.spec}, and in the files {header.bases[r].spec}"

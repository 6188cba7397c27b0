"""`swap` and `swap_each`: replacing the values of adapters that a model has, in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from randlora.checkpoint.fit import parameter_names, with_prefix, without_repeats
from randlora.checkpoint.header import BasisRecord, Header
from randlora.checkpoint.load import Found, Source, read_source, warn_of_doubts
from randlora.checkpoint.peft_config import kept_fields
from randlora.checkpoint.read import AdapterFile
from randlora.errors import CheckpointError, raise_collected
from randlora.hints import require_types
from randlora.model.install import lost_parts
from randlora.model.view import View, opened
from randlora.modes import has_values
from randlora.options import by_rank
from randlora.places import Kept, Place, place_at, values_within
from randlora.ranks import raise_on_every_rank
from randlora.replaced import whole_shape
from randlora.state import Adapter, require_unmerged, require_unused
from randlora.targets.match import shortened
from randlora.targets.site import AdaptedSite, Shapes, shapes_of, sizes
from randlora.targets.walk import Census

DOING = "swap the values of an adapter"

ADVICE = (
    "make the adapter with the options that it was saved with, or load it as a separate adapter, with a different name="
)


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

    Parameters remain the same objects, and the bases are not touched, so nothing is allocated or compiled again, and
    optimizers and engines continue to work. Both adapters must have the same layers, r, alpha, bases and parameters of
    ``train_also``. Whether the adapter is active or trainable does not change, nor does its dropout. If the model is
    sharded, all processes call this together.

    Either all values are written or none. No other thread may run the model meanwhile, because its forward pass would
    mix old and new values. Let one thread do both, or hold a lock around each.

    An optimizer keeps its moments, which belong to the old values: to train on from the new ones, clear its ``state``
    or create a new optimizer. ``backward`` of an earlier forward raises torch's error about values changed in place.

    Args:
        model: A model with adapters.
        source: A directory or a repository on the Hub, as `randlora.load` takes, written by `randlora.save`; or what
            `randlora.adapter_state` returned.
        name: The adapter's name in the model; ``None`` means the only one.
        revision: Branch, tag or commit of a repository; ``None`` means its main branch.
        subfolder: The directory inside of ``source`` with the adapter's files; ``None`` means ``source`` itself.
        prefix: The prefix by which the names in the file and in the model differ, as for `randlora.load`.

    Raises:
        AdapterError: If the model has no adapter of that name, its adapters are merged, or an open block of
            `randlora.serving.routed` names it.
        CheckpointError: If the source is missing or damaged, or differs in more than values. The message names all
            differences, and nothing has changed.
    """
    given = {"model": model, "name": name, "source": source, "revision": revision}
    require_types(swap, {**given, "subfolder": subfolder, "prefix": prefix})
    with opened(model, DOING) as view:
        adapter, file, values = _planned(view, name, source, revision=revision, subfolder=subfolder, prefix=prefix)
        _write_all(values.items())
        adapter.peft_fields = kept_fields(file.fields)


@torch.inference_mode(mode=False)
def swap_each(model: nn.Module, sources: Mapping[str, Source]) -> None:
    """Swap the values of several adapters, by name, as `swap` does: all of them, or none."""
    with opened(model, DOING) as view:
        planned = [_planned(view, name, source) for name, source in sources.items()]
        _write_all(chain.from_iterable(values.items() for _, _, values in planned))
        for adapter, file, _ in planned:
            adapter.peft_fields = kept_fields(file.fields)


def _planned(
    view: View,
    name: str | None,
    source: Source,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    prefix: str | None = None,
) -> tuple[Adapter, AdapterFile, dict[Tensor, Tensor]]:
    """Return an adapter, what was read for it, and its parameters with their new values, after all checks."""
    state, census = view.state, view.census
    adapter = state.adapter(name)
    doing = f"swap the values of {adapter.name!r}"
    require_unmerged(state, doing)
    require_unused(state, adapter.name, doing)
    sites = [site for site in census.adapted if adapter.name in site.layer.adapters]
    with raise_on_every_rank(view.ranks()):
        problems = lost_parts(census, state, [adapter])
        raise_collected(CheckpointError, problems, doing=doing)
        found = read_source(source, revision=revision, subfolder=subfolder)
        doing += f" for those of {found.where}"
        file = _renamed(census, found, prefix, doing)
        if file.header is None:
            raise CheckpointError(f"cannot {doing}: randlora.save did not write these files: call randlora.load")
        others = _differences(adapter, file, file.header, shapes_of(sites, adapter.config))
        problems += [f"{difference}: {ADVICE}" for difference in others]
        own = [*chain.from_iterable(site.layer.diagonals_of(site.owner, adapter.name) for site in sites)]
        problems += [
            f"{site.fqn} is partitioned by ZeRO-3, whose optimizer has copies of the values and would write them back: "
            "load a checkpoint of DeepSpeed, with engine.load_checkpoint(directory)"
            for site in sites[:1]
            if not all(place_at(each).is_lasting for each in own)
        ]
        if not all(has_values(each) for each in (*own, *adapter.trained.values())):
            problems.append("the adapter has no values to write to (meta or fake): materialize the model first")
        raise_collected(CheckpointError, problems, doing=doing)
    warn_of_doubts(view.root, file)
    return adapter, file, dict(_values(adapter, file, sites))


def _renamed(census: Census, found: Found, prefix: str | None, doing: str) -> AdapterFile:
    """Return what was read under the names that the model has."""
    file = found.file
    try:
        if prefix is not None:
            file = with_prefix(file, prefix, census.sites_by_fqn, parameter_names(census))
        return without_repeats(census, file)
    except CheckpointError as error:
        raise CheckpointError(f"cannot {doing}: {error}") from error


def _write_all(values: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Write whole values into parameters, in place; all of them, or none."""
    kept: list[tuple[Place, Kept]] = []
    with torch.no_grad():
        try:
            for parameter, value in values:
                place = place_at(parameter)
                kept.append((place, place.keep()))
                place.write(value if place.part is None else values_within(value, place.part))
        except BaseException:
            for place, before in reversed(kept):
                place.restore(before.values)
            raise


def _values(adapter: Adapter, file: AdapterFile, sites: list[AdaptedSite]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each parameter of the adapter with its value in the file."""
    for site in sites:
        yield from zip(site.layer.diagonals_of(site.owner, adapter.name), file.values[site.fqn], strict=True)
    for fqn, parameter in adapter.trained.items():
        yield parameter, file.trained[fqn]


def _differences(adapter: Adapter, file: AdapterFile, header: Header, shapes: Shapes) -> Iterator[str]:
    """Yield how an adapter differs from the one in the files, except for its values."""
    parameters = file.trained.keys() - set(file.buffers)
    for what, own, other in (
        ("layer", shapes.keys(), header.shapes.keys()),
        ("trained parameter", adapter.parameters.keys(), parameters),
        ("buffer", adapter.buffers.keys(), set(file.buffers)),
    ):
        if more := sorted(own - other):
            yield f"the files have no {what} {shortened(more)}"
        if more := sorted(other - own):
            yield f"the adapter has no {what} {shortened(more)}, which the files have"
    own_shapes = dict(shapes) | {fqn: tuple(whole_shape(copy)) for fqn, copy in adapter.trained.items()}
    saved = dict(header.shapes) | {fqn: tuple(copy.shape) for fqn, copy in file.trained.items()}
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

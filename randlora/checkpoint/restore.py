"""`restore` and `restore_each`: the values of an adapter's files into the adapter that a model has, in place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from randlora.bases.basis import Basis
from randlora.checkpoint.header import BasisRecord, Header
from randlora.checkpoint.read import AdapterFile, read_adapter
from randlora.errors import CheckpointError, raise_collected
from randlora.layer_options import by_rank
from randlora.model.install import lost_sites, require_own
from randlora.model.train_also import lost_parameters
from randlora.model.view import View, opened
from randlora.modes import has_values
from randlora.placement.dtensor import Shard, is_dtensor, values_within
from randlora.placement.ranks import agreed
from randlora.replaced import whole_shape
from randlora.state import Adapter, require_unmerged, require_unrouted
from randlora.targets.match import shortened
from randlora.targets.site import AdaptedSite, Shapes, shapes_of, sizes
from randlora.targets.walk import Census


def restore(model: nn.Module, directory: str | os.PathLike[str], *, name: str | None = None) -> None:
    """Write the values of an adapter's files into the adapter of a model that they were saved from, in place.

    Unlike after `randlora.load`, parameters are the same objects as before, so that an optimizer and an engine that
    hold them go on with them. The adapter must be the same in everything but its values: layers, r, alpha, bases and
    the parameters trained with it. If the model is sharded, all processes call this together.

    Args:
        model: A model with adapters.
        directory: A directory that `randlora.save` wrote.
        name: The adapter's name in the model; ``None`` means the only one.

    Raises:
        AdapterError: If the model has no adapter of that name, its adapters are merged, or an open block of
            `randlora.routed` names it.
        CheckpointError: If the files are missing or damaged, or are those of another adapter. The model is then
            unchanged.
    """
    with opened(model, None) as view:
        write_values(_restored(view, directory, view.state.adapter(name).name))


def restore_each(model: nn.Module, directories: Mapping[str, Path]) -> None:
    """Restore several adapters, by name, each from its directory as `restore` does: all of them, or none."""
    with opened(model, None) as view:
        write_values(chain.from_iterable([_restored(view, path, name) for name, path in directories.items()]))


def _restored(view: View, directory: str | os.PathLike[str], name: str) -> Iterable[tuple[Tensor, Tensor]]:
    """Return the parameters of an adapter with their values in the files, after checking that these are its own."""
    advice = "make the model and its adapter as they were made when training began, with the same options"
    doing = f"restore adapter {name!r} from {str(directory)!r}"
    return planned_values(view, name, lambda _: read_adapter(Path(directory)), doing=doing, advice=advice)


def planned_values(
    view: View,
    name: str,
    read: Callable[[Census], AdapterFile],
    *,
    doing: str,
    advice: str,
) -> Iterable[tuple[Tensor, Tensor]]:
    """Return the parameters of an adapter with their values in files, after checking that these are its own.

    If the model is sharded, this is a collective.

    Args:
        view: The model.
        name: The adapter's name in the model.
        read: Returns the contents of the files.
        doing: The call, for messages.
        advice: What to do about a difference.

    Raises:
        AdapterError: If the model has no adapter of that name, or its adapters are merged.
        CheckpointError: If the files are damaged, or are those of another adapter.
    """
    state, census = view.state, view.census
    adapter = state.adapter(name)
    require_unmerged(state, doing)
    require_unrouted(state, name, doing)
    sites = [site for site in census.adapted if adapter.name in site.layer.adapters]
    own = [*chain.from_iterable(site.layer.diagonals_of(site.owner, adapter.name) for site in sites)]
    with agreed(view.ranks()):
        require_own(census, state, doing)
        problems = [*lost_sites(census, [adapter]), *lost_parameters(state, [adapter])]
        raise_collected(CheckpointError, problems, doing=doing)
        try:
            file = read(census)
        except CheckpointError as error:
            raise CheckpointError(f"cannot {doing}: {error}") from error
        problems += _differences(adapter, file, shapes_of(sites, adapter.config), advice)
        problems += [
            f"{site.fqn} is partitioned by ZeRO-3, whose optimizer has copies of the values and would write them "
            "back: load DeepSpeed's own checkpoint, as engine.load_checkpoint(directory) does"
            for site in sites[:1]
            if any(hasattr(each, "ds_id") for each in own)
        ]
        if not all(has_values(each) for each in (*own, *adapter.trained.values())):
            problems.append("the adapter has no values to write to (meta or fake): materialize the model first")
        raise_collected(CheckpointError, problems, doing=doing)
    return dict(_values(adapter, file, sites)).items()


def write_values(values: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Write whole values into parameters, in place; all of them, or none."""
    written: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        try:
            for parameter, value in values:
                own = Shard(parameter).keep() if is_dtensor(parameter) else parameter.detach().clone()
                written.append((parameter, own))
                _write(parameter, value)
        except BaseException:
            for parameter, before in reversed(written):
                Shard(parameter).restore(before) if is_dtensor(parameter) else parameter.copy_(before)
            raise


def _values(adapter: Adapter, file: AdapterFile, sites: list[AdaptedSite]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each parameter of the adapter with its value in the file."""
    for site in sites:
        yield from zip(site.layer.diagonals_of(site.owner, adapter.name), file.values[site.fqn], strict=True)
    for fqn, parameter in adapter.trained.items():
        yield parameter, file.trained[fqn]


def _differences(adapter: Adapter, file: AdapterFile, shapes: Shapes, advice: str) -> Iterator[str]:
    """Yield in what an adapter is another than the one in the files, except for its values."""
    if file.header is None:
        yield "randlora.save did not write these files: call randlora.load instead"
        return
    for what, own, other in (
        ("layer", shapes, file.header.shapes),
        (
            "trained parameter",
            adapter.parameters,
            {fqn: each for fqn, each in file.trained.items() if fqn not in file.buffers},
        ),
        ("buffer", adapter.buffers, dict.fromkeys(file.buffers)),
    ):
        if more := sorted(own.keys() - other.keys()):
            yield f"the files have no {what} {shortened(more)}: {advice}"
        if more := sorted(other.keys() - own.keys()):
            yield f"the adapter has no {what} {shortened(more)}, which the files have: {advice}"
    yield from _different_shapes(adapter, file, shapes, advice)
    if file.header.shapes == shapes and file.options == adapter.options:
        yield from _different_bases(adapter.bases, file.header, adapter, advice)


def _different_shapes(adapter: Adapter, file: AdapterFile, shapes: Shapes, advice: str) -> Iterator[str]:
    """Yield which layers have another shape, r or alpha than in the files, and which parameters another shape."""
    assert file.header is not None, "checked before"
    both: Mapping[str, Any] = {fqn: file.header.shapes[fqn] for fqn in shapes if fqn in file.header.shapes}
    for fqn, saved in both.items():
        if saved != shapes[fqn]:
            yield f"{fqn} has shape {sizes(shapes[fqn])}, and in the files {sizes(saved)}: {advice}"
        elif (was := file.options[fqn]) != (now := adapter.options[fqn]):
            yield (
                f"{fqn} has r={now.r} and alpha={now.alpha:g}, and in the files r={was.r} and alpha={was.alpha:g}: "
                f"{advice}"
            )
    for fqn in sorted(adapter.trained.keys() & file.trained.keys()):
        own, other = whole_shape(adapter.trained[fqn]), file.trained[fqn].shape
        if tuple(own) != tuple(other):
            yield f"{fqn} has shape {sizes(own)}, and in the files {sizes(other)}: {advice}"


def _different_bases(bases: Mapping[int, Basis], header: Header, adapter: Adapter, advice: str) -> Iterator[str]:
    """Yield which bases are others than those that the files were saved with."""
    for r, own in by_rank(header.shapes, adapter.options).items():
        record = BasisRecord.of(bases[r], own)
        if record.digest != header.bases[r].digest:
            yield f"the bases are {record.spec}, and in the files {header.bases[r].spec}: {advice}"


def _write(parameter: Tensor, value: Tensor) -> None:
    """Write a whole value into a parameter, of which this process may hold a part."""
    if is_dtensor(parameter):
        place = Shard(parameter)
        place.write(values_within(value, place.part))
    else:
        parameter.copy_(value)

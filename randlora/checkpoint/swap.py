"""`swap` and `set_adapter_state`: other values for an adapter that a model has, while other threads run the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from randlora.checkpoint.fit import parameter_names, with_prefix, without_repeats
from randlora.checkpoint.in_memory import AdapterState
from randlora.checkpoint.load import Options, warn_of_doubts
from randlora.checkpoint.peft_config import kept_fields
from randlora.checkpoint.read import AdapterFile
from randlora.checkpoint.restore import planned_values, write_values
from randlora.checkpoint.several import add_all
from randlora.checkpoint.source import Found, Source, read_source
from randlora.hints import require_types
from randlora.model.view import opened
from randlora.placement.ranks import agreed
from randlora.state import CHANGING, ModelState, adapted_root, is_adapted, require_unrouted
from randlora.targets.walk import Census

ADVICE = "load it as another adapter, with another name="


def swap(
    model: nn.Module,
    name: str,
    source: Source,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    prefix: str | None = None,
) -> None:
    """Replace the values of an adapter by those of another with the same spec, in place, while the model is in use.

    Parameters remain the same objects, and the bases are not touched, so nothing is allocated or compiled again. The
    two must have the same layers, r, alpha, bases and parameters of ``train_also``. Whether the adapter is active or
    trainable does not change, nor does its dropout.

    Calls of the model in other threads go on. Each computes with the old values or with the new ones: the values are
    written after the calls that are running have ended, while new ones wait for some milliseconds. Files are read
    before. `generate` consists of many calls; a block of `randlora.routed` is not interrupted, however many calls are
    in it. What is compiled as a whole, ``torch.compile(model)`` or ``model.compile()``, is not counted as a call unless
    it is in such a block, nor is a call of a module inside of the model.

    An optimizer keeps its moments, which are those of the old values: clear its ``state``, or make another, to train
    on from the new ones. ``backward`` of a forward from before raises torch's error about values changed in place.

    Args:
        model: A model with adapters.
        name: The adapter's name.
        source: A directory or a repository on the Hub, as `randlora.load` takes, written by `randlora.save`; or what
            `randlora.adapter_state` returned.
        revision: Branch, tag or commit of a repository; ``None`` means its main branch.
        subfolder: The directory inside of ``source`` with the adapter's files; ``None`` means ``source`` itself.
        prefix: The prefix by which the names in the file and in the model differ, as for `randlora.load`.

    Raises:
        AdapterError: If the model has no adapter of that name, its adapters are merged, or this is called within a
            block of `randlora.routed` that names it, or a forward pass while another thread waits for its end to swap.
        CheckpointError: If the source is missing or damaged, or differs in more than values: all differences are named,
            and nothing has changed.
    """
    given = {"model": model, "name": name, "source": source, "revision": revision}
    require_types(swap, {**given, "subfolder": subfolder, "prefix": prefix})
    with opened(model, None) as view:
        view.state.adapter(name)
        ranks = view.ranks()
    with agreed(ranks):
        found = read_source(source, revision=revision, subfolder=subfolder)
    swap_found(model, name, found, prefix)


def set_adapter_state(model: nn.Module, state: AdapterState, *, name: str = "default", trainable: bool = False) -> None:
    """Put what `randlora.adapter_state` returned into a model.

    An adapter of that name gets its values in place, as by `randlora.swap`, and must have the same spec. If there is
    none, it is added, as by `randlora.load`.

    Args:
        model: The model that the adapter was trained on, with or without adapters.
        state: The state, unchanged or from `AdapterState.with_tensors`.
        name: The adapter's name in the model.
        trainable: Whether the parameters of an adapter that is added require grad; those of another do not change.

    Raises:
        AdapterError: If the adapters are merged, or the name is none.
        CheckpointError: If the state does not fit the model, or the adapter of that name has another spec, or values
            were changed by other means than `AdapterState.with_tensors`. Nothing has changed then.
    """
    require_types(set_adapter_state, {"model": model, "state": state, "name": name, "trainable": trainable})
    found = read_source(state)
    if is_adapted(model) and name in adapted_root(model)[1].adapters:
        swap_found(model, name, found)
    else:
        add_all(model, {name: found}, Options(trainable=trainable))


def swap_found(model: nn.Module, name: str, found: Found, prefix: str | None = None) -> None:
    """Swap the values of an adapter for those that were read."""
    doing = f"swap {name!r} for {found.where}"
    read: list[AdapterFile] = []

    def fitted(census: Census) -> AdapterFile:
        file = (
            found.file
            if prefix is None
            else with_prefix(found.file, prefix, census.sites_by_fqn, parameter_names(census))
        )
        read.append(without_repeats(census, file))
        return read[0]

    root, state = adapted_root(model)
    require_unrouted(state, name, doing, here=True)  # which would wait for its own end
    with _undisturbed(state, doing), torch.inference_mode(mode=False):
        with opened(model, None) as view:
            values = planned_values(view, name, fitted, doing=doing, advice=ADVICE)
            warn_of_doubts(root, read[0])
            write_values(values)
        state.adapter(name).peft_fields = kept_fields(read[0].fields)


@contextmanager
def _undisturbed(state: ModelState, doing: str) -> Iterator[None]:
    """Run a block while no other thread changes a model, or runs this one."""
    while True:
        with state.forwards.stopped(doing):
            if CHANGING.acquire(blocking=False):
                try:
                    yield
                finally:
                    CHANGING.release()
                return
        with CHANGING:  # wait, while forward passes go on: one may need this itself, to end
            pass

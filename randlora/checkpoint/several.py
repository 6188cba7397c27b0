"""`save_all` and `load_all`: several adapters of a model in one directory, as PEFT lays them out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from randlora.checkpoint.contents import StoredAs
from randlora.checkpoint.load import Options, added
from randlora.checkpoint.save import SaveReport, write_each
from randlora.checkpoint.source import IN_ROOT, Found, locate_all, read_source
from randlora.errors import CheckpointError, raise_collected
from randlora.hints import require_types
from randlora.model.switch import remove
from randlora.model.view import View, opened_to_add
from randlora.report import Report
from randlora.state import SavePretrained, adapted_root
from randlora.targets.match import nearest_names
from randlora.targets.walk import Census


def save_all(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    names: Sequence[str] | None = None,
    bases: StoredAs = "seed",
    push_to_hub: str | None = None,
) -> list[SaveReport]:
    """Save several adapters in one call: each to the directory of its name in ``directory``, as PEFT does.

    The adapter named ``default`` is written to ``directory`` itself, where PEFT has it. All are checked, and on disk,
    before the first file appears. What each consists of is the same as from `randlora.save`.

    Args:
        model: A model with adapters.
        directory: The directory, created if it does not exist. Adapters already in it are replaced if they are named.
        names: The adapters; ``None`` means all.
        bases: As for `randlora.save`.
        push_to_hub: A repository on the Hub, ``"user/repo"``, to upload all of them to, in the same directories.

    Returns:
        A report for each, as from `randlora.save`.

    Raises:
        AdapterError: If the model has no adapter of a name.
        CheckpointError: If one of them cannot be saved, or has no name that a directory can have. Nothing is written
            then.
        OSError: If the disk refuses. Files already there remain as they were, unless it refuses to rename, when
            adapters that are complete remain.
    """
    require_types(save_all, {"model": model, "directory": directory, "names": names, "push_to_hub": push_to_hub})
    root = Path(directory)
    _, state = adapted_root(model)
    chosen = list(state.adapters if names is None else names)
    problems = [f"{name!r} is named twice" for name in dict.fromkeys(chosen) if chosen.count(name) > 1]
    problems += [
        f"{name!r} is no name of a directory: rename the adapter" for name in chosen if Path(name).name != name
    ]
    if not chosen:
        problems.append("no adapter is named")
    raise_collected(CheckpointError, problems, doing=f"save to {str(root)!r}")
    directories = {name: root if name == IN_ROOT else root / name for name in chosen}
    return write_each(model, directories, root, bases=bases, push_to_hub=push_to_hub)


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
    """Load the adapters of a directory that `randlora.save_all` or PEFT wrote into a model: all of them, or none.

    Each has the name of its directory; one that is in ``source`` itself is named ``default``. The first is active if
    the model had no adapter before.

    Args:
        model: The model that the adapters were trained on.
        source: The directory, or a repository on the Hub with such directories.
        names: The adapters to load; ``None`` means all.
        trainable: Whether their parameters require grad.
        revision: Branch, tag or commit of a repository; ``None`` means its main branch.
        prefix: The prefix by which the names in the files and in the model differ, as for `randlora.load`.
        save_pretrained: What the model's method of this name does: see `randlora.inject`.

    Returns:
        A report for each, as from `randlora.load`.

    Raises:
        CheckpointError: If there are none, or none of a name, or one cannot be loaded. The model is then unchanged.
        AdapterError: If a name is taken, or the model's adapters are merged.
    """
    given = {"model": model, "source": source, "names": names, "trainable": trainable, "revision": revision}
    require_types(load_all, given | {"prefix": prefix, "save_pretrained": save_pretrained})
    try:
        directories = locate_all(source, revision)
    except CheckpointError as error:
        raise CheckpointError(f"cannot load {str(source)!r}: {error}") from error
    chosen = list(dict.fromkeys(directories if names is None else names))
    problems = [
        f"there is no adapter named {name!r}; the nearest are {nearest_names(name, directories)}"
        for name in chosen
        if name not in directories
    ]
    raise_collected(CheckpointError, problems, doing=f"load {str(source)!r}")
    found = {name: read_source(directories[name]) for name in chosen}
    return add_all(model, found, Options(trainable=trainable, prefix=prefix, save_pretrained=save_pretrained))


@torch.inference_mode(mode=False)
def add_all(model: nn.Module, found: Mapping[str, Found], options: Options) -> list[Report]:
    """Add adapters that were read to a model under these names: all of them, or none if one cannot be added."""
    reports: list[Report] = []
    with opened_to_add(model, found, "load") as view:
        try:
            for name, each in found.items():
                now = View(view.root, view.state, Census.of(model)) if reports else view
                reports.append(added(now, each, options._replace(name=name)))
        except BaseException:
            for name in reversed([*found][: len(reports)]):
                remove(model, name)
            raise
    return reports

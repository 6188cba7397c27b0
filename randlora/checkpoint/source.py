"""Where an adapter is taken from: a directory, the Hub, or a state in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from randlora.checkpoint.in_memory import AdapterState, file_of
from randlora.checkpoint.peft_config import CONFIG_FILE
from randlora.checkpoint.read import AdapterFile, locate, read_adapter
from randlora.checkpoint.tensors import TENSORS_FILE
from randlora.config import Stream
from randlora.disk.hub import local_path
from randlora.disk.untrusted import is_there
from randlora.errors import CheckpointError
from randlora.modes import without_modes

Source = str | os.PathLike[str] | AdapterState
"""A directory, the safetensors file in it, a repository on the Hub, or what `randlora.adapter_state` returns."""


class Found(NamedTuple):
    """An adapter that was read.

    Attributes:
        file: Its contents.
        where: What it was taken from, for messages.
        rule: How its targets are chosen, for reports.
    """

    file: AdapterFile
    where: str
    rule: str


def read_source(
    source: Source, *, revision: str | None = None, subfolder: str | None = None, stream: Stream | None = None
) -> Found:
    """Read an adapter, without a model.

    Raises:
        CheckpointError: If it cannot be had, or is damaged; the message names it.
    """
    if isinstance(source, AdapterState):
        where = rule = "the state of an adapter"
    else:
        where = repr(str(source))
        rule = f"the names in {f'{subfolder} of ' if subfolder else ''}{source}" + (
            f" at {revision}" if revision else ""
        )
    try:
        if not isinstance(source, AdapterState):
            with without_modes():
                return Found(read_adapter(locate(source, revision, subfolder), stream), where, rule)
        if given := [each for each in (revision, subfolder, stream) if each is not None]:
            raise CheckpointError(f"it has no revision, subfolder or stream, got {given[0]!r}")
        return Found(file_of(source), where, f"the names in {rule}")
    except CheckpointError as error:
        raise CheckpointError(f"cannot load {where}: {error}") from error


IN_ROOT = "default"
"""The name of an adapter whose files are not in a directory of their own, as in PEFT's layout of several."""


def locate_all(source: str | os.PathLike[str], revision: str | None) -> dict[str, Path]:
    """Return the directories of all adapters in a directory, or in a repository on the Hub, by name."""
    files = [f"{folder}{name}" for folder in ("", "*/") for name in (CONFIG_FILE, TENSORS_FILE)]
    return adapters_in(local_path(source, revision, files, are_patterns=True))


def adapters_in(directory: Path) -> dict[str, Path]:
    """Return the directories of the adapters in a directory, by name, in PEFT's layout.

    Each is in a directory of its name, and one may be in the directory itself, which is that named ``default``.

    Raises:
        CheckpointError: If there is none, or there are two of that name.
    """
    paths = sorted(directory.glob(f"*/{TENSORS_FILE}"))
    found = {path.parent.name: path.parent for path in paths if not path.parent.name.startswith(".")}
    if is_there(directory / TENSORS_FILE):
        if IN_ROOT in found:
            raise CheckpointError(f"{str(directory)!r} has two adapters named {IN_ROOT!r}, in it and in {IN_ROOT}/")
        found = {IN_ROOT: directory, **found}
    if not found:
        raise CheckpointError(f"{str(directory)!r} has no adapters: expected directories with {TENSORS_FILE}")
    return found

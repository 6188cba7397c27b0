"""The directory that a verb writes an adapter to: it appears complete or not at all, and nothing is lost unasked."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from randlora.checkpoint.write import Writer, write_together
from randlora.errors import CheckpointError
from randlora.files.staging import staged


def check_output(directory: Path, *, overwrite: bool) -> None:
    """Refuse to write where something is, before any work is done; an empty directory is nothing.

    Raises:
        CheckpointError: When there is something already and ``overwrite`` is false, or a file is in the way.
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file: expected the name of a directory to write to")
    if not overwrite and _is_filled(directory):
        raise CheckpointError(f"{directory} exists and is not empty: choose another name, or ask for overwriting")


def write_output(directory: Path, writers: Mapping[str, Writer]) -> int:
    """Write the files of a directory, together or not at all; those of other names in it stay.

    Args:
        directory: Where; `check_output` passed it.
        writers: By file name, what writes the whole file to the path it is given.

    Returns:
        Bytes of the files.

    Raises:
        OSError: When the disk refuses; then all is as it was.
    """
    if _is_filled(directory):
        write_together(directory, writers)
    else:
        with staged(directory) as scratch:
            write_together(scratch, writers)
    return sum((directory / name).stat().st_size for name in writers)


@contextmanager
def scratch_near(directory: Path) -> Iterator[Path]:
    """Give a block a place for files of its own, on the disk of a directory that need not be there yet."""
    place = next(parent for parent in directory.absolute().parents if parent.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=place) as scratch:
        yield Path(scratch)


def _is_filled(directory: Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())

"""Where an adapter's files are: a directory, one of its files, or a repository on the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from randlora.checkpoint.base_model import is_repo_id
from randlora.checkpoint.hub import download
from randlora.checkpoint.layout import TENSORS_FILE
from randlora.errors import CheckpointError


def locate(source: str | os.PathLike[str], revision: str | None) -> Path:
    """Find the directory that holds an adapter's files; a path that exists wins over a repository of that name.

    Args:
        source: A directory, the tensors' file in it, or a repository, ``"user/repo"``.
        revision: Of a repository: a branch, a tag or a commit.

    Raises:
        CheckpointError: When the file is not the tensors' file, a revision is asked of a path, or the Hub does not
            give the files.
    """
    path = Path(source)
    if not path.exists() and isinstance(source, str) and is_repo_id(source):
        return download(source, revision)
    if revision is not None:
        raise CheckpointError(f"a path has no revision, got {revision!r}: revision= goes with 'user/repo' on the Hub")
    if not path.is_file():
        return path
    if path.name != TENSORS_FILE:
        raise CheckpointError(f"it is a file: expected a directory, or the file {TENSORS_FILE} in one")
    return path.parent

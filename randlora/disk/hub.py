"""The Hugging Face Hub. huggingface_hub is imported only when a repository is named."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TypeGuard

from randlora.disk.formats import is_there
from randlora.errors import CheckpointError, how_to_install

LIBRARY = {"library_name": "randlora", "library_version": version("randlora")}


def is_repo_id(name: str) -> bool:
    """Whether a name has the form of a repository on the Hub, ``"user/repo"``."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None


def is_on_hub(source: object) -> TypeGuard[str]:
    """Whether a source can only mean a repository on the Hub, because there is no such path."""
    return isinstance(source, str) and is_repo_id(source) and not is_there(Path(source))


def require_hub(repo_id: str) -> ModuleType:
    """Return huggingface_hub, or raise a `CheckpointError` if it is not installed."""
    try:
        import huggingface_hub.errors  # noqa: PLC0415  (optional, and no attribute before it is imported)
    except ImportError as error:
        needs = f"{repo_id!r} can only mean a repository on the Hub, which needs huggingface_hub"
        raise CheckpointError(f"{needs}: {how_to_install('hub')}") from error
    return huggingface_hub


def local_path(
    source: str | os.PathLike[str], revision: str | None, files: Sequence[str], *, are_patterns: bool = False
) -> Path:
    """Return a path unchanged, or a directory with files of a repository; patterns, with ``*``, need not match."""
    if not is_on_hub(source):
        if revision is not None:
            raise CheckpointError(f"a path has no revision, got {revision!r} for {str(source)!r}: only repositories do")
        return Path(source)
    library = require_hub(source)
    where = f"the Hub's repository {source!r}" + (f" at revision {revision!r}" if revision else "")
    with _explaining(library, f"there is no such path, and {where} cannot be downloaded"):
        cached = library.is_offline_mode()  # older ones ask the Hub for a commit's files all the same
        found = library.snapshot_download(
            source, revision=revision, allow_patterns=[*files], local_files_only=cached, **LIBRARY
        )
    missing = [name for name in files if not are_patterns and not Path(found, name).is_file()]
    if missing:
        raise CheckpointError(f"the repository {source!r} has no {' and no '.join(missing)}: name a different one")
    return Path(found)


def has_file(repo_id: str, revision: str, file: str) -> bool:
    """Whether a repository has a file."""
    library = require_hub(repo_id)
    with _explaining(library, f"cannot ask whether the Hub's repository {repo_id!r} has {file}"):
        return bool(library.HfApi(**LIBRARY).file_exists(repo_id, file, revision=revision))


def read_header(repo_id: str, revision: str, file: str) -> tuple[list[tuple[str, str, list[int]]], dict[str, str]]:
    """Return name, dtype and shape of each tensor of a file in a repository, in order, and the metadata, by itself."""
    library = require_hub(repo_id)
    with _explaining(library, f"the header of {file} in the Hub's repository {repo_id!r} cannot be downloaded"):
        header = library.HfApi(**LIBRARY).parse_safetensors_file_metadata(repo_id, file, revision=revision)
        in_order = sorted(header.tensors.items(), key=lambda item: item[1].data_offsets)
        if not all(type(size) is int and size >= 0 for _, tensor in in_order for size in tensor.shape):
            raise ValueError("its shapes are not all integers")
    return [(name, tensor.dtype, tensor.shape) for name, tensor in in_order], header.metadata


def upload(
    directory: Path, repo_id: str, files: Sequence[str], generated: Sequence[str], may_replace: Callable[[Path], bool]
) -> str:
    """Upload files to a repository, and ``generated`` ones where they ``may_replace`` those there; return its URL."""
    library, allowed = require_hub(repo_id), [*files]
    api = library.HfApi(**LIBRARY)
    with _explaining(library, f"saved to {str(directory)!r} completely, but cannot push to {repo_id!r}"):
        url = api.create_repo(repo_id, exist_ok=True)
        for name in generated:
            try:
                is_allowed = may_replace(Path(library.hf_hub_download(repo_id, name, **LIBRARY)))
            except library.errors.EntryNotFoundError:
                is_allowed = True
            allowed += [name] * is_allowed
        message = "Upload a RandLoRA adapter"
        api.upload_folder(repo_id=repo_id, folder_path=directory, allow_patterns=allowed, commit_message=message)
    return str(url)


@contextmanager
def _explaining(library: ModuleType, failed: str) -> Iterator[None]:
    """Raise a `CheckpointError` for any error of the Hub, with what to do and the first lines of its message."""
    errors, log_in = library.errors, "log in with `hf auth login`"
    advice = (
        (errors.GatedRepoError, f"it is gated: ask for access on its page, then {log_in}"),
        (errors.RepositoryNotFoundError, f"check its name; if it is private, {log_in}"),
        (errors.RevisionNotFoundError, "it has no such revision: name a branch, a tag or a commit of it"),
        (errors.LocalEntryNotFoundError, "it is not in the cache: check the connection, and HF_HUB_OFFLINE"),
        (errors.EntryNotFoundError, "it has no such file"),
        (errors.HfHubHTTPError, f"the Hub refuses: {log_in}, with a token that has this permission"),
        (Exception, "check the name, the connection, and HF_HUB_OFFLINE"),
    )
    try:
        yield
    except Exception as error:  # the library's own, and whatever its HTTP client raises
        what_to_do = next(text for kind, text in advice if isinstance(error, kind))
        said = " ".join([line for line in str(error).splitlines() if line][:2])
        raise CheckpointError(f"{failed}: {what_to_do} ({type(error).__name__}: {said})") from error

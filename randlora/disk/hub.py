"""The Hugging Face Hub. huggingface_hub is imported only when a repository is named."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TypeGuard

from randlora.disk.formats import is_there
from randlora.errors import CheckpointError, how_to_install

REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
LIBRARY = {"library_name": "randlora", "library_version": version("randlora")}


def is_repo_id(name: str) -> bool:
    """Whether a name has the form of a repository on the Hub, ``"user/repo"``."""
    return REPO_ID.fullmatch(name) is not None


def is_on_hub(source: object) -> TypeGuard[str]:
    """Whether a source can only mean a repository on the Hub, because there is no such path."""
    return isinstance(source, str) and is_repo_id(source) and not is_there(Path(source))


def require_hub(repo_id: str) -> ModuleType:
    """Return huggingface_hub, or raise a `CheckpointError` if it is not installed."""
    try:
        import huggingface_hub  # noqa: PLC0415  (optional)
    except ImportError as error:
        raise CheckpointError(
            f"{repo_id!r} can only mean a repository on the Hub, which needs huggingface_hub: {how_to_install('hub')}"
        ) from error
    return huggingface_hub


@contextmanager
def offline() -> Iterator[None]:
    """Within the block, keep all threads from contacting the Hub, if huggingface_hub is installed."""
    try:
        from huggingface_hub import constants  # noqa: PLC0415  (optional)
    except ImportError:
        yield
        return
    flags = vars(constants)
    before = flags["HF_HUB_OFFLINE"]
    flags["HF_HUB_OFFLINE"] = True
    try:
        yield
    finally:
        flags["HF_HUB_OFFLINE"] = before


def local_path(
    source: str | os.PathLike[str], revision: str | None, files: Sequence[str], *, are_patterns: bool = False
) -> Path:
    """Return a path unchanged, or the directory to which `download` brings the files of a repository."""
    if is_on_hub(source):
        return download(source, revision, files, are_patterns=are_patterns)
    if revision is not None:
        raise CheckpointError(
            f"a path has no revision, got {revision!r} for {str(source)!r}: only a repository on the Hub has one"
        )
    return Path(source)


def download(repo_id: str, revision: str | None, files: Sequence[str], *, are_patterns: bool = False) -> Path:
    """Download files of a repository, or find them in the local cache, and return their directory.

    If ``files`` are patterns, with ``*``, none need match.
    """
    library = require_hub(repo_id)
    try:
        cached = library.is_offline_mode()  # older ones ask the Hub for a commit's files all the same
        found = library.snapshot_download(
            repo_id, revision=revision, allow_patterns=[*files], local_files_only=cached, **LIBRARY
        )
    except Exception as error:  # the library's own, and whatever its HTTP client raises
        what = f"the Hub's repository {repo_id!r}" + (f" at revision {revision!r}" if revision else "")
        raise CheckpointError(
            f"there is no such path, and {what} cannot be downloaded: {_cause(library, error)}"
        ) from error
    missing = [name for name in files if not are_patterns and not Path(found, name).is_file()]
    if missing:
        raise CheckpointError(
            f"the Hub's repository {repo_id!r} has no {' and no '.join(missing)}: name a different repository"
        )
    return Path(found)


def read_header(repo_id: str, revision: str, file: str) -> tuple[list[tuple[str, str, list[int]]], dict[str, str]]:
    """Return name, dtype and shape of each tensor of a safetensors file in a repository, in order, and the metadata.

    Only the header is requested.
    """
    library = require_hub(repo_id)
    try:
        header = library.HfApi(**LIBRARY).parse_safetensors_file_metadata(repo_id, file, revision=revision)
        in_order = sorted(header.tensors.items(), key=lambda item: item[1].data_offsets)
        if not all(type(size) is int and size >= 0 for _, tensor in in_order for size in tensor.shape):
            raise ValueError("its shapes are not all integers")
    except Exception as error:  # the library's own, and whatever its HTTP client raises
        raise CheckpointError(
            f"the header of {file} in the Hub's repository {repo_id!r} cannot be downloaded: {_cause(library, error)}"
        ) from error
    return [(name, tensor.dtype, tensor.shape) for name, tensor in in_order], header.metadata


def upload(
    directory: Path,
    repo_id: str,
    files: Sequence[str],
    *,
    message: str,
    generated: Mapping[str, Callable[[Path], bool]],
) -> tuple[str, list[str]]:
    """Upload files of a directory to a repository, which is created if it does not exist, and return its URL.

    Each of the ``generated`` files is uploaded too, unless the repository has one that its function refuses to replace.
    The names of these are returned with the URL.
    """
    library = require_hub(repo_id)
    api = library.HfApi(**LIBRARY)
    try:
        url = api.create_repo(repo_id, exist_ok=True)
        kept = []
        for name, may_replace in generated.items():
            with suppress(library.errors.EntryNotFoundError):
                if not may_replace(Path(library.hf_hub_download(repo_id, name, **LIBRARY))):
                    kept.append(name)
        replaced = generated.keys() - kept
        api.upload_folder(
            repo_id=repo_id, folder_path=directory, allow_patterns=[*files, *replaced], commit_message=message
        )
    except Exception as error:  # the library's own, and whatever its HTTP client raises
        raise CheckpointError(
            f"saved to {str(directory)!r} completely, but cannot push to {repo_id!r}: {_cause(library, error)}"
        ) from error
    return str(url), kept


def _cause(library: ModuleType, error: Exception) -> str:
    """Return what to do about an error of the Hub, and the first lines of its message."""
    errors = library.errors
    advice = (
        (errors.GatedRepoError, "it is gated: ask for access on its page, then log in with `hf auth login`"),
        (errors.RepositoryNotFoundError, "check its name; if it is private, log in with `hf auth login`"),
        (errors.RevisionNotFoundError, "it has no such revision: name a branch, a tag or a commit of it"),
        (errors.LocalEntryNotFoundError, "it is not in the cache: check the connection, and HF_HUB_OFFLINE"),
        (errors.EntryNotFoundError, "it has no such file"),
        (errors.HFValidationError, "the Hub does not allow such a name"),
        (errors.HfHubHTTPError, "the Hub refuses: log in with `hf auth login`, with a token that has this permission"),
        (Exception, "check the connection, and HF_HUB_OFFLINE"),
    )
    what_to_do = next(text for kind, text in advice if isinstance(error, kind))
    said = " ".join([line for line in str(error).splitlines() if line][:2])
    return f"{what_to_do} ({type(error).__name__}: {said})"

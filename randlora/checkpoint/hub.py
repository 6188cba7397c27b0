"""The Hugging Face Hub through its own library, which is imported when a repository is named and not before."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from randlora.checkpoint.base_model import is_repo_id
from randlora.checkpoint.card import is_ours
from randlora.checkpoint.layout import CARD_FILE, CONFIG_FILE, TENSORS_FILE
from randlora.errors import CheckpointError


def download(repo_id: str, revision: str | None) -> Path:
    """Get an adapter's two files, from the local cache where they are in it.

    Args:
        repo_id: The repository, ``"user/repo"``.
        revision: A branch, a tag or a commit; ``None`` means the main branch.

    Returns:
        The directory of the cache that holds them.

    Raises:
        CheckpointError: When they cannot be had, with the cause and what to do.
    """
    library = _library(repo_id)
    try:
        found = library.snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=[CONFIG_FILE, TENSORS_FILE],
            library_name="randlora",
            library_version=version("randlora"),
        )
    except Exception as error:  # the library's own, and whatever its HTTP client raises
        what = f"the Hub's repository {repo_id!r}" + (f" at revision {revision!r}" if revision else "")
        raise CheckpointError(f"there is no such path, and {what} cannot be had: {_cause(library, error)}") from error
    directory = Path(found)
    if missing := [name for name in (CONFIG_FILE, TENSORS_FILE) if not (directory / name).is_file()]:
        raise CheckpointError(
            f"the Hub's repository {repo_id!r} has no {' and no '.join(missing)}: it holds no adapter"
        )
    return directory


def upload_problems(repo_id: str | None) -> list[str]:
    """Say why an upload could not even begin, before anything is written."""
    if repo_id is None:
        return []
    if not isinstance(repo_id, str) or not is_repo_id(repo_id):
        return [f"push_to_hub must be a repository on the Hub, 'user/repo', got {repo_id!r}"]
    try:
        _library(repo_id)
    except CheckpointError as error:
        return [str(error)]
    return []


def upload(directory: Path, repo_id: str) -> str:
    """Upload a saved adapter, and make its repository if it is missing.

    A model card that somebody wrote in the repository is not replaced by a generated one.

    Returns:
        The repository's address.

    Raises:
        CheckpointError: When the Hub refuses or cannot be reached, with the cause and what to do.
    """
    library = _library(repo_id)
    api = library.HfApi(library_name="randlora", library_version=version("randlora"))
    files = [CONFIG_FILE, TENSORS_FILE]
    try:
        address = api.create_repo(repo_id, exist_ok=True)
        if not (is_ours(directory / CARD_FILE) and _has_own_card(library, api, repo_id)):
            files.append(CARD_FILE)
        api.upload_folder(
            repo_id=repo_id, folder_path=directory, allow_patterns=files, commit_message="Upload a RandLoRA adapter"
        )
    except Exception as error:  # the library's own, and whatever its HTTP client raises
        raise CheckpointError(
            f"saved to {str(directory)!r}, whole, but cannot push to {repo_id!r}: {_cause(library, error)}"
        ) from error
    return str(address)


def _library(repo_id: str) -> ModuleType:
    try:
        import huggingface_hub  # noqa: PLC0415  (optional)
    except ImportError as error:
        raise CheckpointError(
            f"{repo_id!r} can only mean a repository on the Hub, which takes huggingface_hub: "
            "install randlora with its extra, randlora[hub]"
        ) from error
    return huggingface_hub


def _has_own_card(library: ModuleType, api: Any, repo_id: str) -> bool:
    try:
        card = api.hf_hub_download(repo_id, CARD_FILE)
    except library.errors.EntryNotFoundError:
        return False
    return not is_ours(Path(card))


def _cause(library: ModuleType, error: Exception) -> str:
    """Say what to do, and what the library said first."""
    errors = library.errors
    advice = (
        (errors.GatedRepoError, "it is gated: ask for access on its page, then log in with `hf auth login`"),
        (errors.RepositoryNotFoundError, "check its name; if it is private, log in with `hf auth login`"),
        (errors.RevisionNotFoundError, "it has no such revision: name a branch, a tag or a commit of it"),
        (errors.LocalEntryNotFoundError, "it is not in the cache: check the connection, and HF_HUB_OFFLINE"),
        (errors.HFValidationError, "the Hub allows no such name"),
        (errors.HfHubHTTPError, "the Hub refuses: log in with `hf auth login`, with a token that may do this"),
        (Exception, "check the connection, and HF_HUB_OFFLINE"),
    )
    what_to_do = next(text for kind, text in advice if isinstance(error, kind))
    said = " ".join([line for line in str(error).splitlines() if line][:2])
    return f"{what_to_do} ({type(error).__name__}: {said})"

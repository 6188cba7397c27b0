"""Names of base models: what a model calls itself, what a file says it was trained on, and whether the two agree."""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
CACHED = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]")
"""Where huggingface_hub keeps a repository: a model that was loaded from there by its path is called by that path."""


def is_repo_id(name: str) -> bool:
    """Whether a name has the form of a repository on the Hub, ``"user/repo"``."""
    return REPO_ID.fullmatch(name) is not None


def base_model_name(model: nn.Module, written: object = None) -> str | None:
    """Name the model that an adapter belongs to.

    Args:
        model: The model, which may note where it came from, as those of transformers do.
        written: The name in the file that the adapter was loaded from; kept where it says the same as the model's own.
    """
    known = written if isinstance(written, str) and written else None
    own = _own_name(model)
    return known if own is None or (known and is_same_model(known, own)) else own


def is_same_model(one: str, other: str) -> bool:
    """Whether two names may mean the same model.

    Two repositories are told apart by their whole names. A path is one's own affair: only its last component counts.
    """
    first, second = _normalized(one), _normalized(other)
    if is_repo_id(first) and is_repo_id(second):
        return first == second
    return _last(first) == _last(second)


def mismatch(model: nn.Module, written: object) -> str | None:
    """Say that a model is not the one that a file's adapter was trained on; ``None`` where it is, or nobody knows."""
    own = _own_name(model)
    if own is None or not isinstance(written, str) or not written or is_same_model(written, own):
        return None
    return (
        f"the adapter was trained on {written!r}, and this model is {own!r}: "
        "what it computes is wrong unless both have the same weights"
    )


def repo_of(name: str | None) -> str | None:
    """Return the repository on the Hub that a base model's name means; ``None`` for a path, which is of one machine."""
    if name is None:
        return None
    if found := CACHED.search(name):
        return found[1].replace("--", "/")
    return name if is_repo_id(name) and not Path(name).exists() else None


def _own_name(model: nn.Module) -> str | None:
    holders = (getattr(model, "config", None), model)
    names = (getattr(holder, field, None) for holder in holders for field in ("_name_or_path", "name_or_path"))
    return next((name for name in names if isinstance(name, str) and name), None)


def _normalized(name: str) -> str:
    return (repo_of(name) or name).rstrip("/\\").casefold()


def _last(name: str) -> str:
    return re.split(r"[/\\]", name)[-1]

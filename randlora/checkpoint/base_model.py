"""The model that an adapter belongs to: its name, and `ModelClass`, its class with the labels, which the header has.

A name in a file is looked up among the names that a library exports, and nothing is imported because a file names it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from randlora.disk.hub import is_repo_id
from randlora.disk.untrusted import is_there
from randlora.layers.in_place import plain_class

LIBRARIES = ("transformers", "sentence_transformers")
"""Libraries whose classes are recorded, if they export them: another program finds those by name."""

CACHED = re.compile(r"(?:^|[/\\])models--([^/\\]+)[/\\]snapshots[/\\]")
"""A path in the cache of huggingface_hub, which is the name of a model that was loaded by this path."""


@dataclass(frozen=True)
class ModelClass:
    """The class of a model, and what its config says of a head's outputs.

    Attributes:
        library: The package that exports it.
        name: Its name, such as ``"BertForSequenceClassification"``.
        labels: The names of the outputs, in order, if parameters were trained with the adapter, such as a head.
        problem_type: The ``problem_type`` in the config: which loss it was trained with.
    """

    library: str
    name: str
    labels: tuple[str, ...] | None = None
    problem_type: str | None = None

    @classmethod
    def of(cls, model: nn.Module, *, has_trained: bool) -> ModelClass | None:
        """Return the class of a model, or ``None`` if no library exports it; with labels if parameters are trained."""
        # `fully_shard` changes the class too
        kind = next(kind for kind in plain_class(model).__mro__ if not kind.__module__.startswith("torch."))
        library = kind.__module__.partition(".")[0]
        if library not in LIBRARIES or getattr(sys.modules.get(library), kind.__name__, None) is not kind:
            return None
        config = getattr(model, "config", None) if has_trained else None
        return cls(library, kind.__name__, _labels(config), _text(getattr(config, "problem_type", None)))

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> ModelClass:
        """Build one from the result of `to_dict`."""
        labels = facts.get("labels")
        return cls(
            facts["library"], facts["name"], None if labels is None else tuple(labels), facts.get("problem_type")
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are known as JSON-serializable values."""
        labels = None if self.labels is None else [*self.labels]
        facts = {"library": self.library, "name": self.name, "labels": labels, "problem_type": self.problem_type}
        return {name: value for name, value in facts.items() if value is not None}

    @property
    def config_fields(self) -> dict[str, Any]:
        """The fields of a config of transformers that a model with these labels has."""
        fields: dict[str, Any] = {} if self.problem_type is None else {"problem_type": self.problem_type}
        if self.labels is not None:
            fields["id2label"] = dict(enumerate(self.labels))
            fields["label2id"] = {label: index for index, label in enumerate(self.labels)}
        return fields


def _labels(config: object) -> tuple[str, ...] | None:
    found = getattr(config, "id2label", None)
    if not isinstance(found, dict) or sorted(found) != [*range(len(found))]:
        return None
    labels = tuple(found[index] for index in range(len(found)))
    return labels if all(isinstance(label, str) for label in labels) else None


def _text(found: object) -> str | None:
    return found if isinstance(found, str) else None


def base_model_name(model: nn.Module, written: object = None) -> str | None:
    """Return the name of the model that an adapter belongs to.

    The name in the file that the adapter was loaded from, ``written``, is kept if it means the same model.
    """
    known = written if isinstance(written, str) and written else None
    own = name_of(model)
    return known if own is None or (known and is_same_model(known, own)) else own


def is_same_model(one: str, other: str) -> bool:
    """Return whether two names may mean the same model.

    The names of two repositories are compared whole. Of a path, only the last component counts.
    """
    first, second = ((repo_of(name) or name).rstrip("/\\").casefold() for name in (one, other))
    if is_repo_id(first) and is_repo_id(second):
        return first == second
    return re.split(r"[/\\]", first)[-1] == re.split(r"[/\\]", second)[-1]


def mismatch(model: nn.Module, written: object) -> str | None:
    """Return a warning if a model is not the one that an adapter was trained on, ``None`` if it is or is not known."""
    own = name_of(model)
    if own is None or not isinstance(written, str) or not written or is_same_model(written, own):
        return None
    return (
        f"the adapter was trained on {written!r}, and this model is {own!r}: "
        "what it computes is wrong unless both have the same weights"
    )


def trained_on_another(model: nn.Module, fields: Mapping[str, Any], recorded: ModelClass | None) -> str:
    """Return what an adapter was trained on, and what a model is, as a phrase after "fit the adapter".

    Args:
        model: A model that the adapter may not fit.
        fields: Those of the adapter's ``adapter_config.json``.
        recorded: The class in the adapter's header.
    """
    mapping = fields.get("auto_mapping")
    written = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    theirs = recorded.name if recorded else written, fields.get("base_model_name_or_path")
    own = plain_class(model).__name__, name_of(model)
    is_other_class = isinstance(theirs[0], str) and theirs[0] != own[0]
    if not is_other_class and mismatch(model, theirs[1]) is None:
        return " to this model"
    known = " of ".join(name for name in theirs if isinstance(name, str) and name)
    return f", trained on {known}, to this {' of '.join(name for name in own if name)}"


def is_own_directory(model: nn.Module, directory: Path) -> bool:
    """Whether a directory is the one that the model was loaded from."""
    own = name_of(model)
    return own is not None and is_there(Path(own)) and is_there(directory) and Path(own).samefile(directory)


def repo_of(name: str | None) -> str | None:
    """Return the repository on the Hub that a base model's name means, or ``None`` for a local path."""
    if name is None:
        return None
    if found := CACHED.search(name):
        return found[1].replace("--", "/")
    return name if is_repo_id(name) and not is_there(Path(name)) else None


def name_of(model: nn.Module) -> str | None:
    """Return the name or the directory that a model was loaded by, if it says that."""
    holders = (getattr(model, "config", None), model)
    names = (getattr(holder, field, None) for holder in holders for field in ("_name_or_path", "name_or_path"))
    return next((name for name in names if isinstance(name, str) and name), None)

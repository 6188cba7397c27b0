"""`ModelClass`: the class of the model that an adapter was trained on, and its labels, which the header has.

A name in a file is looked up among the names that a library exports, and nothing is imported because a file names it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from randlora.layers.in_place import plain_class

LIBRARIES = ("transformers", "sentence_transformers")
"""Libraries whose classes are recorded, if they export them: another program finds those by name."""


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

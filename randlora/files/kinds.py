"""What kind of layer a matrix in a checkpoint belongs to, as far as its name, its shape and the config tell."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from typing import Any

CONV1D_NAMES: dict[str, frozenset[str]] = dict.fromkeys(
    ("gpt2", "openai-gpt", "imagegpt", "decision_transformer"), frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
)
"""By model type, the last components of layers that are transformers' ``Conv1D``."""

EMBEDDING_NAMES = frozenset({"wte", "wpe", "shared", "relative_attention_bias", "tokens_embed", "positions_embed"})
_EMBEDDING_WORD = re.compile(r"(^|_)embed(s|ding|dings|_tokens|_positions|_in)?$|embeddings?$")
_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
_HEAD_WORD = re.compile(r"head|out|decoder|score|classifier|predict")
_SLACK = 2  # some models keep rows of positions for padding


class Kind(Enum):
    """A layer with a matrix called ``weight``."""

    LINEAR = "linear"
    CONV1D = "Conv1D"
    EMBEDDING = "embedding"
    ATTENTION_OUTPUT = "output of nn.MultiheadAttention"


def kind_of(fqn: str, parameters: Collection[str], around: Collection[str], model_type: str | None) -> Kind:
    """Tell the kind of a layer whose ``weight`` is a matrix.

    Args:
        fqn: The layer's name.
        parameters: Names of its parameters; an embedding has nothing beside its ``weight``.
        around: Names of the parameters of the module that holds it.
        model_type: The model's.
    """
    last = fqn.rsplit(".", 1)[-1]
    if last == "out_proj" and "in_proj_weight" in around:
        return Kind.ATTENTION_OUTPUT
    if is_conv1d(fqn, model_type):
        return Kind.CONV1D
    is_named_so = last in EMBEDDING_NAMES or _EMBEDDING_WORD.search(last) is not None
    return Kind.EMBEDDING if is_named_so and "bias" not in parameters else Kind.LINEAR


def is_conv1d(fqn: str, model_type: str | None) -> bool:
    """Whether a layer is transformers' ``Conv1D``, whose weight is stored ``(in_features, out_features)``.

    Args:
        fqn: The layer's name.
        model_type: The model's.
    """
    return fqn.rsplit(".", 1)[-1] in CONV1D_NAMES.get(model_type or "", ())


def doubt(fqn: str, kind: Kind, shape: tuple[int, ...], config: Mapping[str, Any]) -> str | None:
    """Say why the kind of a layer is doubtful, or ``None``.

    Args:
        fqn: The layer's name.
        kind: What it is taken for.
        shape: Of its ``weight``.
        config: What ``config.json`` holds.
    """
    if _EXPERT.search(fqn):
        return "a linear layer of an expert, where newer versions of transformers hold all experts in one parameter"
    rows = shape[0]
    if kind is Kind.LINEAR and rows == config.get("vocab_size") and not _HEAD_WORD.search(fqn):
        return f"a linear layer by its name, though it has a row for each of the {rows} words"
    if kind is Kind.EMBEDDING and config and not any(rows - _SLACK <= size <= rows for size in _sizes(config)):
        return f"an embedding by its name, though nothing in config.json has its {rows} rows"
    return None


def _sizes(config: Mapping[str, Any]) -> Iterator[int]:
    """Go through the whole numbers of a config and of those inside it."""
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _sizes(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield value

"""What the values of an adapter must be, in a file and in a model that is saved: whole, floating and finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

GATHER = {
    "ds_id": "DeepSpeed's ZeRO-3: save inside deepspeed.zero.GatheredParameters([*model.parameters()])",
    "_fsdp_flattened": "FSDP: save inside FullyShardedDataParallel.summon_full_params(model)",
}
"""What to do about parameters that were sharded and are plain tensors still, by an attribute that the sharder sets."""


class Value(NamedTuple):
    """A parameter to save, and the shape that it must have."""

    parameter: Tensor
    shape: Sequence[int]


def flaw(tensor: Tensor) -> str | None:
    """Return why no file may hold these values, as a phrase that follows the name, or ``None``."""
    if tensor.dtype not in FLOATING:
        return f"holds {tensor.dtype}: expected one of {', '.join(map(str, FLOATING))}"
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):  # in no further memory
        return "holds NaN or infinite values"
    return None


def is_text(name: str) -> bool:
    """Whether a name can be written to a file: Python's strings may hold half of a character."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def save_problems(values: Mapping[str, Value]) -> list[str]:
    """Return which of the values, by name, cannot be saved: they are not here, not whole, or not what `load` reads."""
    problems = {name: _save_problem(*value) for name, value in values.items()}
    return [f"{name} {problem}" for name, problem in problems.items() if problem is not None]


def _save_problem(tensor: Tensor, shape: Sequence[int]) -> str | None:
    if tensor.is_meta:
        return "holds no values to save (meta): materialize the model first"
    if type(tensor.data) is not Tensor:
        return f"is sharded, a {type(tensor.data).__name__}: gather it first"
    is_freed = tensor.untyped_storage().nbytes() < tensor.nbytes
    if is_freed or tuple(tensor.shape) != tuple(shape):
        found = "no memory" if is_freed else f"shape {tuple(tensor.shape)}"
        advice = next((advice for attribute, advice in GATHER.items() if attribute in vars(tensor)), None)
        remedy = f"it is sharded by {advice}" if advice else "gather it if it is sharded, else adapt the model anew"
        return f"has {found} here, expected all of {tuple(shape)}: {remedy}"
    reason = flaw(tensor)
    return reason and f"{reason}, which cannot be loaded: go back to values from before"

"""The capability table: one row per kind of layer that can be adapted. Every law runs over every row."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class LayerKind:
    """How to make a layer of one kind with random weights, and how to read it.

    Attributes:
        name: For test ids.
        build: Makes a layer from ``(in_features, out_features, bias, dtype)``.
        weight: Reads its weight as ``(out_features, in_features)``.
        dtypes: What it can hold.
    """

    name: str
    build: Callable[[int, int, bool, torch.dtype], nn.Module]
    weight: Callable[[nn.Module], Tensor]
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _linear(in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> nn.Module:
    return nn.Linear(in_features, out_features, bias=bias, dtype=dtype)


def _conv1d(in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> nn.Module:
    layer = Conv1D(out_features, in_features)
    nn.init.normal_(layer.weight, std=0.3)
    nn.init.normal_(layer.bias)
    if not bias:
        nn.init.zeros_(layer.bias)
    converted: nn.Module = layer.to(dtype)
    return converted


LAYER_KINDS = (
    LayerKind("Linear", _linear, lambda layer: layer.get_parameter("weight").detach()),
    LayerKind("Conv1D", _conv1d, lambda layer: layer.get_parameter("weight").detach().T),
)

every_kind = pytest.mark.parametrize("kind", LAYER_KINDS, ids=lambda kind: kind.name)
every_kind_and_dtype = pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, dtype) for kind in LAYER_KINDS for dtype in kind.dtypes],
    ids=lambda value: value.name if isinstance(value, LayerKind) else str(value).removeprefix("torch."),
)

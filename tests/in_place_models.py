"""Models for the laws of adapting in place: of every kind of layer, and with weights that other code reads."""

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.layers import registry
from randlora.readers.read_weight import ReadWeight
from tests.kit import fill
from tests.layer_kinds import LayerKind

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


class Tables(nn.Module):
    """Two weights on one owner, whose own forward reads both; the second is stored ``(in_features, out_features)``."""

    def __init__(self, in_features: int = 12, out_features: int = 20, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(out_features, in_features, dtype=dtype) * 0.3)
        self.turned = nn.Parameter(torch.randn(out_features, in_features, dtype=dtype) * 0.3)
        self.scale = nn.Parameter(torch.ones(in_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = torch.tanh(x @ self.table.T) @ self.turned * self.scale
        return output


class TableReader(ReadWeight):
    attribute = "table"

    @staticmethod
    def features(owner: nn.Module) -> tuple[int, int]:
        out_features, in_features = owner._parameters["table"].shape  # type: ignore[union-attr]
        return in_features, out_features

    @staticmethod
    def in_storage_layout(delta: Tensor) -> Tensor:
        return delta


class TurnedReader(TableReader):
    attribute = "turned"
    features = staticmethod(lambda owner: tuple(owner._parameters["turned"].shape))
    in_storage_layout = staticmethod(lambda delta: delta.T)


class Reading(nn.Module):
    """A parent that reads its child's weights and never calls the child, then a layer and the child itself."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.read = Tables(dtype=dtype)
        self.called = Tables(dtype=dtype)
        self.linear = nn.Linear(12, 12, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(x @ self.read.table.T) @ self.read.turned
        output: Tensor = self.linear(self.called(x))
        return output


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the weights of `Tables` be adapted until the test is over."""
    monkeypatch.setattr(registry, "_readers", dict(registry._readers))
    randlora.layers.register_layer(Tables)(TableReader)
    randlora.layers.register_layer(Tables)(TurnedReader)


def of_kind(kind: LayerKind) -> nn.Sequential:
    layer, dtype = kind.build(12, 12, True, kind.exact), kind.exact
    return nn.Sequential(layer, nn.Sequential(layer, nn.LayerNorm(12, dtype=dtype)), kind.build(12, 20, True, dtype))


def adapt(model: nn.Module) -> nn.Module:
    randlora.inject(model, r=3, targets="all-linear", stream="portable")
    return fill(model)


def given(kind: LayerKind) -> Tensor:
    return X.to(kind.exact)

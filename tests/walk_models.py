"""A small model to find layers in, the names of its linear layers, and what was found."""

from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from randlora.targets.select import find_targets


class Attention(nn.Module):
    """Three layers, two of which have names that end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.v_proj = nn.Linear(6, 3)
        self.proj = nn.Linear(6, 6)
        self.register_module("dropout", None)


class Model(nn.Module):
    """Two blocks between a bag of embeddings, which no adapter layer adapts, and a head."""

    def __init__(self, model_type: str | None = None, head: str = "head") -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type=model_type)
        self.embed = nn.EmbeddingBag(10, 6)
        blocks = ({"attention": Attention(), "norm": nn.LayerNorm(6), "up": Conv1D(12, 6)} for _ in range(2))
        self.layers = nn.ModuleList(map(nn.ModuleDict, blocks))
        self.add_module(head, nn.Linear(6, 10))


LINEAR = [f"layers.{i}.{name}" for i in (0, 1) for name in (*(f"attention.{p}proj" for p in ("q_", "v_", "")), "up")]


def found(model: nn.Module, pattern: Any = None, exclude: Any = None) -> list[str]:
    return [target.fqn for target in find_targets(model, pattern, exclude)]

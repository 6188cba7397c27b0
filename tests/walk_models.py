"""A small model to find layers in, the names of its linear layers, and what was found."""

from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from randlora.targets.select import find_targets


class Attention(nn.Module):
    """Four layers, two of which have names that end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.v_proj = nn.Linear(6, 3)
        self.proj = nn.Linear(6, 6)
        self.register_module("dropout", None)


class Block(nn.Module):
    """Attention, a norm and a feed-forward layer stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.norm = nn.LayerNorm(6)
        self.up = Conv1D(12, 6)


class Model(nn.Module):
    """Two blocks between a bag of embeddings, which no adapter layer adapts, and a head."""

    def __init__(self, model_type: str | None = None, head: str = "head") -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type=model_type)
        self.embed = nn.EmbeddingBag(10, 6)
        self.layers = nn.ModuleList([Block(), Block()])
        self.add_module(head, nn.Linear(6, 10))


LINEAR = [
    f"layers.{index}.{name}"
    for index in (0, 1)
    for name in ("attention.q_proj", "attention.v_proj", "attention.proj", "up")
]


def found(model: nn.Module, pattern: Any = None, exclude: Any = None) -> list[str]:
    return [target.fqn for target in find_targets(model, pattern, exclude)]

"""The table of attention modules that the laws of `nn.MultiheadAttention` range over."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.config import InProj
from tests.kit import fill

WIDTH = 12
PACKED = ("attn.in_proj_weight", "attn.out_proj")
SEPARATE = ("attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight", "attn.out_proj")


class Attending(nn.Module):
    """A module that calls attention; ``context`` has the widths of keys and values, if they are not those of ``x``."""

    def __init__(self, attn: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor, *context: Tensor, **options: Any) -> Tensor:
        """Map ``(2, 5, 12)`` to the same."""
        keys, values = context or (x, x)
        output: Tensor = self.attn(x, keys, values, **{"need_weights": False, **options})[0]
        return output


class Subclass(nn.MultiheadAttention):
    """An attention of one's own, as many models have."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the base class does."""
        return super().forward(*args, **kwargs)


@dataclass(frozen=True)
class AttentionKind:
    """A form of attention, with what ``targets="all-linear"`` adapts, and keys' and values' widths if others."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    sites: tuple[str, ...] = PACKED
    in_proj: InProj = "packed"
    build: Callable[..., nn.MultiheadAttention] = nn.MultiheadAttention
    context: tuple[int, ...] = ()

    def plain(self, dtype: torch.dtype = torch.float64) -> Attending:
        """Make a model with random weights, always the same."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Attending(self.build(WIDTH, **{"num_heads": 2, "batch_first": True, **self.options}))
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.3)
        return model.to(dtype)

    def adapted(
        self, dtype: torch.dtype = torch.float64, *, filled: bool = True, name: str = "default", **options: Any
    ) -> Attending:
        """Make the same model with an adapter of all its weights."""
        model = self.plain(dtype)
        randlora.inject(model, r=3, alpha=6, in_proj=self.in_proj, stream="portable", name=name, **options)
        return fill(model, name, spread=0.2) if filled else model

    def inputs(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """Make a batch of two sequences of five tokens."""
        generator = torch.Generator().manual_seed(1)
        widths = (WIDTH, *self.context)
        return tuple(torch.randn(2, 5, width, generator=generator, dtype=torch.float64).to(dtype) for width in widths)


ATTENTION_KINDS = (
    AttentionKind("packed"),
    AttentionKind("split", in_proj="split"),
    AttentionKind("no-bias", {"bias": False}),
    AttentionKind("sequence-first", {"batch_first": False, "num_heads": 3}, in_proj="split"),
    AttentionKind("bias-kv", {"add_bias_kv": True, "add_zero_attn": True}),
    AttentionKind("separate", {"kdim": 8, "vdim": 20}, SEPARATE, context=(8, 20)),
    AttentionKind("subclass", build=Subclass),
)
every_attention = pytest.mark.parametrize("kind", ATTENTION_KINDS, ids=lambda kind: kind.name)


def changed(kind: AttentionKind, adapted: nn.Module) -> Attending:
    """Make a plain model whose parameters are those of an adapted one plus its updates."""
    plain = kind.plain(next(adapted.parameters()).dtype)
    with torch.no_grad():
        for fqn in kind.sites:
            weight = plain.get_parameter(fqn if fqn.endswith("_weight") else f"{fqn}.weight")
            weight.add_(randlora.delta_weight(adapted, fqn))
    return plain

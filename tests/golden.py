"""Golden files of every format, kind of bases, stream and way to save bases, each with all kinds of layers.

``python -m tests.golden`` makes the directories of `GOLDEN` that are missing under tests/data/golden. One that is there
is never made again: a file of a release must load for ever. Every value in them, and in the models that they are for,
is that of a formula, so that no generator of random numbers has a say in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import randlora
from randlora.bases.spec import KINDS, Shape
from randlora.config import BasisKind, Stream
from tests.checkpoint_files import CARD_FILE, Stored
from tests.kit import adapter_values

DATA = Path(__file__).parent / "data" / "golden"
STACK = 2  # matrices of experts


class Layers(nn.Module):
    """Every kind of layer that format 1 has a place for."""

    shapes: Mapping[str, Shape] = {
        "embed": (7, 6),
        "linear": (4, 6),
        "attn.in_proj_weight": (12, 4),
        "attn.out_proj": (4, 4),
        "conv1d": (5, 4),
        "conv": (3, 4),
        "deconv": (3, 8),
    }

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.linear = nn.Linear(6, 4)
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
        self.conv1d = Conv1D(5, 4)
        self.conv = nn.Conv2d(1, 3, 2)
        self.deconv = nn.ConvTranspose2d(3, 2, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.linear(self.embed(tokens))
        x = self.conv1d(x + self.attn(x, x, x, need_weights=False)[0])
        output: Tensor = self.deconv(self.conv(x.unsqueeze(1)))
        return output


class Stack(nn.Module):
    """A stack of matrices (out, in) or (in, out); the latter says so as transformers' classes do."""

    def __init__(self, name: str, *shape: int, is_transposed: bool = False) -> None:
        super().__init__()
        self.name, self.is_transposed = name, is_transposed
        self.register_parameter(name, nn.Parameter(torch.ones(shape)))

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = getattr(self, self.name)  # (num_experts, …)
        return sum((x @ (each if self.is_transposed else each.T) for each in weight), torch.zeros(()))


class Stacks(nn.Module):
    """What format 2 was made for: stacks of experts, and attention whose projections are split."""

    shapes: Mapping[str, Shape] = {
        "linear": (4, 6),
        "attn.in_proj_weight": (3, 4, 4),
        "plain.gate_up_proj": (STACK, 6, 4),
        "turned.down_proj": (STACK, 5, 6),
    }

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.linear = nn.Linear(6, 4)
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
        self.plain = Stack("gate_up_proj", STACK, 6, 4)
        self.turned = Stack("down_proj", STACK, 6, 5, is_transposed=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.linear(self.embed(tokens))
        output: Tensor = self.turned(self.plain(x + self.attn(x, x, x, need_weights=False)[0]))
        return output


class Body(NamedTuple):
    """A model for golden files, with the version of their format and the options that do not depend on the bases."""

    build: Callable[[], nn.Module]
    format_version: int
    options: Mapping[str, Any]
    shapes: Mapping[str, Shape]  # (out_features, in_features), after the number of matrices of a stack
    ranks: Mapping[str, int] = {}  # where r is not 2


_EACH = {"in_proj": "split", "r": {"linear": 4, ".*": 2}, "alpha": {"linear": 2.0, ".*": 4.0}}
_SHARED = {
    fqn: shape if fqn.startswith("attn") else shape[-2:] for fqn, shape in Stacks.shapes.items()
}  # one Λ and one Γ for all experts
BODIES = {
    "layers": Body(Layers, 1, {"r": 2, "alpha": 4.0}, Layers.shapes),
    "each": Body(Stacks, 2, _EACH, Stacks.shapes, {"linear": 4}),
    "shared": Body(Stacks, 2, {"in_proj": "split", "experts": "shared", "r": 2, "alpha": 4.0}, _SHARED),
}
TRAINED = "linear.bias"  # whose key differs from that of a parameter beside the adapted layers
TRANSPOSED = "conv1d", "turned.down_proj"
"""Targets that are stored as ``(in_features, out_features)``."""
SEED = 2**40 + 11


class Golden(NamedTuple):
    body: str
    kind: BasisKind
    stream: Stream
    stored: Stored

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.stream}-{self.stored}-{self.body}"

    @property
    def directory(self) -> Path:
        return DATA / self.name


GOLDEN = tuple(
    Golden(body, kind, stream, stored)
    for kind in get_args(BasisKind)
    for stream in KINDS[kind].draws
    for stored in get_args(Stored)
    for body in BODIES
)


def ramp(shape: Shape, start: int, divisor: int) -> Tensor:
    """Return small numbers that differ from one to the next, in parts of a power of two."""
    indices = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((indices * 3 + start) % 11 - 5).div(divisor).reshape(shape)


def plain(body: Body) -> nn.Module:
    model = body.build().double().eval()
    with torch.no_grad():
        for start, parameter in enumerate(model.parameters()):
            parameter.copy_(ramp(tuple(parameter.shape), start, 4))
    return model


def expected_values(body: Body) -> dict[str, Tensor]:
    """Return Λ, Γ and what was trained beside them, as `adapter_values` names them."""
    values = {TRAINED: ramp((4,), 1, 2)}
    for start, (fqn, (*stack, out_features, in_features)) in enumerate(body.shapes.items()):
        r, min_dim = body.ranks.get(fqn, 2), min(out_features, in_features)
        num_bases = -(-min_dim // r)
        values[f"{fqn}.randlora_lambda"] = ramp((*stack, r, num_bases), start, 8).float()
        values[f"{fqn}.randlora_gamma"] = ramp((*stack, num_bases, min_dim), 2 * start, 4).float()
    return values


def build(golden: Golden) -> nn.Module:
    """Make the model whose adapter a golden directory holds."""
    body = BODIES[golden.body]
    model, expected = plain(body), expected_values(body)
    options = {**body.options, "targets": [*body.shapes], "train_also": [TRAINED], "basis": golden.kind}
    blocks = (2, 2) if golden.kind == "block" else None
    randlora.inject(model, stream=golden.stream, seed=SEED, dropout=0.0, blocks=blocks, **options)
    for name, value in adapter_values(model).items():
        value.data.copy_(expected[name])
    return model


if __name__ == "__main__":
    for missing in (golden for golden in GOLDEN if not golden.directory.exists()):
        randlora.save(build(missing), missing.directory, bases=missing.stored)
        (missing.directory / CARD_FILE).unlink()  # text for readers, which no program reads

"""Pieces that several files of laws need: a model of layers of all shapes, its adapters by layer, and tolerances."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from randlora.layers.base import AdapterLayer
from randlora.layers.in_place import adapter_layers_of, detach
from randlora.targets.census import Census
from tests import reference

TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Relative to the largest value compared: a few roundings of the dtype."""

needs_compiler = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.11", reason="the compiler of torch 2.9 and older does not take all that we do"
)

needs_export = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.9", reason="torch.export loses tensors that a model computes with before 2.9"
)
"""Those of the bases are neither parameters nor buffers: ``KeyError: 'sub_constant_…'``, or a warning that fails."""


class Mixed(nn.Module):
    """Square, wide, tall and biasless layers, a norm and a head: what a model's shapes may be."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12, dtype=dtype)
        self.q = nn.Linear(12, 12, dtype=dtype)
        self.up = nn.Linear(12, 20, bias=False, dtype=dtype)
        self.down = nn.Linear(20, 12, dtype=dtype)
        self.norm = nn.LayerNorm(12, dtype=dtype)
        self.head = nn.Linear(12, 3, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.q(x)
        x = x + self.down(torch.tanh(self.up(x)))
        output: Tensor = self.head(self.norm(x))
        return output


TOKENS = torch.arange(9)


def adapter_layer(layer: nn.Module) -> AdapterLayer:
    return adapter_layers_of(layer)["weight"]


def diagonals(layer: nn.Module, name: str = "default") -> tuple[nn.Parameter, nn.Parameter]:
    lam, gamma = adapter_layer(layer).diagonals_of(layer, name)
    return lam, gamma


def adapted_names(model: nn.Module) -> set[str]:
    return {site.fqn for site in Census.of(model).adapted}


def update_of(layer: nn.Module, name: str = "default") -> Tensor:
    """Return the update of one adapter of one module, ``(out_features, in_features)``."""
    return adapter_layer(layer).delta_weight(layer, {name: 1.0})


def oracle_of(layer: nn.Module, attribute: str = "weight", name: str = "default") -> Tensor:
    """Compute one adapter's update, a matrix or a stack of them, by the loops of `tests.reference` in float64."""
    held = adapter_layers_of(layer)[attribute]
    part, values = held.adapters[name], [each.detach().cpu() for each in held.diagonals_of(layer, name)]
    *count, out, into = part.shape
    bases = part.basis.slices(max(out, into), min(out, into), device="cpu", dtype=torch.float64)

    def matrix(lam: Tensor, gamma: Tensor) -> Tensor:
        return reference.delta_weight(*bases, lam, gamma, part.options.alpha / part.options.r, in_features=into)

    return torch.stack([matrix(*each) for each in zip(*values, strict=True)]) if count else matrix(*values)


def plain(layer: nn.Module) -> nn.Module:
    twin = copy.deepcopy(layer)
    for held in adapter_layers_of(twin).values():
        held.restore_original(twin)
        detach(twin, held)
    return twin


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare within a few roundings of ``dtype``, relative to the largest value."""
    scale = max(1.0, expected.abs().max().item() if expected.numel() else 1.0)
    found, expected = (each.detach().cpu().double() for each in (found, expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCES[dtype] * scale)

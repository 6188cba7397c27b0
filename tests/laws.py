"""Pieces that several files of laws need: filling adapters with values, and comparing models bit for bit."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

import randlora
from randlora.layers.base import AdapterLayer
from randlora.layers.in_place import adapter_layers_of, detach
from randlora.model.switch import AdapterInfo
from randlora.targets.walk import Census

TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Relative to the largest value compared: a few roundings of the dtype."""

needs_export = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.9", reason="torch.export loses tensors that a model computes with before 2.9"
)
"""Those of the bases are neither parameters nor buffers: ``KeyError: 'sub_constant_…'``, or a warning that fails."""

draws_as_recorded = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.13", reason="torch 2.10 and older draw other bfloat16 numbers from a seed"
)
"""For what was recorded of dense bases with ``stream="torch"``."""


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
        """Map ``(batch,)`` tokens to ``(batch, 3)``."""
        x = self.embed(tokens)
        x = x + self.q(x)
        x = x + self.down(torch.tanh(self.up(x)))
        output: Tensor = self.head(self.norm(x))
        return output


TOKENS = torch.arange(9)


def adapter_layer(layer: nn.Module) -> AdapterLayer:
    """Return what adapts the weight of one module."""
    return adapter_layers_of(layer)["weight"]


def diagonals(layer: nn.Module, name: str = "default") -> tuple[nn.Parameter, nn.Parameter]:
    """Return Λ and Γ of one adapter of one module."""
    return adapter_layer(layer).diagonals_of(layer, name)


def adapted_names(model: nn.Module) -> set[str]:
    """Return the FQNs of what is adapted."""
    return {site.fqn for site in Census.of(model).adapted}


def update_of(layer: nn.Module, name: str = "default") -> Tensor:
    """Return the update of one adapter of one module, ``(out_features, in_features)``."""
    return adapter_layer(layer).delta_weight(layer, {name: 1.0})


def plain(layer: nn.Module) -> nn.Module:
    """Return a copy of an adapted module without its adapters."""
    twin = copy.deepcopy(layer)
    for held in adapter_layers_of(twin).values():
        held.unfold(twin)
        detach(twin, held)
    return twin


def fill(model: nn.Module, name: str = "default", *, seed: int = 0) -> None:
    """Give one adapter values as after some training: every Λ, Γ and parameter beside them moved."""
    generator = torch.Generator().manual_seed(seed)
    state = randlora.state.adapted_root(model)[1]
    with torch.no_grad():
        for site in Census.of(model).adapted:
            if name in site.layer.adapters:
                for parameter in site.layer.diagonals_of(site.owner, name):
                    parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.05)
        for parameter in state.adapter(name).trained.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter))


@dataclass(frozen=True)
class Snapshot:
    """Everything about a model that a call which raises must not change."""

    tensors: dict[str, Tensor]
    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    trainable: dict[str, bool]
    adapters: list[AdapterInfo]
    bases: int

    @classmethod
    def of(cls, model: nn.Module) -> "Snapshot":
        """Take one."""
        state = randlora.state.attached_state(model)
        return cls(
            tensors={name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
            modules=dict(model.named_modules()),
            parameters=dict(model.named_parameters()),
            trainable={name: parameter.requires_grad for name, parameter in model.named_parameters()},
            adapters=randlora.adapters(model),
            bases=len(state.bank) if state else 0,
        )

    def assert_equals(self, other: "Snapshot") -> None:
        """Compare bit for bit, and objects by identity."""
        assert self.tensors.keys() == other.tensors.keys()
        changed = [name for name, tensor in self.tensors.items() if not same_bits(tensor, other.tensors[name])]
        assert not changed, f"changed: {changed}"
        assert {k: id(v) for k, v in self.modules.items()} == {k: id(v) for k, v in other.modules.items()}
        assert {k: id(v) for k, v in self.parameters.items()} == {k: id(v) for k, v in other.parameters.items()}
        assert self.trainable == other.trainable
        assert self.adapters == other.adapters
        assert self.bases == other.bases


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Assert that what happens inside leaves the model exactly as it was."""
    before = Snapshot.of(model)
    yield
    before.assert_equals(Snapshot.of(model))


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Compare with NaN equal to NaN and 0.0 unlike -0.0."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    as_bytes: Callable[[Tensor], Tensor] = lambda tensor: tensor.detach().contiguous().flatten().view(torch.uint8)  # noqa: E731
    return torch.equal(as_bytes(first), as_bytes(second))


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare within a few roundings of ``dtype``, relative to the largest value."""
    scale = max(1.0, expected.abs().max().item() if expected.numel() else 1.0)
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=TOLERANCES[dtype] * scale)

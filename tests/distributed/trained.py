"""Small drawn models that are trained with adapters, in one process and in several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import randlora
from randlora.config import BasisKind
from tests.kit import fill

ROWS = 3
"""Rows of each process in each step."""


@dataclass(frozen=True)
class Drawn:
    """A model and its adapter, small enough to be sent: the same in every process that builds it.

    Attributes:
        widths: The widths of its layers.
        checkpointed: Whether the layers are run with activation checkpointing.
        others: The number of further adapters, which are not active.
    """

    widths: tuple[int, ...]
    r: int
    basis: BasisKind
    alpha: float
    train_also: tuple[str, ...] = ()
    checkpointed: bool = False
    others: int = 0
    steps: int = 3

    def build(self) -> Chain:
        """Return the model without adapters."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return Chain(self.widths, checkpointed=self.checkpointed)

    def adapted(self) -> Chain:
        """Return the model with its adapters, as after some training."""
        model = self.build()
        self.adapt(model)
        return fill(model, seed=2)

    def adapt(self, model: nn.Module) -> None:
        """Add the adapters."""
        also = list(self.train_also) or None
        randlora.inject(
            model, self.r, targets="all-linear", basis=self.basis, alpha=self.alpha, train_also=also, stream="portable"
        )
        for index in range(self.others):
            randlora.inject(model, self.r, targets="all-linear", name=f"other{index}", stream="portable")

    def batch(self, rank: int, step: int) -> Tensor:
        """Return the rows of one process in one step."""
        generator = torch.Generator().manual_seed(1000 * step + rank)
        return torch.randn(ROWS, self.widths[0], generator=generator)

    def joined(self, step: int) -> Tensor:
        """Return the rows of all processes in one step."""
        return torch.cat([self.batch(rank, step) for rank in range(dist.get_world_size())])


class Chain(nn.Module):
    """Linear layers with norms and an activation between them."""

    def __init__(self, widths: tuple[int, ...], *, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths[1:])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(rows, widths[0])`` to ``(rows, widths[-1])``."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            parts = (x, layer, norm)
            x = checkpoint(_run, *parts, use_reentrant=False) if self.checkpointed else _run(*parts)
        return x


def _run(x: Tensor, layer: nn.Module, norm: nn.Module) -> Tensor:
    return torch.tanh(norm(layer(x)))


def drawn_models(**fixed: Any) -> st.SearchStrategy[Drawn]:
    """Draw models and adapters."""
    options: dict[str, st.SearchStrategy[Any]] = {
        "widths": st.lists(st.integers(4, 12), min_size=2, max_size=4).map(tuple),
        "r": st.sampled_from([2, 4]),
        "basis": st.sampled_from(["dense", "sparse", "block"]),
        "alpha": st.floats(0.5, 4),
        "train_also": st.sampled_from([(), ("norms",), ("norms.0.bias",)]),
    }
    return st.builds(Drawn, **(options | fixed))


def loss_of(output: Tensor) -> Tensor:
    """Return a loss that is a mean over rows, so that the mean over processes is that of the joined rows."""
    return (output - 0.3).square().mean()


def optimizer_of(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    """Return an optimizer that does not amplify rounding, as Adam does where gradients are small."""
    return torch.optim.SGD(randlora.trainable_parameters(model), lr=lr, momentum=0.9)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Return what an adapted model trains, by name."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def trained_alone(drawn: Drawn) -> tuple[list[float], dict[str, Tensor]]:
    """Train in this process on the rows of all; return the losses and the trained values."""
    model, losses = drawn.adapted(), []
    optimizer = optimizer_of(model)
    for step in range(drawn.steps):
        loss = loss_of(model(drawn.joined(step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, values_of(model)


def mean_over_ranks(loss: float) -> float:
    """Return the mean of a number over the processes."""
    total = torch.tensor([loss], dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def require_equal_on_ranks(values: dict[str, Tensor]) -> None:
    """Assert that all processes have the same bits."""
    for name, value in values.items():
        found = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(found, value.contiguous())
        assert all(torch.equal(each, value) for each in found), f"{name} differs between ranks"


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference between tensors of the same names, relative to the scale of their values."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return max(
        (found[name].double() - value.double()).abs().max().item() / max(1.0, value.abs().max().item())
        for name, value in expected.items()
    )


@contextmanager
def counted_broadcasts() -> Iterator[list[int]]:
    """Count the bytes of the tensors that wrappers of torch make equal in all processes: parameters and buffers."""
    sent: list[int] = []
    original = vars(dist)["_broadcast_coalesced"]

    def counting(group: Any, tensors: list[Tensor], *args: Any) -> None:
        sent.append(sum(tensor.nbytes for tensor in tensors))
        original(group, tensors, *args)

    vars(dist)["_broadcast_coalesced"] = counting
    try:
        yield sent
    finally:
        vars(dist)["_broadcast_coalesced"] = original

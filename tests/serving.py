"""What rows of a batch are when each adapter runs alone, for the tests of many adapters at once."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import randlora
from tests.kit import adapt

Names = list[str | None]


def with_adapters(model: nn.Module, targets: Any = "all-linear", **options: Any) -> Any:
    """Add the adapters "a" and "b" on different bases, whose outputs are well apart."""
    for seed, name in enumerate("ab"):
        adapt(model, values=seed, spread=0.3, **{"r": 2, **options}, name=name, seed=seed, targets=targets)
    return model.eval()


def each_alone(model: nn.Module, names: Iterable[str | None], run: Callable[[], Any]) -> dict[str | None, Any]:
    """Run the whole batch through each adapter, or through the base for ``None``."""
    outputs: dict[str | None, Any] = {}
    for name in dict.fromkeys(names):
        randlora.activate(model, [] if name is None else name)
        outputs[name] = run()
    return outputs


def row_by_row(model: nn.Module, names: Sequence[str | None], run: Callable[[], Tensor], axis: int = 0) -> Tensor:
    outputs = each_alone(model, names, run)
    return torch.stack([outputs[name].select(axis, row) for row, name in enumerate(names)], axis)

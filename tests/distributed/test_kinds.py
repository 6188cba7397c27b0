"""Under engines that spread a model, every kind of layer does what it does in one process, as models of Linear do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.distributed.engines import ENGINES
from tests.distributed.processes import in_two
from tests.distributed.test_engines import require_as_one_process
from tests.distributed.trained import Case
from tests.read_kinds import READ_KINDS, ReadKind, output_of, weighted


class Run(nn.Module):
    """Runs the module of a kind, whose names it keeps, through a forward that an engine sees."""

    def __init__(self, kind: ReadKind) -> None:
        super().__init__()
        self.add_module("0", kind.model()[0])

    def forward(self, *args: Tensor) -> Tensor:
        return output_of(self.get_submodule("0")(*args))


def _conv1d() -> nn.Module:
    layer: nn.Module = Conv1D(20, 12)
    return layer


CONV1D = ReadKind("Conv1D", "linear", _conv1d, lambda: (torch.randn(5, 12),), options={"targets": ["0"]})
KINDS = {kind.name: kind for kind in (*READ_KINDS, CONV1D)}


@dataclass(frozen=True)
class OfKind(Case):
    """A model of one kind of layer; each process weights its output otherwise."""

    name: str

    def build(self) -> Any:
        return Run(KINDS[self.name])

    def options(self) -> dict[str, Any]:
        return KINDS[self.name].adapter_options

    def batch(self, rank: int, step: int) -> tuple[Any, ...]:  # noqa: ARG002  # the same
        return KINDS[self.name].arguments()

    def loss(self, output: Tensor, rank: int) -> Tensor:
        return weighted(output) * (rank + 1) / 50


@in_two
@pytest.mark.parametrize(
    ("engine", "name"),
    [
        ("FSDP2", "Conv1D"),
        ("FSDP2 first", "Conv2d-groups"),
        ("FSDP2", "ConvTranspose1d"),
        ("FSDP2 first", "Embedding-few-rows"),
        ("FSDP2", "attention-in_proj"),
        ("FSDP2 first", "attention-in_proj-split"),
        ("FSDP2", "attention-k_proj"),
        ("FSDP2 first", "attention-out_proj"),
        ("FSDP2", "experts-gate_up"),
        ("FSDP2 first", "experts-down-shared-batched"),
        ("ZeRO-3", "Conv2d-stride"),
        ("ZeRO-3", "Embedding"),
        ("ZeRO-3", "attention-in_proj"),
        ("ZeRO-3", "attention-out_proj"),
        ("ZeRO-3, experts", "experts-gate_up"),
    ],
)
def test_each_kind_trains_is_saved_and_merged(engine: str, name: str, tmp_path: Path) -> None:
    require_as_one_process(ENGINES[engine], OfKind(name), tmp_path)

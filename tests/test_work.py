"""The work of a step is what the operators of a step add up to, and what a report says of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import randlora
from randlora.bases.basis import Basis
from randlora.bases.spec import BasisSpec
from randlora.functional import Diagonals, adapted_linear
from randlora.layers.diagonals import diagonal_shapes
from randlora.memory.pieces import Piece
from randlora.memory.work import LORA_RANK, lora_cost, own_cost

META = torch.device("meta")


def multiply_adds(step: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops()) / 2


def leaf(*shape: int) -> Tensor:
    return torch.empty(shape, device=META, requires_grad=True)


@pytest.mark.parametrize("shape", [(512, 512), (768, 256), (256, 768)], ids=str)
@pytest.mark.parametrize("tokens", [96, 512, 4096])
@pytest.mark.parametrize("basis", ["dense", "block"])
def test_the_work_is_that_of_the_operators_that_run(basis: Any, tokens: int, shape: tuple[int, int]) -> None:
    piece = Piece(shape, 32, tokens)
    spec = BasisSpec(basis, "portable", 0, 32, max(shape), min(shape), (4, 8) if basis == "block" else None)
    pair = Basis(spec, (max(shape), min(shape))).pair(max(shape), min(shape), device=META, dtype=torch.float32)
    vars(pair)["shape"] = pair.shape._replace(entry=0)  # passes over memory are no operators that are counted
    lam, gamma = (leaf(*each) for each in diagonal_shapes(shape, 32))
    x, weight, grad = (
        leaf(tokens, shape[1]),
        torch.empty(shape, device=META),
        torch.empty(tokens, shape[0], device=META),
    )
    up, down = leaf(shape[0], LORA_RANK), leaf(LORA_RANK, shape[1])

    def adapted() -> None:
        output = adapted_linear(x, pair, Diagonals(lam, gamma, 1.5), weight=weight)
        torch.autograd.grad(output, [x, lam, gamma], grad)

    def with_lora() -> None:
        torch.autograd.grad(F.linear(x, weight) + F.linear(F.linear(x, down), up), [x, up, down], grad)

    assert own_cost(piece, pair, 0, forwards=1) == pytest.approx(multiply_adds(adapted), rel=0.01)
    assert lora_cost(piece, 0, forwards=1) == multiply_adds(with_lora)


def test_a_report_names_the_work_and_block_bases_where_they_save_some() -> None:
    with META:
        model = nn.ModuleDict({"q": nn.Linear(8192, 8192), "up": nn.Linear(8192, 28672)})
    sizes: dict[str, Any] = {"targets": ["q", "up"], "tokens": 4096, "dtype": torch.bfloat16}
    dense, block = (randlora.training_memory(model, basis=basis, **sizes) for basis in ("dense", "block"))
    assert dense.work is not None
    assert block.work is not None
    assert block.work.own == block.work.block == dense.work.block < dense.work.own
    assert (
        f'{dense.work.own:.1f} times that of LoRA of rank 32, {dense.work.block:.1f} times with basis="block"'
        in str(dense)
    )
    assert 'basis="block"' not in str(block)
    again = randlora.training_memory(model, checkpointing=True, **sizes).work
    assert again is not None
    assert 1 < again.own < dense.work.own
    assert randlora.training_memory(model, targets=["q"]).work is None
    few = randlora.training_memory(model, **{**sizes, "tokens": 1}).work
    assert few is not None
    assert 1 < few.own < 1.3  # reading the weights takes most of the time


def test_what_is_not_multiplied_by_tokens_is_no_work() -> None:
    with META:
        model = nn.Sequential(nn.Embedding(64, 64))
    assert randlora.training_memory(model, 4, targets=["0"], tokens=8).work is None

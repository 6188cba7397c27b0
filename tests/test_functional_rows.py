"""Rows of an update against the oracle, and what computing them keeps and never makes."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from randlora.functional import Diagonals, update_rows
from randlora.modes import Observer
from tests import reference
from tests.pairs import Case, case, every_form
from tests.strategies import ranks, sides

every_shape = pytest.mark.parametrize("shape", [(40, 8), (16, 8), (8, 8), (6, 9), (1, 6), (6, 1)], ids=str)


def oracle(made: Case, shape: tuple[int, int]) -> Tensor:
    return reference.delta_weight(made.basis_A, made.basis_B, *made.diagonals, in_features=shape[1])


def rows(made: Case, ids: Tensor, shape: tuple[int, int]) -> Tensor:
    return update_rows(ids, made.pair, made.diagonals, num_rows=shape[0], is_wide=shape[1] <= shape[0])


@every_form
@given(
    num_rows=sides,
    row_size=sides,
    r=ranks,
    ids=st.lists(st.integers(0, 39), max_size=12),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_rows_are_those_of_the_oracles_update(
    form: str, num_rows: int, row_size: int, r: int, ids: list[int], dtype: torch.dtype
) -> None:
    made, shape = case(form, num_rows, row_size, r), (num_rows, row_size)
    chosen = torch.tensor(ids, dtype=dtype) % num_rows
    found = rows(made, chosen, shape)
    assert found.shape == (len(ids), row_size)
    torch.testing.assert_close(found, oracle(made, shape)[chosen.long()])


@every_form
@every_shape
@pytest.mark.parametrize("ids", [[], [0], [[0, 3], [3, 3]], [5] * 50], ids=["none", "one", "repeated", "many"])
def test_gradients_are_those_of_finite_differences(form: str, shape: tuple[int, int], ids: list[Any]) -> None:
    made, chosen = case(form, *shape, 4), torch.tensor(ids, dtype=torch.int64) % shape[0]
    lam, gamma, scaling = made.diagonals

    def run(lam: Tensor, gamma: Tensor) -> Tensor:
        table = Diagonals(lam, gamma, scaling)
        return update_rows(chosen, made.pair, table, num_rows=shape[0], is_wide=shape[1] <= shape[0])

    assert run(lam, gamma).shape == (*chosen.shape, shape[1])
    assert torch.autograd.gradcheck(run, (lam.requires_grad_(), gamma.requires_grad_()), fast_mode=True)


class Largest(Observer):
    """Notes the number of entries of the largest floating tensor that operations make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.entries = max(self.entries, tensor.numel())
        return result


@every_form
def test_neither_direction_makes_a_tensor_of_the_size_of_the_table(form: str) -> None:
    shape = 400, 8
    made, ids = case(form, *shape, 4), torch.tensor([[7, 399, 7], [0, 12, 7]])
    for tensor in made.diagonals[:2]:
        tensor.requires_grad_()
    with Largest() as forward:
        output = rows(made, ids, shape)
    with Largest() as backward:
        output.sum().backward()
    assert 0 < forward.entries < 400
    assert 0 < backward.entries < 400


@every_form
def test_a_repeated_index_is_computed_once(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, computed = case(form, 400, 8, 4), []
    take = type(made.pair).rows_of_B

    def spy(pair: Any, ids: Tensor) -> Tensor:
        computed.append(ids.tolist())
        return take(pair, ids)

    monkeypatch.setattr(type(made.pair), "rows_of_B", spy)
    found = rows(made, torch.tensor([7, 3, 7, 7, 3]), (400, 8))
    assert computed == [[3, 7]]
    torch.testing.assert_close(found, oracle(made, (400, 8))[[7, 3, 7, 7, 3]])


@every_form
@pytest.mark.parametrize("shape", [(40, 8), (8, 8), (6, 9)], ids=str)
@pytest.mark.parametrize("count", [3, 60])
def test_backward_keeps_the_diagonals_and_the_indices(form: str, shape: tuple[int, int], count: int) -> None:
    made, ids = case(form, *shape, 4), torch.arange(count) % shape[0]
    given = [tensor.requires_grad_().untyped_storage().data_ptr() for tensor in made.diagonals[:2]]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rows(made, ids, shape)
    others = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in given]
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} >= set(given)
    if shape[0] >= shape[1] or count >= shape[0]:
        assert all(not tensor.is_floating_point() for tensor in others)
    assert all(tensor.numel() <= count * shape[0] for tensor in others)


@every_form
def test_autocast_does_not_reach_into_the_rows(form: str) -> None:
    made, ids = case(form, 40, 8, 4), torch.tensor([3, 4])
    lam, gamma = (value.float().requires_grad_() for value in made.diagonals[:2])
    single, own = Diagonals(lam, gamma, 0.7), made.pair
    pair: Any = type(own)(own.A.float(), own.B.float(), *own.rest)
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = update_rows(ids, pair, single, num_rows=40, is_wide=True)
            assert output.dtype == torch.float32
            found.append((output, *torch.autograd.grad(output.sum(), (lam, gamma))))
    for with_autocast, without in zip(*found, strict=True):
        assert torch.equal(with_autocast, without)

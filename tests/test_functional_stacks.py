"""The update of a stack of matrices, each with its own Λ and Γ and all with the same bases."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from randlora.functional import Diagonals, delta_weight
from tests import reference
from tests.pairs import Case, case, every_form
from tests.strategies import ranks, sides
from tests.test_functional_memory import kept_by, storage

every_shape = pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6)], ids=str)


def stack(form: str, shape: tuple[int, int], r: int, matrices: int) -> tuple[Case, Diagonals]:
    """Make bases, and Λ and Γ for each matrix."""
    made = case(form, *shape, r)
    lam, gamma, scaling = made.diagonals
    more = [torch.randn((matrices, *part.shape), dtype=part.dtype) for part in (lam, gamma)]
    return made, Diagonals(more[0], more[1], scaling)


@every_form
@given(out=sides, into=sides, r=ranks, matrices=st.integers(1, 4))
def test_each_matrix_of_a_stack_gets_the_oracles_update(form: str, out: int, into: int, r: int, matrices: int) -> None:
    made, diagonals = stack(form, (out, into), r, matrices)
    found = delta_weight(made.pair, diagonals, is_wide=into <= out)
    expected = [
        reference.delta_weight(made.basis_A, made.basis_B, lam, gamma, diagonals.scaling, in_features=into)
        for lam, gamma in zip(*diagonals[:2], strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(expected))


@every_form
@every_shape
def test_gradients_of_a_stack_are_those_of_finite_differences_once_and_twice(form: str, shape: tuple[int, int]) -> None:
    made, diagonals = stack(form, shape, 3, 2)
    trained = tuple(part.requires_grad_() for part in diagonals[:2])

    def run(lam: Tensor, gamma: Tensor) -> Tensor:
        return delta_weight(made.pair, Diagonals(lam, gamma, 0.7), is_wide=shape[1] == min(shape))

    assert torch.autograd.gradcheck(run, trained, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *parts: run(*parts).square(), trained, fast_mode=True)


@every_form
@every_shape
@pytest.mark.parametrize("matrices", [0, 3])
def test_backward_keeps_the_diagonals_alone(form: str, shape: tuple[int, int], matrices: int) -> None:
    made, diagonals = stack(form, shape, 3, matrices) if matrices else ((only := case(form, *shape, 3)), only.diagonals)
    given = {storage(part.requires_grad_()) for part in diagonals[:2]}
    kept = kept_by(lambda: delta_weight(made.pair, diagonals, is_wide=shape[1] == min(shape)))
    assert {storage(tensor) for tensor in kept} == given


@every_form
@every_shape
@pytest.mark.medium
def test_a_compiled_stack_is_the_same(form: str, shape: tuple[int, int]) -> None:
    made, diagonals = stack(form, shape, 3, 3)

    def run(lam: Tensor, gamma: Tensor) -> Tensor:
        return delta_weight(made.pair, Diagonals(lam, gamma, 0.7), is_wide=shape[1] == min(shape))

    torch._dynamo.reset()
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(*diagonals[:2])
    torch.testing.assert_close(found, run(*diagonals[:2]))

"""The formula against the float64 oracle, its gradients against finite differences."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from randlora import functional
from tests import reference
from tests.strategies import ranks, sides


def random_parts(out_features: int, in_features: int, r: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make bases, Λ and Γ for one layer, all float64."""
    generator = torch.Generator().manual_seed(out_features * 10_000 + in_features * 100 + r)
    max_dim, min_dim = max(out_features, in_features), min(out_features, in_features)
    num_bases = -(-min_dim // r)
    shapes = ((r, 1, min_dim), (max_dim, num_bases, r), (r, num_bases), (num_bases, min_dim))
    basis_A, basis_B, lam, gamma = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return basis_A, basis_B, lam, gamma


@given(out_features=sides, in_features=sides, r=ranks, scaling=st.floats(-30, 30))
def test_delta_weight_is_the_oracles(out_features: int, in_features: int, r: int, scaling: float) -> None:
    parts = random_parts(out_features, in_features, r)
    found = functional.delta_weight(*parts, scaling, in_features=in_features)
    assert found.shape == (out_features, in_features)
    torch.testing.assert_close(found, reference.delta_weight(*parts, scaling, in_features=in_features))


@given(out_features=sides, in_features=sides, r=ranks, tokens=st.integers(0, 5))
def test_adapter_output_is_the_input_times_the_update(out_features: int, in_features: int, r: int, tokens: int) -> None:
    parts = random_parts(out_features, in_features, r)
    x = torch.randn(tokens, in_features, dtype=torch.float64)
    update = reference.delta_weight(*parts, 1.5, in_features=in_features)
    torch.testing.assert_close(functional.adapter_output(x, *parts, 1.5), x @ update.T)


def test_delta_weight_of_a_case_worked_out_by_hand() -> None:
    """With r = 1 and two bases: row p of UA is lam[0, p]·A·gamma[p], and the update is B's columns times those rows."""
    basis_A = torch.tensor([[[1.0, 2.0]]], dtype=torch.float64)
    basis_B = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]], [[1.0], [1.0]]], dtype=torch.float64)
    lam = torch.tensor([[3.0, 5.0]], dtype=torch.float64)
    gamma = torch.tensor([[1.0, 1.0], [1.0, 0.5]], dtype=torch.float64)
    found = functional.delta_weight(basis_A, basis_B, lam, gamma, 2.0, in_features=2)
    expected = torch.tensor([[6.0, 12.0], [10.0, 10.0], [16.0, 22.0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 6)], ids=["tall", "wide", "square", "one-output"])
@pytest.mark.parametrize("r", [1, 2, 7])
def test_gradients_are_those_of_finite_differences(shape: tuple[int, int], r: int) -> None:
    basis_A, basis_B, lam, gamma = random_parts(*shape, r)
    x = torch.randn(2, shape[1], dtype=torch.float64)
    trained = [tensor.requires_grad_() for tensor in (x, lam, gamma)]
    assert torch.autograd.gradcheck(
        lambda x, lam, gamma: functional.adapter_output(x, basis_A, basis_B, lam, gamma, 0.7), trained
    )
    assert torch.autograd.gradcheck(
        lambda lam, gamma: functional.delta_weight(basis_A, basis_B, lam, gamma, 0.7, in_features=shape[1]),
        trained[1:],
    )


@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (40, 24)], ids=["square", "down", "up"])
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_backward_keeps_the_input_and_nothing_else_of_size(shape: tuple[int, int], tokens: int) -> None:
    """PEFT keeps ``min_dim²`` numbers a layer beside it."""
    basis_A, basis_B, lam, gamma = random_parts(*shape, 4)
    x = torch.randn(tokens, shape[1], dtype=torch.float64, requires_grad=True)
    given = {tensor.untyped_storage().data_ptr() for tensor in (x, basis_A, basis_B, lam, gamma)}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        functional.adapter_output(x, basis_A, basis_B, lam.requires_grad_(), gamma.requires_grad_(), 0.7).sum()
    assert len(kept) == 5
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} <= given


@pytest.mark.parametrize("shape", [(5, 7), (7, 5)], ids=["down", "up"])
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, True)], ids=["input", "adapter"])
def test_backward_makes_two_products_for_what_is_asked_and_none_for_what_is_not(
    shape: tuple[int, int], needs: tuple[bool, bool, bool]
) -> None:
    basis_A, basis_B, lam, gamma = random_parts(*shape, 3)
    x = torch.randn(6, shape[1], dtype=torch.float64)
    for tensor, wanted in zip((x, lam, gamma), needs, strict=True):
        tensor.requires_grad_(wanted)
    output = functional.adapter_output(x, basis_A, basis_B, lam, gamma, 0.7)
    with FlopCounterMode(display=False) as counter:
        output.backward(torch.ones_like(output))
    assert tuple(tensor.grad is not None for tensor in (x, lam, gamma)) == needs
    assert counter.get_total_flops() == 2 * 6 * lam.numel() * sum(shape)


def test_differentiating_twice_is_refused_and_not_wrong() -> None:
    basis_A, basis_B, lam, gamma = random_parts(5, 7, 3)
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    output = functional.adapter_output(x, basis_A, basis_B, lam.requires_grad_(), gamma, 0.7).square().sum()
    (gradient,) = torch.autograd.grad(output, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()

"""Low-rank approximations: no matrix of the rank is nearer, no smaller rank would do, and the error is the true one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from randlora.files import layouts
from randlora.files.layouts import frobenius_norm, of_rank, spectral_norm, within

sizes = st.integers(1, 24)


def drawn(rows: int, columns: int, *, decay: float = 0.0, seed: int = 0) -> Tensor:
    """Draw a matrix whose columns shrink, so that some directions matter more than others."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator)
    return matrix * torch.exp(-decay * torch.arange(columns))


def tails(matrix: Tensor) -> list[float]:
    """Compute in float64 what the best approximation of each rank loses, as a share of the norm."""
    squares = torch.linalg.svdvals(matrix.double()).square()
    return [math.sqrt(float(squares[rank:].sum() / squares.sum())) for rank in range(len(squares) + 1)]


def distance(matrix: Tensor, left: Tensor, right: Tensor) -> float:
    lost = torch.linalg.norm(matrix.double() - left.double() @ right.double())
    return float(lost / torch.linalg.norm(matrix.double()))


@given(rows=sizes, columns=sizes, rank=st.integers(1, 30), decay=st.sampled_from([0.0, 0.5]))
def test_nothing_of_the_rank_is_nearer_and_the_error_is_the_true_one(
    rows: int, columns: int, rank: int, decay: float
) -> None:
    matrix = drawn(rows, columns, decay=decay)
    found = of_rank(matrix, rank)
    assert found.left.shape == (rows, rank)
    assert found.right.shape == (rank, columns)
    assert found.relative_error == pytest.approx(distance(matrix, found.left, found.right), rel=1e-3, abs=1e-6)
    assert found.relative_error == pytest.approx(tails(matrix)[min(rank, rows, columns)], rel=1e-3, abs=2e-6)


@given(rows=sizes, columns=sizes, tolerance=st.floats(1e-3, 1.0), decay=st.sampled_from([0.0, 0.5]))
def test_the_rank_within_a_tolerance_is_the_smallest(rows: int, columns: int, tolerance: float, decay: float) -> None:
    matrix = drawn(rows, columns, decay=decay)
    found = within(matrix, tolerance)
    assert found.relative_error <= tolerance
    assert found.rank == 1 or tails(matrix)[found.rank - 1] > tolerance * (1 - 1e-4)


def test_a_tolerance_of_zero_gives_the_full_rank_and_states_what_rounding_leaves() -> None:
    found = within(drawn(9, 6), 0.0)
    assert found.rank == 6
    assert 0 < found.relative_error < 1e-5


def test_a_matrix_of_zeros_has_no_error_at_rank_one() -> None:
    found = within(torch.zeros(5, 4), 0.1)
    assert (found.rank, found.relative_error) == (1, 0.0)
    assert not found.left.any()


def test_ranks_beyond_the_matrix_are_filled_up_with_zeros() -> None:
    found = of_rank(drawn(5, 3), 7)
    assert not found.left[:, 3:].any()
    assert not found.right[3:].any()
    assert found.relative_error < 1e-6


@pytest.fixture
def randomized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small matrices count as large."""
    monkeypatch.setattr(layouts, "EXACT_UP_TO", 8)


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)], ids=["tall", "wide"])
@pytest.mark.parametrize("decay", [0.0, 0.05], ids=["flat spectrum", "falling spectrum"])
def test_a_randomized_approximation_is_nearly_the_best(decay: float, shape: tuple[int, int], randomized: None) -> None:
    matrix = drawn(*shape, decay=decay)
    best = tails(matrix)[20]
    found = of_rank(matrix, 20)
    assert found.relative_error == pytest.approx(distance(matrix, found.left, found.right), rel=1e-3)
    assert best * (1 - 1e-4) <= found.relative_error <= best * 1.02
    assert decay or found.relative_error > best * (1 + 1e-6), "it was the exact one"


def test_the_rank_within_a_tolerance_is_nearly_the_smallest_when_randomized(randomized: None) -> None:
    matrix = drawn(500, 450, decay=0.05)
    smallest = next(rank for rank, error in enumerate(tails(matrix)) if error <= 0.1)
    found = within(matrix, 0.1)
    assert found.relative_error <= 0.1
    assert smallest <= found.rank <= smallest + 2


def test_the_global_generator_is_neither_read_nor_advanced(randomized: None) -> None:
    matrix = drawn(300, 200)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = of_rank(matrix, 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(of_rank(matrix, 4).left, first.left)


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_norms_are_those_of_the_dense_matrix(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = drawn(300, 250, decay=decay)
    values = torch.linalg.svdvals(matrix.double())
    assert frobenius_norm(matrix) == pytest.approx(float(values.square().sum().sqrt()), rel=1e-6)
    assert spectral_norm(matrix) == pytest.approx(float(values[0]), rel=1e-5)
    monkeypatch.setattr(layouts, "EXACT_UP_TO", 8)
    assert 0.95 * float(values[0]) <= spectral_norm(matrix) <= float(values[0]) * (1 + 1e-5)

"""The form in which layers are handed their bases: the same numbers, without the zeros where that pays."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from randlora import Basis, BasisSpec
from randlora.bases import portable_stream, torch_stream
from randlora.functional import DensePair, Diagonals, Pair, SparsePair, delta_weight
from tests import reference
from tests.strategies import specs


def pair(basis: Basis, max_dim: int, min_dim: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Pair:
    return basis.pair(max_dim, min_dim, device=torch.device(device), dtype=dtype)


@given(specs(), st.data())
def test_the_form_to_compute_with_means_the_same_bases(spec: BasisSpec, data: st.DataObject) -> None:
    """Its update is that of the oracle with the bases written out, for any layer that slices them."""
    max_dim = data.draw(st.integers(1, spec.max_dim))
    min_dim = data.draw(st.integers(1, min(max_dim, spec.min_dim)))
    basis = Basis(spec)
    basis.extend(spec.max_dim, spec.min_dim)
    found = pair(basis, max_dim, min_dim, torch.float64)
    num_bases = -(-min_dim // spec.r)
    lam, gamma = torch.randn(spec.r, num_bases).double(), torch.randn(num_bases, min_dim).double()
    written_out = basis.slices(max_dim, min_dim, device="cpu", dtype=torch.float64)
    expected = reference.delta_weight(*written_out, lam, gamma, 1.0, in_features=min_dim)
    torch.testing.assert_close(delta_weight(found, Diagonals(lam, gamma, 1.0), in_features=min_dim), expected)


def test_one_copy_is_made_per_device_and_dtype() -> None:
    basis = Basis(BasisSpec("dense", "portable", 0, 4, 12, 8))
    first, again, other = pair(basis, 12, 8), pair(basis, 10, 6), pair(basis, 12, 8, torch.bfloat16)
    assert first.B.data_ptr() == again.B.data_ptr()
    assert other.B.dtype == torch.bfloat16
    assert other.A.dtype == torch.float32


@pytest.mark.parametrize(("blocks", "dims"), [((2, 4), (48, 30)), ((4, 2), (48, 32))])
def test_the_zeros_of_block_bases_take_no_room(blocks: tuple[int, int], dims: tuple[int, int]) -> None:
    basis = Basis(BasisSpec("block", "portable", 0, 8, *dims, blocks))
    made = pair(basis, *dims)
    stored = [matrix.values.numel() for matrix in basis.matrices()]
    assert [tensor.untyped_storage().nbytes() for tensor in (made.A, made.B)] == [4 * count for count in stored]


@pytest.mark.parametrize("kind", ["sparse", "very_sparse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ternary_signs_are_exact_in_any_dtype(kind: str, dtype: torch.dtype) -> None:
    basis = Basis(BasisSpec(kind, "torch", 0, 8, 48, 30))  # type: ignore[arg-type]
    assert set(pair(basis, 48, 30, dtype).B.unique().tolist()) == {-1.0, 0.0, 1.0}


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="sparse products are slow without MKL")
def test_a_very_sparse_basis_is_multiplied_by_its_entries_alone_where_that_pays() -> None:
    sparse, less = (Basis(BasisSpec(kind, "torch", 0, 8, 90, 80)) for kind in ("very_sparse", "sparse"))
    assert isinstance(pair(sparse, 90, 80), SparsePair)
    assert isinstance(pair(sparse, 90, 80, torch.bfloat16), DensePair)
    assert isinstance(pair(less, 90, 80), DensePair), "a third of its entries are not zero"
    assert isinstance(sparse.pair(90, 80, device=torch.device("cpu"), dtype=torch.float32, is_traced=True), DensePair)
    assert pair(sparse, 85, 70).B.shape == (85, 72)
    first, again = pair(sparse, 90, 80), pair(sparse, 90, 80)
    assert first.B is again.B


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="sparse products are slow without MKL")
def test_a_basis_that_is_multiplied_by_its_entries_is_not_written_out_as_well() -> None:
    basis = Basis(BasisSpec("very_sparse", "torch", 0, 8, 90, 80))
    pair(basis, 90, 80)
    assert [copy.shape for copy in basis._copies.values()] == [(8, 80)]


@pytest.mark.parametrize("blocks", [None, (2, 4)])
def test_in_the_dtype_of_storage_nothing_is_copied(blocks: tuple[int, int] | None) -> None:
    basis = Basis(BasisSpec("block" if blocks else "dense", "portable", 0, 8, 48, 32, blocks))
    made = pair(basis, 48, 32, torch.bfloat16)
    assert made.B.data_ptr() == basis.matrices()[1].values.data_ptr()


@pytest.mark.parametrize("blocks", [None, (2, 4)])
def test_meta_bases_have_shapes_and_draw_nothing(
    blocks: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stream in (torch_stream, portable_stream):
        monkeypatch.setattr(stream, "draw", lambda *_: pytest.fail("drew for a model without values"))
    kind, stream_name = ("block", "portable") if blocks else ("dense", "torch")
    basis = Basis(BasisSpec(kind, stream_name, 0, 4, 12, 8, blocks))  # type: ignore[arg-type]
    found = pair(basis, 12, 7, device="meta")
    assert (found.max_dim, found.min_dim) == (12, 7)
    assert found.A.is_meta
    assert found.B.is_meta


def test_bases_made_in_inference_mode_can_be_trained_through_later() -> None:
    for kind in ("dense", "very_sparse"):
        basis = Basis(BasisSpec(kind, "torch", 0, 8, 90, 80))
        with torch.inference_mode():
            pair(basis, 90, 80)
        assert not pair(basis, 90, 80).B.is_inference()
        assert not pair(basis, 90, 80).A.is_inference()

"""The form in which layers are handed their bases: the same numbers, without the zeros where that pays."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from randlora import RandLoRAConfig
from randlora.bases import BasisSpec
from randlora.bases.basis import Basis
from randlora.bases.spec import KINDS, spec_for
from randlora.config import BasisKind
from randlora.functional import Diagonals, Pair, adapted_linear, delta_weight
from tests import reference
from tests.strategies import specs

DENSE = BasisSpec("dense", "portable", 0, 4, 12, 8)


def pair(basis: Basis, max_dim: int, min_dim: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Pair:
    basis.extend(max_dim, min_dim)
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
    torch.testing.assert_close(delta_weight(found, Diagonals(lam, gamma, 1.0), is_wide=True), expected)


def test_one_copy_is_made_per_device_and_dtype_and_none_in_the_dtype_of_storage() -> None:
    basis = Basis(DENSE)
    first, again, other = pair(basis, 12, 8), pair(basis, 10, 6), pair(basis, 12, 8, torch.bfloat16)
    assert first.B.data_ptr() == again.B.data_ptr()
    assert other.B.dtype == torch.bfloat16
    assert other.A.dtype == torch.float32
    for spec in (DENSE, BasisSpec("block", "portable", 0, 8, 48, 32, (2, 4))):
        basis = Basis(spec)
        made = pair(basis, spec.max_dim, spec.min_dim, torch.bfloat16)
        assert made.B.data_ptr() == basis.matrices()[1].values.data_ptr()
    for kind, dtype in (("sparse", torch.bfloat16), ("very_sparse", torch.float16)):
        signs = pair(Basis(BasisSpec(kind, "torch", 0, 8, 48, 30)), 48, 30, dtype).B.unique()  # type: ignore[arg-type]
        assert set(signs.tolist()) == {-1.0, 0.0, 1.0}, "signs are exact in any dtype"


@pytest.mark.parametrize(("blocks", "dims"), [((2, 4), (48, 30)), ((4, 2), (48, 32)), ((1, 4), (40, 8))])
def test_the_zeros_of_block_bases_take_no_room_and_small_ones_are_kept_written_out_too(
    blocks: tuple[int, int], dims: tuple[int, int]
) -> None:
    basis = Basis(BasisSpec("block", "portable", 0, 8, *dims, blocks))
    made = pair(basis, *dims)
    stored = [matrix.values.numel() for matrix in basis.matrices()]
    assert [tensor.untyped_storage().nbytes() for tensor in (made.A, made.B)] == [4 * count for count in stored]
    expected = basis.slices(*dims, device="cpu", dtype=torch.float32)
    assert made.written is not None
    torch.testing.assert_close(made.written.A, expected.A.transpose(0, 1), rtol=0, atol=0)
    torch.testing.assert_close(made.written.B, expected.B.flatten(1), rtol=0, atol=0)


def test_large_block_bases_are_not_written_out() -> None:
    basis = Basis(BasisSpec("block", "portable", 0, 64, 512, 513, (4, 8)))
    assert pair(basis, 513, 512).written is None
    assert pair(basis, 512, 512).written is not None


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("shape", [(30, 48), (48, 30)], ids=["down", "up"])
def test_a_layer_computes_the_same_with_written_out_block_bases(shape: tuple[int, int], tokens: int) -> None:
    """Few tokens take them; asked for a way, the layer multiplies blocks."""
    basis = Basis(BasisSpec("block", "portable", 0, 8, 48, 30, (2, 4)))
    made = pair(basis, 48, 30, torch.float64)
    sizes = ((tokens, shape[1]), (8, 4), (4, 30))
    x, lam, gamma = leaves = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    weight, grad = torch.randn(shape, dtype=torch.float64), torch.randn(tokens, shape[0], dtype=torch.float64)
    found = []
    for compute in ("auto", "factored"):
        output = adapted_linear(x, made, Diagonals(lam, gamma, 0.7), weight=weight, compute=compute)
        found.append((output, *torch.autograd.grad(output, leaves, grad)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("blocks", [None, (2, 4)])
def test_meta_bases_have_shapes_and_draw_nothing_and_a_failure_to_draw_is_raised(
    blocks: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: BasisKind = "block" if blocks else "dense"
    draws: Any = dict.fromkeys(KINDS[kind].draws, lambda *_: 1 / 0)
    basis = Basis(spec_for(RandLoRAConfig(r=4, basis=kind, blocks=blocks), 4, [(12, 8)]))
    with monkeypatch.context() as patch:
        patch.setitem(KINDS, kind, replace(KINDS[kind], draws=draws))
        found = pair(basis, 12, 7, device="meta")
        assert (found.shape.max_dim, found.shape.min_dim) == (12, 7)
        assert found.A.is_meta
        assert found.B.is_meta
        with pytest.raises(ZeroDivisionError):
            pair(basis, 12, 8)
    assert pair(basis, 12, 8).shape.max_dim == 12


def test_a_pair_is_made_once_and_then_looked_up_and_can_be_trained_through() -> None:
    basis = Basis(BasisSpec("very_sparse", "torch", 0, 8, 90, 80))
    basis.extend(90, 80)
    found: list[Pair] = []

    def ask() -> None:
        with torch.inference_mode():
            found.append(pair(basis, 90, 80))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(one is found[0] for one in found)
    assert not found[0].A.is_inference()
    assert not found[0].B.is_inference()
    basis.release()
    assert pair(basis, 90, 80) is not found[0]

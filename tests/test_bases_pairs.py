"""The form in which layers are handed their bases: the same numbers, without the zeros where that pays."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from randlora import RandLoRAConfig
from randlora.bases import BasisSpec
from randlora.bases.basis import Basis
from randlora.bases.spec import KINDS, spec_for
from randlora.config import BasisKind
from randlora.functional import Compute, Diagonals, Pair, adapted_linear, delta_weight
from tests import reference
from tests.strategies import specs


class Products(TorchDispatchMode):
    """Counts the products of blocks."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of_blocks = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        self.of_blocks += func is torch.ops.aten.bmm.default
        return func(*args, **(kwargs or {}))


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


@pytest.mark.parametrize(("blocks", "dims"), [((2, 4), (48, 30)), ((4, 2), (50, 33)), ((1, 4), (40, 8))])
def test_small_block_bases_are_kept_written_out_too(blocks: tuple[int, int], dims: tuple[int, int]) -> None:
    basis = Basis(BasisSpec("block", "portable", 0, 8, *dims, blocks))
    written, expected = pair(basis, *dims).written, basis.slices(*dims, device="cpu", dtype=torch.float32)
    assert written is not None
    torch.testing.assert_close(written.A, expected.A.transpose(0, 1), rtol=0, atol=0)
    torch.testing.assert_close(written.B, expected.B.flatten(1), rtol=0, atol=0)


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
    x, lam, gamma = leaves = [
        torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((tokens, shape[1]), (8, 4), (4, 30))
    ]
    weight, grad = torch.randn(shape, dtype=torch.float64), torch.randn(tokens, shape[0], dtype=torch.float64)
    found = []
    ways: tuple[Compute, ...] = ("auto", "factored")
    for compute in ways:
        with Products() as products:
            output = adapted_linear(x, made, Diagonals(lam, gamma, 0.7), weight=weight, compute=compute)
            gradients = torch.autograd.grad(output, leaves, grad)
        assert (products.of_blocks > 0) == (compute == "factored")
        found.append((output, *gradients))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", ["sparse", "very_sparse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ternary_signs_are_exact_in_any_dtype(kind: str, dtype: torch.dtype) -> None:
    basis = Basis(BasisSpec(kind, "torch", 0, 8, 48, 30))  # type: ignore[arg-type]
    assert set(pair(basis, 48, 30, dtype).B.unique().tolist()) == {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("blocks", [None, (2, 4)])
def test_in_the_dtype_of_storage_nothing_is_copied(blocks: tuple[int, int] | None) -> None:
    basis = Basis(BasisSpec("block" if blocks else "dense", "portable", 0, 8, 48, 32, blocks))
    made = pair(basis, 48, 32, torch.bfloat16)
    assert made.B.data_ptr() == basis.matrices()[1].values.data_ptr()


@pytest.mark.parametrize("blocks", [None, (2, 4)])
def test_meta_bases_have_shapes_and_draw_nothing(
    blocks: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: BasisKind = "block" if blocks else "dense"
    draws: Any = {stream: lambda *_: pytest.fail("drew for a model without values") for stream in KINDS[kind].draws}
    monkeypatch.setitem(KINDS, kind, replace(KINDS[kind], draws=draws))
    basis = Basis(spec_for(RandLoRAConfig(r=4, basis=kind, blocks=blocks), 4, [(12, 8)]))
    found = pair(basis, 12, 7, device="meta")
    assert (found.shape.max_dim, found.shape.min_dim) == (12, 7)
    assert found.A.is_meta
    assert found.B.is_meta


def test_bases_made_in_inference_mode_can_be_trained_through_later() -> None:
    for kind in ("dense", "very_sparse"):
        basis = Basis(BasisSpec(kind, "torch", 0, 8, 90, 80))
        with torch.inference_mode():
            pair(basis, 90, 80)
        assert not pair(basis, 90, 80).B.is_inference()
        assert not pair(basis, 90, 80).A.is_inference()


def test_a_pair_is_made_once_and_then_looked_up() -> None:
    basis = Basis(BasisSpec("dense", "portable", 0, 4, 12, 8))
    basis.extend(12, 8)
    found: list[Pair] = []
    threads = [threading.Thread(target=lambda: found.append(pair(basis, 12, 8))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(one is found[0] for one in found)
    basis.release()
    assert pair(basis, 12, 8) is not found[0]


def test_a_pair_does_not_reach_beyond_what_was_asked_for_before() -> None:
    basis = Basis(BasisSpec("dense", "portable", 0, 4, 12, 8))
    basis.extend(10, 8)
    with pytest.raises(AssertionError, match=r"call extend\(\) first"):
        basis.pair(12, 8, device=torch.device("cpu"), dtype=torch.float32)


def test_a_failure_to_draw_is_raised_where_bases_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    basis = Basis(BasisSpec("dense", "portable", 0, 4, 12, 8))
    basis.extend(12, 8)
    draws: Any = {"portable": lambda *_: 1 / 0}
    with monkeypatch.context() as patch:
        patch.setitem(KINDS, "dense", replace(KINDS["dense"], draws=draws))
        with pytest.raises(ZeroDivisionError):
            pair(basis, 12, 8)
    assert pair(basis, 12, 8).shape.max_dim == 12

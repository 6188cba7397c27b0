"""Bases: deterministic, prefix-stable where they say so, small in storage without losing a bit, shared by content."""

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from randlora.bases import BasisBank, BasisSpec, kinds
from randlora.bases import spec as storage
from randlora.bases.basis import Bases, Basis
from randlora.bases.spec import CompactMatrix
from randlora.errors import ConfigError
from tests.strategies import KINDS_AND_STREAMS, specs

GOLDEN = Path(__file__).parent / "data" / "golden_digests.json"


def slices(spec: BasisSpec, dims: tuple[int, int] | None = None, dtype: torch.dtype = torch.float32) -> Bases:
    return Basis(spec).slices(*(dims or (spec.max_dim, spec.min_dim)), device="cpu", dtype=dtype)


def assert_same(ours: Bases, theirs: Bases) -> None:
    assert torch.equal(ours.A, theirs.A)
    assert torch.equal(ours.B, theirs.B)


def golden_spec(kind: str, stream: str) -> BasisSpec:
    blocks = (2, 4) if kind == "block" else None
    return BasisSpec(kind, stream, 7, 8, 48, 30, blocks)  # type: ignore[arg-type]


# Law 5: determinism


@pytest.mark.parametrize(("kind", "stream"), KINDS_AND_STREAMS)
def test_bases_are_the_committed_ones(kind: str, stream: str) -> None:
    """To add a kind: `json.dumps` of the digests, once, by hand. A digest that changes breaks every saved adapter."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert Basis(golden_spec(kind, stream)).digest(48, 30) == golden[f"{kind}/{stream}"]


@given(specs())
def test_bases_depend_on_nothing_but_their_spec(spec: BasisSpec) -> None:
    first = slices(spec)
    torch.rand(3)
    np.random.default_rng().random(3)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1 if threads > 1 else 2)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            second = slices(spec)
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
    assert_same(first, second)


@given(specs())
def test_drawing_neither_reads_nor_advances_the_global_generators(spec: BasisSpec) -> None:
    torch_before, numpy_before = torch.get_rng_state(), pickle.dumps(np.random.get_state())  # noqa: NPY002
    slices(spec)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert pickle.dumps(np.random.get_state()) == numpy_before  # noqa: NPY002


@given(specs(), st.integers(1, 2**32 - 1))
def test_another_seed_draws_other_bits(spec: BasisSpec, step: int) -> None:
    other = replace(spec, seed=(spec.seed + step) % 2**64)
    dims = (spec.max_dim, spec.min_dim)
    assert Basis(spec).digest(*dims) != Basis(other).digest(*dims)


@given(specs(smallest=6), st.data())
def test_a_layer_slices_the_shared_bases_whatever_was_asked_before(spec: BasisSpec, data: st.DataObject) -> None:
    """`A[:, :, :m]` and `B[:M, :n, :]` of the whole draw, in any order of asking."""
    whole = slices(spec)
    basis = Basis(spec)
    for _ in range(3):
        max_dim = data.draw(st.integers(1, spec.max_dim))
        min_dim = data.draw(st.integers(1, min(max_dim, spec.min_dim)))
        part = basis.slices(max_dim, min_dim, device="cpu", dtype=torch.float32)
        num_bases = -(-min_dim // spec.r)
        assert_same(part, Bases(whole.A[:, :, :min_dim], whole.B[:max_dim, :num_bases]))


# Law 6: the portable stream


@given(specs(prefix_stable=True), st.integers(0, 30), st.integers(0, 30))
def test_a_larger_portable_draw_begins_with_the_smaller(spec: BasisSpec, more_rows: int, more_columns: int) -> None:
    small, dims = slices(spec), (spec.max_dim, spec.min_dim)
    larger = slices(replace(spec, max_dim=spec.max_dim + more_rows, min_dim=spec.min_dim + more_columns))
    assert_same(small, Bases(larger.A[:, :, : dims[1]], larger.B[: dims[0], : spec.num_bases]))


@given(specs(prefix_stable=True))
def test_portable_bases_grow_without_changing_a_bit(spec: BasisSpec) -> None:
    basis = Basis(spec)
    before = basis.digest(spec.max_dim, spec.min_dim)
    basis.extend(spec.max_dim + 9, spec.min_dim + 5)
    assert basis.spec.max_dim == spec.max_dim + 9
    assert basis.digest(spec.max_dim, spec.min_dim) == before


@given(specs(), st.integers(1, 200))
def test_any_chunking_draws_the_same_bits(spec: BasisSpec, chunk: int) -> None:
    whole = slices(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "PORTABLE_CHUNK", chunk)
        patch.setattr(kinds, "TORCH_CHUNK", chunk)
        assert_same(slices(spec), whole)


def test_the_portable_stream_is_the_documented_one() -> None:
    """Row 1 of B, drawn here by hand from Philox: key (seed, version and matrix), counter (0, row), low lanes first."""
    words = np.random.Philox(key=[5, (1 << 8) | 1], counter=[0, 1, 0, 0]).random_raw(4)
    lanes = [word >> shift & 0xFFFFFFFF for word in words.tolist() for shift in (0, 32)]
    uniform = [((lane >> 8) * 2 + 1 - 2**24) / 2**24 for lane in lanes]
    expected = torch.tensor(uniform, dtype=torch.float32).mul(torch.tensor(3.0).sqrt()).to(torch.bfloat16).float()
    found = slices(BasisSpec("dense", "portable", 5, 4, 3, 8)).B[1].flatten()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# The kinds


@given(specs(smallest=8))
def test_entries_have_mean_square_one(spec: BasisSpec) -> None:
    """Exactly one sample standard deviation where the stream normalizes by it, else one in expectation."""
    basis_B = slices(replace(spec, max_dim=600, min_dim=max(spec.min_dim, 24))).B
    if spec.stream != "portable":
        assert basis_B.std().item() == pytest.approx(1, rel=0.005)  # the divisor was rounded to bfloat16
    else:
        assert basis_B.square().mean().item() == pytest.approx(1, rel=0.15)


@given(specs())
def test_ternary_kinds_hold_three_values_and_the_others_bfloat16(spec: BasisSpec) -> None:
    whole = slices(spec)
    for matrix in whole:
        if spec.kind in ("sparse", "very_sparse"):
            assert len(set(matrix.flatten().tolist()) | {0.0}) <= 3
        else:
            assert torch.equal(matrix.to(torch.bfloat16).float(), matrix)


@given(specs(), st.sampled_from([(1, 1), (2, 4), (4, 2), (1, 8), (8, 1)]))
def test_block_entries_are_non_zero_exactly_on_their_stride(spec: BasisSpec, blocks: tuple[int, int]) -> None:
    spec = BasisSpec("block", "portable", spec.seed, 8, spec.max_dim, spec.min_dim, blocks)
    whole = slices(spec)
    for matrix, stride in zip((whole.A[:, 0], whole.B.flatten(1)), blocks, strict=True):
        rows, columns = torch.meshgrid(torch.arange(matrix.shape[0]), torch.arange(matrix.shape[1]), indexing="ij")
        assert torch.equal(matrix != 0, rows % stride == columns % stride)
        assert matrix.abs().max() <= (3 * stride) ** 0.5 * (1 + 2**-8)


def test_very_sparse_has_the_density_of_its_own_min_dim() -> None:
    spec = BasisSpec("very_sparse", "portable", 0, 16, 500, 400)
    assert (slices(spec).B != 0).float().mean().item() == pytest.approx(1 / 20, rel=0.05)
    assert not spec.is_prefix_stable


def test_a_ternary_draw_without_spread_is_refused_before_it_does_harm() -> None:
    with pytest.raises(ConfigError, match=r"standard deviation of 0: use basis='dense'"):
        slices(BasisSpec("very_sparse", "torch", 7, 1, 16, 16))


# Storage


@given(specs())
def test_storage_takes_the_bytes_the_spec_says(spec: BasisSpec) -> None:
    basis = Basis(spec)
    basis.extend(spec.max_dim, spec.min_dim)
    stored = sum(matrix.values.numel() * matrix.values.element_size() for matrix in basis.matrices())
    assert stored == basis.nbytes == spec.nbytes(spec.max_dim, spec.min_dim)


@given(specs(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_matrix_from_a_file_is_kept_without_losing_a_bit(spec: BasisSpec, dtype: torch.dtype) -> None:
    for matrix in slices(spec):
        flat = matrix.flatten(1).to(dtype)
        assert torch.equal(CompactMatrix.from_dense(flat).to_dense(device="cpu", dtype=dtype), flat)


@given(specs())
def test_copying_shares_and_pickling_draws_again(spec: BasisSpec) -> None:
    basis = Basis(spec)
    found = basis.slices(spec.max_dim, spec.min_dim, device="cpu", dtype=torch.float32)
    assert copy.deepcopy(basis) is basis
    data = pickle.dumps(basis)
    assert len(data) < 2000
    assert_same(pickle.loads(data).slices(spec.max_dim, spec.min_dim, device="cpu", dtype=torch.float32), found)


def test_pickling_keeps_bases_that_no_seed_brings_back() -> None:
    spec = BasisSpec("dense", "torch", 0, 2, 6, 4)
    stored = (CompactMatrix.from_dense(torch.randn(2, 4)), CompactMatrix.from_dense(torch.randn(6, 4)))
    basis = Basis(spec, extent=(6, 4), stored=stored)
    twin = pickle.loads(pickle.dumps(basis))
    assert twin.digest(6, 4) == basis.digest(6, 4) != Basis(spec).digest(6, 4)


@given(specs())
def test_a_digest_is_of_the_values_and_of_the_shapes(spec: BasisSpec) -> None:
    """Recomputed here from the slices: a line with the shapes, then float32 values in little-endian order."""
    import hashlib

    dims = (spec.max_dim, spec.min_dim)
    found = slices(spec)
    header = f"A {spec.r}x{spec.min_dim} B {spec.max_dim}x{spec.num_bases * spec.r}\n".encode()
    expected = hashlib.sha256(header + found.A.numpy().tobytes() + found.B.numpy().tobytes())
    assert Basis(spec).digest(*dims) == expected.hexdigest()


# The bank


def test_equal_specs_are_one_object_and_others_are_not() -> None:
    bank, spec = BasisBank(), BasisSpec("dense", "torch", 0, 4, 12, 8)
    first = bank.acquire(spec)
    assert bank.acquire(BasisSpec("dense", "torch", 0, 4, 12, 8)) is first
    assert bank.acquire(replace(spec, seed=1)) is not first
    assert len(bank) == 2


def test_an_existing_set_that_is_large_enough_serves_a_further_adapter() -> None:
    bank, spec = BasisBank(), BasisSpec("dense", "torch", 0, 4, 12, 8)
    held = bank.acquire(spec)
    smaller = replace(spec, max_dim=10, min_dim=6)
    assert bank.find(smaller, used=(10, 6)) is held
    assert bank.find(smaller) is None, "a file wants the very bits it was trained with"


@pytest.mark.parametrize(
    "wanted",
    [
        BasisSpec("dense", "torch", 1, 4, 12, 8),
        BasisSpec("sparse", "torch", 0, 4, 12, 8),
        BasisSpec("dense", "portable", 0, 4, 12, 8),
        BasisSpec("dense", "torch", 0, 2, 12, 8),
        BasisSpec("dense", "torch", 0, 4, 16, 8),
    ],
    ids=["seed", "kind", "stream", "rank", "larger"],
)
def test_bases_of_another_family_or_too_small_ones_do_not_serve(wanted: BasisSpec) -> None:
    bank = BasisBank()
    held = bank.acquire(BasisSpec("dense", "torch", 0, 4, 12, 8))
    held.extend(12, 8)
    assert bank.find(wanted, used=(wanted.max_dim, wanted.min_dim)) is None


def test_portable_bases_serve_larger_layers_too() -> None:
    bank, spec = BasisBank(), BasisSpec("block", "portable", 0, 4, 12, 8, (2, 2))
    held = bank.acquire(spec)
    assert bank.find(replace(spec, max_dim=30, min_dim=20), used=(30, 20)) is held


def test_a_copied_bank_shares_its_bases_and_not_its_list() -> None:
    bank = BasisBank()
    held = bank.acquire(BasisSpec("dense", "torch", 0, 4, 12, 8))
    twin = copy.deepcopy(bank)
    twin.acquire(BasisSpec("dense", "torch", 1, 4, 12, 8))
    assert list(bank) == [held]
    assert next(iter(twin)) is held


ROWS = 2 * storage.CHUNK_ROWS + 3

FORMS = {
    torch.int8: torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0)).sign() * 1.7,
    torch.bfloat16: torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0)).bfloat16().float(),
}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_matrix_is_kept_in_its_smallest_form(form: torch.dtype) -> None:
    kept = CompactMatrix.from_dense(FORMS[form])
    assert kept.values.dtype == form
    assert torch.equal(kept.to_dense(device="cpu", dtype=torch.float32), FORMS[form])


@pytest.mark.parametrize("row", [0, storage.CHUNK_ROWS - 1, storage.CHUNK_ROWS, ROWS - 1])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_one_number_that_a_form_cannot_hold_is_enough_to_keep_the_matrix_itself(form: torch.dtype, row: int) -> None:
    matrix = FORMS[form].clone()
    matrix[row, -1] = 1 / 3
    kept = CompactMatrix.from_dense(matrix)
    assert kept.values is matrix


@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from([1, 2, 4]), st.integers(0, 40))
def test_chunks_of_rows_are_the_rows(rows: int, columns: int, stride: int, wanted: int) -> None:
    values = torch.randn(rows, -(-columns // stride), generator=torch.Generator().manual_seed(0))
    matrix = CompactMatrix(values, columns, scale=0.5, stride=stride)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "CHUNK_ROWS", 3)
        chunks = [chunk.clone() for chunk in matrix.dense_chunks(min(wanted, rows))]
    assert all(len(chunk) <= 3 * stride for chunk in chunks)
    expected = matrix.to_dense(device="cpu", dtype=torch.float32)[:wanted]
    assert torch.equal(torch.cat([torch.empty(0, columns), *chunks]), expected)

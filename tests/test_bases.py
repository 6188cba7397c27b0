"""Bases: deterministic, prefix-stable where they say so, small in storage without losing a bit, shared by content."""

import copy
import hashlib
import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from randlora.bases import BasisBank, BasisSpec, kinds
from randlora.bases import spec as storage
from randlora.bases.basis import Bases, Basis
from randlora.bases.spec import KINDS, PEFT_STREAMS, CompactMatrix
from randlora.config import BasisKind
from randlora.errors import ConfigError
from randlora.functional import Diagonals, Pair, delta_weight
from tests import reference
from tests.further import further
from tests.peer import PEFT_STREAM
from tests.strategies import KINDS_AND_STREAMS, specs

GOLDEN = Path(__file__).parent / "data" / "golden_digests.json"
LARGE = BasisSpec("dense", "torch", 3, 32, 3072, 768)
"""Bases of 2.4 million entries, of which some are others wherever torch rounds twice."""
SMALL = BasisSpec("dense", "torch", 0, 4, 12, 8)


def slices(spec: BasisSpec, dims: tuple[int, int] | None = None, dtype: torch.dtype = torch.float32) -> Bases:
    return Basis(spec).slices(*(dims or (spec.max_dim, spec.min_dim)), device="cpu", dtype=dtype)


def assert_same(ours: Bases, theirs: Bases) -> None:
    assert torch.equal(ours.A, theirs.A)
    assert torch.equal(ours.B, theirs.B)


# Law 5: determinism

GOLDEN_SPECS = {
    f"{kind}/{stream}": BasisSpec(kind, stream, 7, 8, 48, 30, (2, 4) if kind == "block" else None)
    for kind, stream in KINDS_AND_STREAMS
} | {f"dense/{stream} 3072x768": replace(LARGE, stream=stream) for stream in PEFT_STREAMS}
DIGESTS = """
import json, sys
from randlora.bases.basis import Basis
from randlora.bases.spec import BasisSpec
specs = [BasisSpec.from_dict(facts) for facts in json.load(sys.stdin)]
print(json.dumps([Basis(spec).digest(spec.max_dim, spec.min_dim) for spec in specs]))
"""


@pytest.mark.medium
@pytest.mark.parametrize("capability", ["default", further("avx2"), further("avx512")])
def test_bases_are_the_committed_ones_here_and_on_every_cpu(capability: str) -> None:
    """To add a kind: `json.dumps` of the digests, once, by hand. A digest that changes breaks every saved adapter.

    In a process each, as torch chooses once. What this CPU cannot do, torch would do all the same, and crash.
    """
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert {name: Basis(spec).digest(spec.max_dim, spec.min_dim) for name, spec in GOLDEN_SPECS.items()} == golden
    ranks = ("default", "avx2", "avx512")
    here = torch.backends.cpu.get_cpu_capability().lower()
    if capability != "default" and (here not in ranks or ranks.index(here) < ranks.index(capability)):
        pytest.skip(f"the CPU has no {capability}")
    facts = json.dumps([spec.to_dict() for spec in GOLDEN_SPECS.values()])
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", DIGESTS]
    found = subprocess.run(command, env=environment, input=facts, check=True, capture_output=True, text=True).stdout
    assert dict(zip(GOLDEN_SPECS, json.loads(found), strict=True)) == golden


@given(specs(), st.integers(1, 2**32 - 1), st.integers(1, 200))
def test_bases_depend_on_nothing_but_their_spec(spec: BasisSpec, step: int, chunk: int) -> None:
    torch_before, numpy_before = torch.get_rng_state(), pickle.dumps(np.random.get_state())  # noqa: NPY002
    basis, dims = Basis(spec), (spec.max_dim, spec.min_dim)
    first = basis.slices(*dims, device="cpu", dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert pickle.dumps(np.random.get_state()) == numpy_before  # noqa: NPY002
    torch.rand(3)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1 if threads > 1 else 2)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert_same(slices(spec), first)
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "PORTABLE_CHUNK", chunk)
        patch.setattr(kinds, "TORCH_CHUNK", chunk)
        patch.setattr(storage, "CHUNK_ROWS", 3)
        twin = Basis(spec)
        assert_same(twin.slices(*dims, device="cpu", dtype=torch.float32), first)
        assert twin.digest(*dims) == basis.digest(*dims)
    data = pickle.dumps(basis)
    assert len(data) < 2000
    assert_same(pickle.loads(data).slices(*dims, device="cpu", dtype=torch.float32), first)
    assert BasisSpec.from_dict(spec.to_dict()) == spec
    other = replace(spec, seed=(spec.seed + step) % 2**64)
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
    basis = Basis(spec)
    before = basis.digest(*dims)
    basis.extend(dims[0] + more_rows, dims[1] + more_columns)
    assert basis.spec.max_dim == dims[0] + more_rows
    assert basis.digest(*dims) == before


def test_the_portable_stream_is_the_documented_one() -> None:
    """Row 1 of B, drawn here by hand from Philox: key (seed, version and matrix), counter (0, row), low lanes first."""
    words = np.random.Philox(key=[5, (1 << 8) | 1], counter=[0, 1, 0, 0]).random_raw(4)
    lanes = [word >> shift & 0xFFFFFFFF for word in words.tolist() for shift in (0, 32)]
    uniform = [((lane >> 8) * 2 + 1 - 2**24) / 2**24 for lane in lanes]
    expected = torch.tensor(uniform, dtype=torch.float32).mul(torch.tensor(3.0).sqrt()).to(torch.bfloat16).float()
    found = slices(BasisSpec("dense", "portable", 5, 4, 3, 8)).B[1].flatten()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# The streams of PEFT


def peft_dense(spec: BasisSpec) -> tuple[Tensor, Tensor]:
    """Draw dense bases as PEFT 0.21.2 does, with whatever torch is installed: A, then each matrix of B."""
    generator = torch.Generator().manual_seed(spec.seed)

    def uniform(*shape: int) -> Tensor:
        drawn = torch.empty(shape, dtype=torch.bfloat16)
        return nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)

    basis_A = uniform(spec.r, 1, spec.min_dim)
    basis_B = torch.cat([uniform(spec.max_dim, 1, spec.r) for _ in range(spec.num_bases)], dim=1)
    return basis_A / basis_A.std(), basis_B / basis_B.std()


@pytest.mark.parametrize(
    "spec", [LARGE, BasisSpec("dense", "torch", 2**64 - 1, 1, 64, 64), BasisSpec("dense", "torch", 1, 100, 333, 7)]
)
def test_the_installed_torch_draws_one_of_the_two_streams(spec: BasisSpec) -> None:
    if PEFT_STREAM == "torch" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("torch rounds twice here")
    ours = slices(replace(spec, stream=PEFT_STREAM), dtype=torch.bfloat16)
    for found, expected in zip(ours, peft_dense(spec), strict=True):
        assert torch.equal(found, expected)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(["sparse", "very_sparse"]),
    seed=st.integers(0, 2**32),
    r=st.integers(4, 32),
    sides=st.tuples(st.integers(16, 300), st.integers(16, 300)),
)
def test_the_scale_of_a_ternary_basis_is_that_of_peft(
    kind: BasisKind, seed: int, r: int, sides: tuple[int, int]
) -> None:
    """PEFT divides by what torch's ``std`` makes of the float32 entries, we by what their counts are."""
    spec = BasisSpec(kind, "torch", seed, r, max(sides), min(sides))
    for matrix in Basis(spec, extent=(spec.max_dim, spec.min_dim)).matrices():
        assert matrix.scale == (1 / matrix.values.float().std()).item()


# Values and storage


@given(specs(smallest=8))
def test_entries_have_mean_square_one(spec: BasisSpec) -> None:
    """Exactly one sample standard deviation where the stream normalizes by it, else one in expectation."""
    basis_B = slices(replace(spec, max_dim=600, min_dim=max(spec.min_dim, 24))).B
    if spec.stream != "portable":
        assert basis_B.std().item() == pytest.approx(1, rel=0.005)  # the divisor was rounded to bfloat16
    else:
        assert basis_B.square().mean().item() == pytest.approx(1, rel=0.15)


@given(specs(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_values_are_stored_in_few_bytes_and_hashed_as_the_page_on_files_says(
    spec: BasisSpec, dtype: torch.dtype
) -> None:
    """Recomputed here from the slices: a line with the shapes, then float32 values in little-endian order."""
    basis, whole, dims = Basis(spec), slices(spec), (spec.max_dim, spec.min_dim)
    basis.extend(*dims)
    values = [matrix.values for matrix in basis.matrices()]
    assert sum(each.nbytes for each in values) == basis.nbytes == spec.nbytes(*dims)
    assert {each.dtype for each in values} == {KINDS[spec.kind].dtype}
    for matrix in whole:
        if spec.kind in ("sparse", "very_sparse"):
            assert len(set(matrix.flatten().tolist()) | {0.0}) <= 3
        else:
            assert torch.equal(matrix.to(torch.bfloat16).float(), matrix)
        flat = matrix.flatten(1).to(dtype)
        assert torch.equal(CompactMatrix.from_dense(flat).to_dense(device="cpu", dtype=dtype), flat)
    header = f"A {spec.r}x{spec.min_dim} B {spec.max_dim}x{spec.num_bases * spec.r}\n".encode()
    expected = hashlib.sha256(header + whole.A.numpy().tobytes() + whole.B.numpy().tobytes())
    assert basis.digest(*dims) == expected.hexdigest()


@given(specs(), st.sampled_from([(1, 1), (2, 4), (4, 2), (1, 8), (8, 1)]))
def test_block_entries_are_non_zero_exactly_on_their_stride(spec: BasisSpec, blocks: tuple[int, int]) -> None:
    whole = slices(BasisSpec("block", "portable", spec.seed, 8, spec.max_dim, spec.min_dim, blocks))
    for matrix, stride in zip((whole.A[:, 0], whole.B.flatten(1)), blocks, strict=True):
        rows, columns = torch.meshgrid(torch.arange(matrix.shape[0]), torch.arange(matrix.shape[1]), indexing="ij")
        assert torch.equal(matrix != 0, rows % stride == columns % stride)
        assert matrix.abs().max() <= (3 * stride) ** 0.5 * (1 + 2**-8)


def test_very_sparse_has_the_density_of_its_own_min_dim_and_needs_a_spread() -> None:
    spec = BasisSpec("very_sparse", "portable", 0, 16, 500, 400)
    assert (slices(spec).B != 0).float().mean().item() == pytest.approx(1 / 20, rel=0.05)
    assert not spec.is_prefix_stable
    with pytest.raises(ConfigError, match=r"standard deviation of 0: use basis='dense'"):
        slices(BasisSpec("very_sparse", "torch", 7, 1, 16, 16))


# The bank


def test_a_bank_shares_bases_of_one_family_that_are_large_enough() -> None:
    bank = BasisBank()
    held = bank.acquire(SMALL)
    held.extend(12, 8)
    assert bank.acquire(replace(SMALL)) is held
    assert bank.find(replace(SMALL, max_dim=10, min_dim=6), used=(10, 6)) is held
    assert bank.find(replace(SMALL, max_dim=10, min_dim=6)) is None, "a file wants the bits it was trained with"
    for other in ({"seed": 1}, {"kind": "sparse"}, {"stream": "portable"}, {"r": 2}, {"max_dim": 16}):
        wanted = replace(SMALL, **other)
        assert bank.find(wanted, used=(wanted.max_dim, wanted.min_dim)) is None
    twin = copy.deepcopy(bank)
    blocks = BasisSpec("block", "portable", 0, 4, 12, 8, (2, 2))
    grows = twin.acquire(blocks)
    assert twin.find(replace(blocks, max_dim=30, min_dim=20), used=(30, 20)) is grows
    assert (list(bank), next(iter(twin)), len(twin)) == ([held], held, 2)


# The form in which layers are handed them


def pair(basis: Basis, max_dim: int, min_dim: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Pair:
    basis.extend(max_dim, min_dim)
    return basis.pair(max_dim, min_dim, device=torch.device(device), dtype=dtype)


@given(specs(), st.data())
def test_the_form_to_compute_with_means_the_same_bases_as_they_grow(spec: BasisSpec, data: st.DataObject) -> None:
    """Its update is that of the oracle with the bases written out, for any layer that slices them."""
    max_dim = data.draw(st.integers(1, spec.max_dim))
    min_dim = data.draw(st.integers(1, min(max_dim, spec.min_dim)))
    basis = Basis(spec)
    for dims in ((max_dim, min_dim), (spec.max_dim, spec.min_dim)):
        found, num_bases = pair(basis, *dims, torch.float64), -(-dims[1] // spec.r)
        lam, gamma = torch.randn(spec.r, num_bases).double(), torch.randn(num_bases, dims[1]).double()
        written_out = basis.slices(*dims, device="cpu", dtype=torch.float64)
        expected = reference.delta_weight(*written_out, lam, gamma, 1.0, in_features=dims[1])
        torch.testing.assert_close(delta_weight(found, Diagonals(lam, gamma, 1.0), is_wide=True), expected)
        if found.written is not None:  # as those of small blocks are, too
            torch.testing.assert_close(found.written.A, written_out.A.transpose(0, 1), rtol=0, atol=0)
            torch.testing.assert_close(found.written.B, written_out.B.flatten(1), rtol=0, atol=0)


def test_one_copy_is_made_per_device_and_dtype_without_zeros_and_none_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in (replace(SMALL, stream="portable"), BasisSpec("block", "portable", 0, 8, 48, 32, (2, 4))):
        dims, basis = (spec.max_dim, spec.min_dim), Basis(spec)
        with torch.inference_mode():
            first, again, half = pair(basis, *dims), pair(basis, 10, 6), pair(basis, *dims, torch.bfloat16)
        assert first is pair(basis, *dims)
        assert first.B.data_ptr() == again.B.data_ptr()
        assert (half.A.dtype, half.B.dtype) == (torch.float32, torch.bfloat16)
        assert half.B.data_ptr() == basis.matrices()[1].values.data_ptr(), "it is the storage"
        assert not first.A.is_inference()
        assert not first.B.is_inference()
        stored = [matrix.values.numel() for matrix in basis.matrices()]
        assert [tensor.untyped_storage().nbytes() for tensor in (first.A, first.B)] == [4 * each for each in stored]
        draws = dict.fromkeys(KINDS[spec.kind].draws, lambda *_: pytest.fail("drew for a model without values"))
        monkeypatch.setitem(KINDS, spec.kind, replace(KINDS[spec.kind], draws=draws))
        assert pair(Basis(spec), *dims, device="meta").B.is_meta
    for kind, dtype in (("sparse", torch.bfloat16), ("very_sparse", torch.float16)):
        signs = pair(Basis(BasisSpec(kind, "torch", 0, 8, 48, 30)), 48, 30, dtype).B.unique()  # type: ignore[arg-type]
        assert set(signs.tolist()) == {-1.0, 0.0, 1.0}, "signs are exact in any dtype"

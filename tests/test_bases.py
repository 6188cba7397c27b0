"""Bases: deterministic, prefix-stable where they say so, small in storage without losing a bit, of full rank."""

import copy
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora import RandLoRAConfig
from randlora.bases import BasisBank, BasisSpec, kinds
from randlora.bases import spec as storage
from randlora.bases.basis import Bases, Basis
from randlora.bases.kinds import default_blocks
from randlora.bases.spec import KINDS, PEFT_STREAMS, CompactMatrix, count_bases, reach_all, spec_for
from randlora.config import BasisKind
from randlora.errors import CheckpointError, ConfigError
from randlora.functional import Diagonals, Pair, delta_weight
from tests import reference
from tests.checkpoint_files import reseal
from tests.further import further
from tests.kit import adapt, fill, same_bits
from tests.strategies import KINDS_AND_STREAMS, specs

Shape = tuple[int, int]
SMALL = BasisSpec("dense", "torch", 0, 4, 12, 8)
sides = st.integers(1, 130)


def slices(spec: BasisSpec, dims: Shape | None = None, dtype: torch.dtype = torch.float32) -> Bases:
    return Basis(spec).slices(*(dims or (spec.max_dim, spec.min_dim)), device="cpu", dtype=dtype)


def assert_same(ours: Bases, theirs: Bases) -> None:
    assert all(map(torch.equal, ours, theirs))


def part_of(whole: Bases, max_dim: int, min_dim: int, r: int) -> Bases:
    return Bases(whole.A[:, :, :min_dim], whole.B[:max_dim, : count_bases(min_dim, r)])


GOLDEN = Path(__file__).parent / "data" / "golden_digests.json"
GOLDEN_SPECS = {
    f"{kind}/{stream}": BasisSpec(kind, stream, 7, 8, 48, 30, (2, 4) if kind == "block" else None)
    for kind, stream in KINDS_AND_STREAMS
} | {  # of 2.4 million entries, of which some are others wherever torch rounds twice
    f"dense/{stream} 3072x768": BasisSpec("dense", stream, 3, 32, 3072, 768) for stream in PEFT_STREAMS
}
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
        pytest.skip(f"torch finds no {capability} here")
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
    torch.rand(3)  # another state of the generator, another number of threads, and other chunks
    torch.set_num_threads((threads := torch.get_num_threads()) + 1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kinds, "PORTABLE_CHUNK", chunk)
            patch.setattr(kinds, "TORCH_CHUNK", chunk)
            patch.setattr(storage, "CHUNK_ROWS", 3)
            twin = Basis(spec)
            assert_same(twin.slices(*dims, device="cpu", dtype=torch.float32), first)
            assert twin.digest(*dims) == basis.digest(*dims)
    finally:
        torch.set_num_threads(threads)
    data = pickle.dumps(basis)
    assert len(data) < 2000
    assert_same(pickle.loads(data).slices(*dims, device="cpu", dtype=torch.float32), first)
    assert BasisSpec.from_dict(spec.to_dict()) == spec
    other = replace(spec, seed=(spec.seed + step) % 2**64)
    assert Basis(spec).digest(*dims) != Basis(other).digest(*dims)


@given(specs(prefix_stable=True), st.integers(0, 30), st.integers(0, 30))
def test_a_larger_portable_draw_begins_with_the_smaller(spec: BasisSpec, more_rows: int, more_columns: int) -> None:
    dims, more = (spec.max_dim, spec.min_dim), (spec.max_dim + more_rows, spec.min_dim + more_columns)
    assert_same(slices(spec), part_of(slices(replace(spec, max_dim=more[0], min_dim=more[1])), *dims, spec.r))
    basis = Basis(spec)
    before = basis.digest(*dims)
    basis.extend(*more)
    assert (basis.spec.max_dim, basis.spec.min_dim) == more
    assert basis.digest(*dims) == before


def test_the_portable_stream_is_the_documented_one() -> None:
    """Row 1 of B, drawn here by hand from Philox: key (seed, version and matrix), counter (0, row), low lanes first."""
    words = np.random.Philox(key=[5, (1 << 8) | 1], counter=[0, 1, 0, 0]).random_raw(4)
    lanes = [word >> shift & 0xFFFFFFFF for word in words.tolist() for shift in (0, 32)]
    uniform = [((lane >> 8) * 2 + 1 - 2**24) / 2**24 for lane in lanes]
    expected = torch.tensor(uniform, dtype=torch.float32).mul(torch.tensor(3.0).sqrt()).to(torch.bfloat16).float()
    assert torch.equal(slices(BasisSpec("dense", "portable", 5, 4, 3, 8)).B[1].flatten(), expected)


@given(specs(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_values_are_stored_in_few_bytes_and_hashed_as_the_page_says(spec: BasisSpec, dtype: torch.dtype) -> None:
    """A line with the shapes, then float32 values in little-endian order. Blocks are non-zero on their stride alone."""
    basis, whole, dims = Basis(spec), slices(spec), (spec.max_dim, spec.min_dim)
    basis.extend(*dims)
    values = [matrix.values for matrix in basis.matrices()]
    assert sum(each.nbytes for each in values) == basis.nbytes == spec.nbytes(*dims)
    assert {each.dtype for each in values} == {KINDS[spec.kind].dtype}
    for matrix, stride in zip(whole, spec.blocks or (None, None), strict=True):
        if spec.kind in ("sparse", "very_sparse"):
            assert len(set(matrix.flatten().tolist()) | {0.0}) <= 3
        else:
            assert torch.equal(matrix.to(torch.bfloat16).float(), matrix)
        if stride is not None:
            rows, columns = (torch.arange(size) % stride for size in matrix.flatten(1).shape)
            assert torch.equal(matrix.flatten(1) != 0, rows[:, None] == columns)
            assert matrix.abs().max() <= (3 * stride) ** 0.5 * (1 + 2**-8)
        flat = matrix.flatten(1).to(dtype)
        assert torch.equal(CompactMatrix.from_dense(flat).to_dense(device="cpu", dtype=dtype), flat)
    header = f"A {spec.r}x{spec.min_dim} B {spec.max_dim}x{spec.num_bases * spec.r}\n".encode()
    expected = hashlib.sha256(header + whole.A.numpy().tobytes() + whole.B.numpy().tobytes())
    assert basis.digest(*dims) == expected.hexdigest()


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


def pair(basis: Basis, max_dim: int, min_dim: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Pair:
    basis.extend(max_dim, min_dim)
    return basis.pair(max_dim, min_dim, device=torch.device(device), dtype=dtype)


@given(specs(smallest=6), st.data())
def test_a_layer_slices_the_shared_bases_and_computes_with_the_same(spec: BasisSpec, data: st.DataObject) -> None:
    whole, basis = slices(spec, dtype=torch.float64), Basis(spec)
    for _ in range(3):
        max_dim = data.draw(st.integers(1, spec.max_dim))
        min_dim = data.draw(st.integers(1, min(max_dim, spec.min_dim)))
        found, num_bases = pair(basis, max_dim, min_dim, torch.float64), count_bases(min_dim, spec.r)
        written_out = basis.slices(max_dim, min_dim, device="cpu", dtype=torch.float64)
        assert_same(written_out, part_of(whole, max_dim, min_dim, spec.r))
        lam, gamma = torch.randn(spec.r, num_bases).double(), torch.randn(num_bases, min_dim).double()
        expected = reference.delta_weight(*written_out, lam, gamma, 1.0, in_features=min_dim)
        torch.testing.assert_close(delta_weight(found, Diagonals(lam, gamma, 1.0), is_wide=True), expected)
        if found.written is not None:  # as those of small blocks are, too
            assert torch.equal(found.written.A, written_out.A.transpose(0, 1))
            assert torch.equal(found.written.B, written_out.B.flatten(1))


def test_one_copy_is_made_per_device_and_dtype_without_zeros_and_none_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in (replace(SMALL, stream="portable"), BasisSpec("block", "portable", 0, 8, 48, 32, (2, 4))):
        dims, basis = (spec.max_dim, spec.min_dim), Basis(spec)
        with torch.inference_mode():
            first, again, half = pair(basis, *dims), pair(basis, 10, 6), pair(basis, *dims, torch.bfloat16)
        assert first is pair(basis, *dims)
        assert first.B.data_ptr() == again.B.data_ptr()
        assert (half.A.dtype, half.B.dtype) == (torch.float32, torch.bfloat16)
        assert half.B.data_ptr() == basis.matrices()[1].values.data_ptr(), "it is the storage"
        assert not any(tensor.is_inference() for tensor in (first.A, first.B))
        stored = [matrix.values.numel() for matrix in basis.matrices()]
        assert [tensor.untyped_storage().nbytes() for tensor in (first.A, first.B)] == [4 * each for each in stored]
        draws = dict.fromkeys(KINDS[spec.kind].draws, lambda *_: pytest.fail("drew for a model without values"))
        monkeypatch.setitem(KINDS, spec.kind, replace(KINDS[spec.kind], draws=draws))
        assert pair(Basis(spec), *dims, device="meta").B.is_meta
    for kind, dtype in (("sparse", torch.bfloat16), ("very_sparse", torch.float16)):
        signs = pair(Basis(BasisSpec(kind, "torch", 0, 8, 48, 30)), 48, 30, dtype).B.unique()  # type: ignore[arg-type]
        assert set(signs.tolist()) == {-1.0, 0.0, 1.0}, "signs are exact in any dtype"


def test_kinds_are_registered_under_their_names_with_their_streams() -> None:
    assert set(KINDS) == set(get_args(BasisKind))
    assert {(name, stream) for name, kind in KINDS.items() for stream in kind.draws} == set(KINDS_AND_STREAMS)
    flags = [kind.peft_flags for kind in KINDS.values() if kind.peft_flags is not None]
    assert len(flags) == len(set(flags)), "two kinds would be the same to PEFT"
    for kind in KINDS:
        spec = spec_for(RandLoRAConfig(basis=kind), 32, [(8, 8)])
        assert spec_for(RandLoRAConfig(basis=kind), 32, [(3, 8, 8)]) == spec, "that of each matrix of a stack"
        assert (spec.stream, spec.blocks is None) == (("portable", False) if kind == "block" else ("torch", True))


ONE_NUMBER = ("dense", "torch"), ("dense", "torch-2.11"), ("sparse", "torch"), ("very_sparse", "torch")
REFUSED: list[tuple[tuple[Any, ...], str]] = [
    (("dense", "torch", 0, 0, 4, 4), "positive integer"),
    (("dense", "torch", 0, 2, 0, 4), "positive integer"),
    (("dense", "torch", 0, 2, 4, True), "positive integer"),
    (("dense", "portable", 0, 2, 4, 4, (1, 1)), "block"),
    (("block", "portable", 0, 2, 4, 4, None), "block"),
    (("block", "torch", 0, 2, 4, 4, (1, 1)), "block"),
    (
        ("very_sparse", "torch", 7, 1, 16, 16),
        "standard deviation of 0: use a larger r or a different seed, or basis='dense'$",
    ),
    *(((*one, 0, 1, 1, 1), "standard deviation of 0: use a larger r or stream='portable'$") for one in ONE_NUMBER),
]


@pytest.mark.parametrize(("spec", "said"), REFUSED)
def test_a_spec_that_means_no_bases_is_refused(spec: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        slices(BasisSpec(*spec))
    if "stream='portable'" in said:  # and what is advised works
        slices(BasisSpec(spec[0], "portable", *spec[2:]))
        slices(BasisSpec("dense", spec[1], 0, 2, *spec[4:]))


def is_reached(r: int, blocks: Shape, num_bases: int) -> bool:
    """Whether each pair of a class of rows and one of columns has an index p, by going through all of them."""
    c, b = blocks
    return len({(p % b, p // num_bases % c) for p in range(r * num_bases)}) == c * b


@pytest.mark.parametrize(
    ("kind", "side", "r", "expected"),
    [
        ("dense", 768, 32, 768),
        ("very_sparse", 768, 32, 531),  # measured were 533, 152, and 702 for sparse
        ("very_sparse", 768, 6, 152),
        ("sparse", 768, 6, 701),
        ("block", 18, 16, 17),
    ],
)
def test_expected_ranks_and_enough_bases_to_reach_them(kind: BasisKind, side: int, r: int, expected: int) -> None:
    """A smaller layer has the share that the draw for the largest leaves it, unless blocks are cut from it."""
    blocks = KINDS[kind].default_blocks(r, ())
    spec = spec_for(RandLoRAConfig(r=r, basis=kind, blocks=blocks), r, [(side, side), (5, side)])
    assert spec.expected_rank(side, side) == pytest.approx(expected, abs=1 if kind != "block" else 0)
    assert (spec.num_bases - 1) * r < side <= spec.num_bases * r
    if kind != "block":
        assert spec.expected_rank(100, side // 2) == spec.expected_rank(side // 2, 100)
        assert spec.expected_rank(100, side // 2) == pytest.approx(100 * expected / side, abs=1)


def test_default_blocks_of_one_basis_are_fewer_in_a_narrow_a() -> None:
    assert [default_blocks(24, sides) for sides in ({24}, {23}, {24, 23}, {25}, {24, 25})] == [
        (3, 8), (2, 3), (2, 3), (3, 8), (3, 8)
    ]  # fmt: skip


@given(r=st.integers(1, 96), narrow=st.sets(st.integers(1, 500), max_size=3))
def test_default_blocks_reach_all_entries_and_no_larger_ones_do(r: int, narrow: set[int]) -> None:
    counts = {-(-side // r) for side in narrow}
    every = [(c, b) for c, b in product(range(1, r + 1), repeat=2) if r % c == r % b == 0]
    for blocks in every:
        for num_bases in counts:
            assert reach_all(blocks, num_bases) == is_reached(r, blocks, num_bases), (blocks, num_bases)
    c, b = default_blocks(r, narrow)
    entries = min(narrow) if counts == {1} else r
    allowed = [(more_c, more_b) for more_c, more_b in every if more_b <= 8 and (more_c == 1 or entries // more_c >= 8)]
    reaching = [pair for pair in allowed if all(is_reached(r, pair, num_bases) for num_bases in counts)]
    assert (c, b) in reaching
    assert not [pair for pair in reaching if pair != (c, b) and pair[0] >= c and pair[1] >= b]
    if min(counts, default=8) >= 8:
        assert (c, b) == max(allowed)


@pytest.mark.medium
@given(shapes=st.lists(st.tuples(sides, sides), min_size=1, max_size=3), r=st.sampled_from([6, 8, 16, 24, 32, 48, 64]))
@example([(100, 100)], 32)
@example([(300, 260), (32, 50)], 32)
def test_updates_have_the_expected_rank_and_default_blocks_leave_out_nothing(shapes: list[Shape], r: int) -> None:
    """Law 7, and what blocks may leave out that are given, of which the report tells."""
    forms: list[tuple[BasisKind, Shape | None]] = [("dense", None), ("block", None), ("block", default_blocks(r, ()))]
    for basis, blocks in forms:
        model = nn.Sequential(*(nn.Linear(*shape, bias=False, dtype=torch.float64) for shape in shapes))
        report = randlora.inject(model, r, targets="all", basis=basis, blocks=blocks)
        fill(model.double(), spread=1)
        told = re.findall(r"always zero in (.*), which", "".join(report.notes))
        for index, shape in enumerate(shapes):
            update = randlora.delta_weight(model, str(index))
            rank = report.specs[0].expected_rank(*shape)
            assert torch.linalg.matrix_rank(update, rtol=1e-12) == rank
            assert bool((update == 0).any()) == any(str(index) in names.split(", ") for names in told)
            assert blocks is not None or (not told and rank == min(shape))


def test_layers_of_one_rank_share_blocks_and_those_of_another_have_their_own() -> None:
    model = nn.Sequential(nn.Linear(320, 320), nn.Linear(320, 50), nn.Linear(50, 64))
    assert not randlora.plan(model, 32, targets=["0"], basis="block").notes
    report = randlora.inject(model, {"2": 16, ".*": 32}, targets="all", basis="block")
    assert {spec.r: spec.blocks for spec in report.specs} == {32: (4, 2), 16: (2, 4)}
    assert report.notes == ()


def test_blocks_of_earlier_defaults_mean_what_they_did_in_files(tmp_path: Path) -> None:
    """Those did not look at the number of bases."""
    options: dict[str, Any] = {"r": 16, "targets": "all", "basis": "block"}
    old, newer, model = (nn.Sequential(nn.Linear(18, 14, bias=False)) for _ in range(3))
    randlora.inject(newer, **options)
    randlora.save(adapt(old, **options, blocks=(2, 8)), tmp_path)
    reseal(tmp_path, config=RandLoRAConfig(r=16, targets=["0"], basis="block"))
    with pytest.raises(CheckpointError, match=r"blocks=.*, and in the files .*blocks=\(2, 8\)\)"):
        randlora.swap(newer, tmp_path)
    assert "blocks=(2, 8) leave entries of the update always zero in 0" in str(randlora.load(model, tmp_path))
    randlora.serving.combine(model, {"default": 1.0}, name="twin")
    for name in ("default", "twin"):
        assert same_bits(randlora.delta_weight(model, "0", name=name), randlora.delta_weight(old, "0"))

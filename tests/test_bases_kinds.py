"""The registry of kinds of bases, the ranks of their updates, and which entries the blocks of ``block`` reach."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora import RandLoRAConfig
from randlora.bases.kinds import DENSE, default_blocks
from randlora.bases.spec import KINDS, BasisSpec, CompactMatrix, count_bases, reach_all, spec_for
from randlora.config import OPTIONS, BasisKind
from randlora.errors import CheckpointError, ConfigError
from tests.checkpoint_files import reseal
from tests.kit import fill, same_bits
from tests.laws import assert_close
from tests.strategies import KINDS_AND_STREAMS

Shape = tuple[int, int]
sides = st.integers(1, 130)


def divisors(r: int) -> list[int]:
    return [size for size in range(1, r + 1) if r % size == 0]


def is_reached(r: int, blocks: tuple[int, int], num_bases: int) -> bool:
    """Whether each pair of a class of rows and one of columns has an index p, by going through all of them."""
    c, b = blocks
    return len({(p % b, p // num_bases % c) for p in range(r * num_bases)}) == c * b


def layers(*shapes: Shape, **options: Any) -> nn.Module:
    """Make layers ``(out, in)`` with one trained adapter in float64."""
    model = nn.Sequential(*(nn.Linear(wide, out, bias=False, dtype=torch.float64) for out, wide in shapes))
    randlora.inject(model, **{"targets": "all", "basis": "block", **options})
    return fill(model.double(), spread=1)


@pytest.mark.parametrize(
    ("kind", "shape", "r", "expected"),
    [
        ("dense", (768, 768), 32, 768),
        ("very_sparse", (768, 768), 32, 531),  # measured were 533, 152, and 702 for sparse
        ("very_sparse", (768, 768), 6, 152),
        ("sparse", (768, 768), 6, 701),
        ("block", (18, 18), 16, 17),
        ("block", (100, 100), 32, 98),
        ("block", (104, 104), 32, 104),
    ],
)
def test_expected_ranks_and_enough_bases_to_reach_them(kind: BasisKind, shape: Shape, r: int, expected: int) -> None:
    spec = spec_for(RandLoRAConfig(r=r, basis=kind, blocks=KINDS[kind].default_blocks(r, ())), r, [shape])
    assert spec.expected_rank(*shape) == pytest.approx(expected, abs=1 if kind != "block" else 0)
    assert (spec.num_bases - 1) * r < shape[1] <= spec.num_bases * r


@given(
    shape=st.tuples(st.integers(2, 110), st.integers(2, 110)) | st.integers(2, 110).map(lambda side: (side, side)),
    r=st.sampled_from([4, 8, 12, 16, 24, 32]),
)
def test_block_updates_have_the_expected_rank(shape: Shape, r: int) -> None:
    model = nn.Sequential(nn.Linear(*shape, dtype=torch.float64))
    report = randlora.inject(model, r=r, basis="block", blocks=default_blocks(r, ()))  # which may leave entries out
    fill(model)
    assert torch.linalg.matrix_rank(randlora.delta_weight(model, "0"), rtol=1e-11) == report.rows[0].expected_rank


def test_kinds_are_registered_under_their_names_with_their_streams() -> None:
    assert set(KINDS) == set(get_args(BasisKind))
    assert {(name, stream) for name, kind in KINDS.items() for stream in kind.draws} == set(KINDS_AND_STREAMS)
    flags = [kind.peft_flags for kind in KINDS.values() if kind.peft_flags is not None]
    assert len(flags) == len(set(flags)), "two kinds would be the same to PEFT"
    for kind in KINDS:
        spec = spec_for(RandLoRAConfig(basis=kind), 32, [(8, 8)])
        assert spec.stream == ("portable" if kind == "block" else "torch")
        assert (spec.blocks is not None) == (kind == "block")


def test_a_spec_that_means_no_bases_is_refused() -> None:
    for sizes in ((0, 4, 4), (2, 0, 4), (2, 4, True)):
        with pytest.raises(ConfigError, match="positive integer"):
            BasisSpec("dense", "torch", 0, *sizes)
    others: list[Any] = [("dense", "portable", (1, 1)), ("block", "portable", None), ("block", "torch", (1, 1))]
    for kind, stream, blocks in others:
        with pytest.raises(ConfigError, match="block"):
            BasisSpec(kind, stream, 0, 2, 4, 4, blocks)


def test_a_new_kind_is_an_entry_and_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def draw(spec: BasisSpec, max_dim: int, min_dim: int) -> tuple[CompactMatrix, CompactMatrix]:
        columns_B = count_bases(min_dim, spec.r) * spec.r
        sizes = ((spec.r, min_dim), (max_dim, columns_B))
        drawn = [torch.outer(torch.arange(rows), torch.arange(columns)).sin().bfloat16() for rows, columns in sizes]
        return CompactMatrix(drawn[0], min_dim), CompactMatrix(drawn[1], columns_B)

    new_kind: Any = "sine"
    monkeypatch.setitem(KINDS, new_kind, replace(DENSE, draws={"portable": draw}, peft_flags=None))
    monkeypatch.setitem(OPTIONS, "basis", replace(OPTIONS["basis"], type=Literal["dense", "sparse", "block", "sine"]))
    model, x = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)), torch.randn(3, 8)
    with pytest.raises(ConfigError, match="sine bases need stream=portable, got stream='torch'"):
        randlora.plan(model, r=4, targets="all-linear", basis=new_kind, stream="torch")
    spec = randlora.inject(model, r=4, targets="all-linear", basis=new_kind).specs[0]
    assert (spec.kind, spec.stream) == ("sine", "portable")
    fill(model)
    adapted = model(x)
    randlora.save(model, tmp_path / "adapter")
    randlora.eject(model)
    assert not torch.allclose(model(x), adapted)
    randlora.load(model, tmp_path / "adapter")
    assert same_bits(model(x), adapted)
    randlora.merge(model)
    assert_close(model(x).detach(), adapted.detach(), torch.float32)


# Blocks


@given(r=st.integers(1, 96), counts=st.sets(st.integers(1, 12), max_size=3))
def test_default_blocks_reach_all_entries_and_no_larger_ones_do(r: int, counts: set[int]) -> None:
    every = [(c, b) for c in divisors(r) for b in divisors(r)]
    for blocks in every:
        for num_bases in counts:
            assert reach_all(blocks, num_bases) == is_reached(r, blocks, num_bases), (blocks, num_bases)
    c, b = default_blocks(r, counts)
    allowed = [(more_c, more_b) for more_c, more_b in every if more_b <= 8 and (more_c == 1 or r // more_c >= 8)]
    reaching = [pair for pair in allowed if all(is_reached(r, pair, num_bases) for num_bases in counts)]
    assert (c, b) in reaching
    assert not [pair for pair in reaching if pair != (c, b) and pair[0] >= c and pair[1] >= b]
    if min(counts, default=8) >= 8:
        assert (c, b) == max(allowed)


def test_the_table_of_the_docs_has_the_default_blocks() -> None:
    text = (Path(__file__).parents[1] / "docs" / "method_bases.md").read_text(encoding="utf-8")
    for r in (16, 32, 64):
        (row,) = (line for line in text.splitlines() if line.startswith(f"| r = {r} |"))
        blocks = [default_blocks(r, {num_bases, 8, 33}) for num_bases in range(1, 9)]
        assert [cell.strip() for cell in row.split("|")[2:-1]] == [str(each) for each in blocks]


@pytest.mark.medium
@given(shapes=st.lists(st.tuples(sides, sides), min_size=1, max_size=3), r=st.sampled_from([6, 8, 16, 24, 32, 48, 64]))
@example([(100, 100)], 32)
@example([(300, 260), (32, 50)], 32)
def test_default_blocks_leave_out_no_entry_and_no_rank(shapes: list[Shape], r: int) -> None:
    model = layers(*shapes, r=r)
    for index, shape in enumerate(shapes):
        update = randlora.delta_weight(model, str(index))
        assert (update != 0).all()
        assert torch.linalg.matrix_rank(update, rtol=1e-12) == min(shape)


@given(shape=st.tuples(sides, sides), data=st.data())
def test_a_report_says_where_given_blocks_leave_entries_out(shape: Shape, data: st.DataObject) -> None:
    r = data.draw(st.sampled_from([12, 16, 32]))
    blocks = data.draw(st.tuples(*2 * [st.sampled_from(divisors(r))]))
    model = nn.Sequential(nn.Linear(*shape, bias=False), nn.Linear(r * 33, r * 33, bias=False, device="meta"))
    report = randlora.plan(model, r, targets="all", basis="block", blocks=blocks)
    is_left = not is_reached(r, blocks, count_bases(min(shape), r))
    told = [note for note in report.notes if note.startswith("blocks=")]
    assert [f"{blocks} leave entries of the update always zero in 0," in note for note in told] == [True] * is_left


def test_layers_of_one_rank_share_blocks_and_those_of_another_have_their_own() -> None:
    model = nn.Sequential(nn.Linear(320, 320), nn.Linear(320, 50), nn.Linear(50, 64))
    assert not randlora.plan(model, 32, targets=["0"], basis="block").notes
    planned = randlora.plan(model, {"2": 16, ".*": 32}, targets="all", basis="block")
    report = randlora.inject(model, {"2": 16, ".*": 32}, targets="all", basis="block")
    assert planned == report
    assert {spec.r: spec.blocks for spec in report.specs} == {32: (4, 2), 16: (2, 4)}
    assert report.notes == (
        "blocks=(4, 2) instead of (4, 8) for r=32: few bases in 1",
        "blocks=(2, 4) instead of (2, 8) for r=16: few bases in 2",
    )


@pytest.mark.parametrize("shape", [(14, 18), (20, 28)], ids=str)
def test_a_file_with_the_blocks_of_earlier_defaults_means_what_it_did(shape: Shape, tmp_path: Path) -> None:
    """Those did not look at the number of bases."""
    old = layers(shape, r=16, blocks=(2, 8))
    randlora.save(old, tmp_path / "saved")
    reseal(tmp_path / "saved", config=RandLoRAConfig(r=16, targets=["0"], basis="block"))
    update = randlora.delta_weight(old, "0")
    assert not (update != 0).all()
    with pytest.raises(CheckpointError, match=r"blocks=.*, and in the files .*blocks=\(2, 8\)\)"):
        randlora.swap(layers(shape, r=16), tmp_path / "saved")
    model = nn.Sequential(nn.Linear(*shape[::-1], bias=False, dtype=torch.float64))
    report = randlora.load(model, tmp_path / "saved")
    assert "blocks=(2, 8) leave entries of the update always zero in 0" in str(report)
    randlora.save(model, tmp_path / "again")
    randlora.serving.combine(model, {"default": 1.0}, name="twin")
    assert {info.specs[0].blocks for info in randlora.adapters(model)} == {(2, 8)}
    randlora.swap(model, tmp_path / "again", name="default")
    for name in ("default", "twin"):
        assert same_bits(randlora.delta_weight(model, "0", name=name), update)


def test_a_sum_is_on_the_bases_of_its_adapters_if_they_have_other_blocks_than_by_default() -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(14, 18))
    randlora.inject(model, r=8, targets=["0"], basis="block", name="a")
    randlora.inject(model, r=16, targets=["1"], basis="block", blocks=(2, 8), name="b")
    fill(fill(model, "a"), "b")
    randlora.serving.combine(model, {"a": 1.0, "b": 1.0}, name="c")
    assert same_bits(randlora.delta_weight(model, "1", name="c"), randlora.delta_weight(model, "1", name="b"))

"""`block` bases: which entries of an update their blocks reach, and the default blocks, which reach all."""

from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import randlora
from randlora.bases.kinds import default_blocks
from randlora.bases.spec import count_bases, reach_all
from randlora.errors import CheckpointError
from tests.checkpoint_files import reseal
from tests.kit import fill, same_bits

Shape = tuple[int, int]


def divisors(r: int) -> list[int]:
    return [size for size in range(1, r + 1) if r % size == 0]


def is_reached(r: int, blocks: tuple[int, int], num_bases: int) -> bool:
    """Whether each pair of a class of rows and one of columns has an index p, by going through all of them."""
    c, b = blocks
    return len({(p % b, p // num_bases % c) for p in range(r * num_bases)}) == c * b


def layers(*shapes: Shape, **options: object) -> nn.Module:
    """Make layers ``(out, in)`` with one trained adapter in float64."""
    model = nn.Sequential(*(nn.Linear(wide, out, bias=False, dtype=torch.float64) for out, wide in shapes))
    randlora.inject(model, targets="all", basis="block", **options)  # type: ignore[arg-type]
    return fill(model.double(), spread=1)


@pytest.mark.parametrize("r", [*range(1, 25), 32])
def test_blocks_reach_all_entries_if_the_bases_go_around_the_rows(r: int) -> None:
    for c in divisors(r):
        for b in divisors(r):
            for num_bases in range(1, 10):
                assert reach_all((c, b), num_bases) == is_reached(r, (c, b), num_bases), (c, b, num_bases)


@given(r=st.integers(1, 96), counts=st.sets(st.integers(1, 12), max_size=3))
def test_default_blocks_reach_all_entries_and_no_larger_ones_do(r: int, counts: set[int]) -> None:
    c, b = default_blocks(r, counts)
    allowed = [
        (more_c, more_b)
        for more_c in divisors(r)
        for more_b in divisors(r)
        if more_b <= 8 and (more_c == 1 or r // more_c >= 8)
    ]
    reaching = [pair for pair in allowed if all(is_reached(r, pair, num_bases) for num_bases in counts)]
    assert (c, b) in reaching
    assert not [pair for pair in reaching if pair != (c, b) and pair[0] >= c and pair[1] >= b]
    if min(counts, default=8) >= 8:
        assert (c, b) == max(allowed)


@pytest.mark.parametrize("r", [16, 32, 64])
def test_the_table_of_the_docs_has_the_default_blocks(r: int) -> None:
    text = (Path(__file__).parents[1] / "docs" / "method_bases.md").read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith(f"| r = {r} |"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [
        str(default_blocks(r, {num_bases, 8, 33})) for num_bases in range(1, 9)
    ]


sides = st.integers(1, 130)


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
    some = st.sampled_from(divisors(r))
    blocks = data.draw(st.tuples(some, some))
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


def saved_without_blocks(directory: Path, shape: Shape) -> Tensor:
    """Save an adapter as when default blocks did not look at the number of bases; return its update."""
    model = layers(shape, r=16, blocks=(2, 8))
    randlora.save(model, directory)
    reseal(directory, config=randlora.RandLoRAConfig(r=16, targets=["0"], basis="block"))
    return randlora.delta_weight(model, "0")


@pytest.mark.parametrize("shape", [(14, 18), (20, 28)], ids=str)
def test_a_file_with_the_blocks_of_earlier_defaults_means_what_it_did(shape: Shape, tmp_path: Path) -> None:
    update = saved_without_blocks(tmp_path / "saved", shape)
    assert not (update != 0).all()
    model = nn.Sequential(nn.Linear(*shape[::-1], bias=False, dtype=torch.float64))
    report = randlora.load(model, tmp_path / "saved")
    assert "blocks=(2, 8) leave entries of the update always zero in 0" in str(report)
    randlora.save(model, tmp_path / "again")
    randlora.serving.combine(model, {"default": 1.0}, name="twin")
    assert same_bits(randlora.delta_weight(model, "0", name="default"), update)
    assert {info.specs[0].blocks for info in randlora.adapters(model)} == {(2, 8)}
    randlora.swap(model, tmp_path / "again", name="default")
    assert same_bits(randlora.delta_weight(model, "0", name="default"), update)


def test_a_sum_is_on_the_bases_of_its_adapters_if_they_have_other_blocks_than_by_default() -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(14, 18))
    randlora.inject(model, r=8, targets=["0"], basis="block", name="a")
    randlora.inject(model, r=16, targets=["1"], basis="block", blocks=(2, 8), name="b")
    for name in ("a", "b"):
        fill(model, name)
    randlora.serving.combine(model, {"a": 1.0, "b": 1.0}, name="c")
    assert same_bits(randlora.delta_weight(model, "1", name="c"), randlora.delta_weight(model, "1", name="b"))


def test_an_adapter_with_other_default_blocks_is_not_taken_for_that_of_a_file(tmp_path: Path) -> None:
    saved_without_blocks(tmp_path, (14, 18))
    model = layers((14, 18), r=16)
    with pytest.raises(CheckpointError, match=r"blocks=\(1, 8\)\), and in the files .*blocks=\(2, 8\)\)"):
        randlora.swap(model, tmp_path)

"""The identity of a pair of bases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora import RandLoRAConfig
from randlora.bases import BasisSpec
from randlora.bases.kinds import block_parts, default_blocks
from randlora.bases.spec import spec_for
from randlora.errors import ConfigError
from tests.kit import fill
from tests.strategies import specs


@given(specs())
def test_spec_survives_its_dict(spec: BasisSpec) -> None:
    assert BasisSpec.from_dict(spec.to_dict()) == spec


@given(specs())
def test_enough_bases_to_reach_full_rank_and_no_more(spec: BasisSpec) -> None:
    assert (spec.num_bases - 1) * spec.r < spec.min_dim <= spec.num_bases * spec.r


@pytest.mark.parametrize(
    ("kind", "r", "expected"),
    [("dense", 32, 768), ("very_sparse", 32, 531), ("very_sparse", 6, 152), ("sparse", 6, 701), ("sparse", 32, 768)],
)
def test_expected_rank_of_a_layer_of_768(kind: str, r: int, expected: int) -> None:
    """Measured were 533 and 152 for very_sparse, 702 for sparse at r = 6."""
    config = RandLoRAConfig(r=r, basis=kind)  # type: ignore[arg-type]
    assert spec_for(config, r, [(768, 768)]).expected_rank(768, 768) == pytest.approx(expected, abs=1)


sides = st.integers(2, 110)


@given(shape=st.tuples(sides, sides) | sides.map(lambda side: (side, side)), r=st.sampled_from([4, 8, 12, 16, 24, 32]))
def test_block_updates_have_the_expected_rank(shape: tuple[int, int], r: int) -> None:
    model = nn.Sequential(nn.Linear(*shape, dtype=torch.float64))
    report = randlora.inject(model, r=r, basis="block", blocks=default_blocks(r, ()))  # which may leave entries out
    fill(model)
    assert torch.linalg.matrix_rank(randlora.delta_weight(model, "0"), rtol=1e-11) == report.rows[0].expected_rank


@given(max_dim=sides, min_dim=sides, r=st.integers(1, 40), data=st.data())
def test_the_parts_of_a_block_update_share_out_its_rows_and_columns(
    max_dim: int, min_dim: int, r: int, data: st.DataObject
) -> None:
    divisors = st.sampled_from([size for size in range(1, r + 1) if r % size == 0])
    parts = block_parts(max_dim, min_dim, r, (data.draw(divisors), data.draw(divisors)))
    assert [sum(part[side] for part in parts) for side in (0, 1)] == [max_dim, min_dim]


@pytest.mark.parametrize(
    ("shape", "r", "expected"), [((18, 18), 16, 17), ((100, 100), 32, 98), ((104, 104), 32, 104), ((768, 768), 32, 768)]
)
def test_expected_rank_of_block_updates(shape: tuple[int, int], r: int, expected: int) -> None:
    """All sides that b divides are full, and all layers of many bases."""
    config = RandLoRAConfig(r=r, basis="block", blocks=default_blocks(r, ()))
    assert spec_for(config, r, [shape]).expected_rank(*shape) == expected


@pytest.mark.parametrize("basis", ["dense", "sparse", "very_sparse", "block"])
def test_stream_defaults_to_the_one_the_kind_has(basis: str) -> None:
    spec = spec_for(RandLoRAConfig(basis=basis), 32, [(8, 8)])  # type: ignore[arg-type]
    assert spec.stream == ("portable" if basis == "block" else "torch")
    assert (spec.blocks is not None) == (basis == "block")


@pytest.mark.parametrize("sizes", [(0, 4, 4), (2, 0, 4), (2, 4, -1), (2, 4, True)], ids=str)
def test_sizes_that_are_no_positive_integers_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="positive integer"):
        BasisSpec("dense", "torch", 0, *sizes)


@pytest.mark.parametrize(("kind", "blocks"), [("dense", (1, 1)), ("block", None)])
def test_blocks_go_with_block_and_with_nothing_else(kind: str, blocks: tuple[int, int] | None) -> None:
    with pytest.raises(ConfigError, match="block"):
        BasisSpec(kind, "portable", 0, 2, 4, 4, blocks)  # type: ignore[arg-type]


@given(specs())
def test_bytes_are_those_of_the_numbers_stored(spec: BasisSpec) -> None:
    c, b = spec.blocks or (1, 1)
    numbers = spec.r * math.ceil(spec.min_dim / c) + spec.max_dim * spec.num_bases * (spec.r // b)
    assert spec.nbytes(spec.max_dim, spec.min_dim) == numbers * (2 if spec.kind in ("dense", "block") else 1)

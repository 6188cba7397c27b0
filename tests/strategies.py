"""Hypothesis strategies for the sizes and options that the laws range over."""

from typing import get_args

import pytest
from hypothesis import strategies as st

from randlora.bases.kinds import default_blocks
from randlora.bases.spec import BasisSpec
from randlora.config import BasisKind, Init, Stream

KINDS_AND_STREAMS: tuple[tuple[BasisKind, Stream], ...] = (
    ("dense", "torch"),
    ("dense", "torch-2.11"),
    ("sparse", "torch"),
    ("very_sparse", "torch"),
    ("dense", "portable"),
    ("sparse", "portable"),
    ("very_sparse", "portable"),
    ("block", "portable"),
)

every_start = pytest.mark.parametrize("init", get_args(Init))

seeds = st.integers(0, 2**64 - 1)
sides = st.integers(1, 24)
ranks = st.integers(1, 12)


@st.composite
def specs(draw: st.DrawFn, *, smallest: int = 4, largest: int = 40, prefix_stable: bool = False) -> BasisSpec:
    """Specs of bases large enough that a ternary draw is not all zeros by bad luck."""
    pairs = [(k, s) for k, s in KINDS_AND_STREAMS if not prefix_stable or (s == "portable" and k != "very_sparse")]
    kind, stream = draw(st.sampled_from(pairs))
    r = draw(st.integers(smallest, 16))
    dims = sorted(draw(st.tuples(st.integers(smallest, largest), st.integers(smallest, largest))))
    divisors = [size for size in range(1, r + 1) if r % size == 0]
    blocks = draw(
        st.one_of(st.just(default_blocks(r, ())), st.tuples(st.sampled_from(divisors), st.sampled_from(divisors)))
    )
    return BasisSpec(kind, stream, draw(seeds), r, dims[1], dims[0], blocks if kind == "block" else None)

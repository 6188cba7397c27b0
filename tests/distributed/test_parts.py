"""What part of a sharded parameter a process holds, in integers, is what torch finds with tensors."""

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from randlora.places import values_within
from randlora.sharded.places import is_split, part_at

placed = st.one_of(
    st.integers(0, 1).map(Shard),
    st.builds(lambda dim, pieces: _StridedShard(dim, split_factor=pieces), st.integers(0, 1), st.integers(1, 3)),
    st.sampled_from([Replicate(), Partial()]),
)
split = st.integers(1, 3).flatmap(
    lambda ndim: st.tuples(
        st.lists(placed, min_size=ndim, max_size=ndim), st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim)
    )
)


@given(st.tuples(st.integers(0, 9), st.integers(1, 9)), split, st.data())
def test_the_part_is_that_which_torch_finds(
    shape: tuple[int, int], split: tuple[list[Any], list[int]], data: st.DataObject
) -> None:
    placements, mesh = split
    coordinate = [data.draw(st.integers(0, processes - 1)) for processes in mesh]
    values = expected = torch.arange(math.prod(shape)).view(shape)
    for placement, processes, index in zip(placements, mesh, coordinate, strict=True):
        if is_split(placement):
            parts, _ = placement._split_tensor(expected, processes, with_padding=False)
            expected = parts[index]
    assert torch.equal(values_within(values, part_at(shape, placements, mesh, coordinate)), expected)

"""What part of a sharded parameter a process holds, in integers, is what torch finds with tensors."""

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from randlora.placement.dtensor import are_even, part_at

placed = st.one_of(st.integers(0, 1).map(Shard), st.sampled_from([Replicate(), Partial()]))
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
    assert are_even(placements)
    sizes, offsets = _compute_local_shape_and_global_offset(shape, tuple(mesh), coordinate, placements)
    found = part_at(shape, placements, mesh, coordinate)
    values = torch.arange(math.prod(shape)).view(shape)
    expected = values[tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))]
    assert values[found].shape == tuple(sizes)
    assert torch.equal(values[found], expected)


def test_other_splits_are_left_to_torch() -> None:
    assert not are_even([Replicate(), _StridedShard(0, split_factor=2)])

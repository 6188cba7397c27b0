"""The processes compute together, and what fails in one of them fails the test."""

import pytest
import torch
import torch.distributed as dist

from tests.distributed.processes import PAIR, ProcessError, on_all


def total(value: float) -> float:
    tensor = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(tensor)
    return tensor.item()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"as rank {rank} was told")


def test_what_fails_in_one_of_them_is_raised_and_the_next_call_works() -> None:
    with pytest.raises(ProcessError, match=r"rank 1: (.|\n)*ValueError: as rank 1 was told"):
        PAIR.run(fail_on, 1)
    assert PAIR.run(total, 2.0) == [5.0, 5.0]
    assert PAIR.run(on_all, 2) == [[2, 2], [2, 2]]

"""The processes themselves: they compute together, report what fails, and go on after that."""

import pytest
import torch
import torch.distributed as dist

from tests.distributed.processes import ProcessError, Processes


def total(value: float) -> float:
    tensor = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(tensor)
    return tensor.item()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"as rank {rank} was told")


def wait_for_ever() -> None:
    if dist.get_rank() == 0:
        dist.barrier()


def test_processes_compute_together(pair: Processes) -> None:
    assert pair.run(total, 1.0) == [3.0, 3.0]


def test_what_fails_in_one_of_them_is_raised_and_the_next_call_works(pair: Processes) -> None:
    with pytest.raises(ProcessError, match=r"rank 1: (.|\n)*ValueError: as rank 1 was told"):
        pair.run(fail_on, 1)
    assert pair.run(total, 2.0) == [5.0, 5.0]


def test_processes_that_wait_for_ever_are_stopped(pair: Processes) -> None:
    with pytest.raises(ProcessError, match="rank 0 did not return"):
        pair.run(wait_for_ever, seconds=2)
    assert pair.run(total, 2.0) == [5.0, 5.0]


def test_four_processes(four: Processes) -> None:
    assert four.run(total, 0.0) == [6.0] * 4

"""Measurements in processes of their own."""

import pytest
import torch

from benchmarks.processes import held_bytes, in_own_process, peak_bytes

pytestmark = pytest.mark.medium

MIB = 2**20


def rise(mebibytes: int) -> tuple[int, int]:
    before = held_bytes()
    for _ in range(2):
        torch.ones(mebibytes * MIB, dtype=torch.uint8)
    return peak_bytes() - before, held_bytes() - before


def test_a_peak_is_what_was_held_at_once_and_what_was_freed_is_held_no_more() -> None:
    peak, held = in_own_process(rise, 200)
    assert 200 * MIB <= peak < 300 * MIB
    assert held < 100 * MIB


def test_a_process_computes_with_as_many_threads_as_its_parent() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert in_own_process(torch.get_num_threads) == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_a_process_that_ends_without_a_result_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match=r"divmod\(1, 0\) ended with status 1"):
        in_own_process(divmod, 1, 0)
    assert "ZeroDivisionError" in capfd.readouterr().err

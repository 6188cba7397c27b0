"""The example docs/examples/tensor_parallel.py, launched as a user would."""

from pathlib import Path

import pytest

from tests.distributed.test_data_parallel_example import assert_learned, launch

NAME = "tensor_parallel"


@pytest.mark.medium
def test_the_example_trains(tmp_path: Path) -> None:
    assert_learned(launch(tmp_path, example=NAME), tmp_path / "out", NAME)

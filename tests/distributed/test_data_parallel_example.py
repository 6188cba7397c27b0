"""The example docs/examples/data_parallel.py, launched as a user would and with each of its engines."""

import os
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import randlora
from tests.distributed.engines import deepspeed, needs_deepspeed
from tests.distributed.processes import Processes
from tests.examples import imported
from tests.further import further

ROOT = Path(__file__).parents[2]


def launch(tmp_path: Path, example: str = "data_parallel") -> str:
    """Run an example on two processes; return what it prints."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, f"docs/examples/{example}.py", "--steps", "40", "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def assert_learned(printed: str, directory: Path, name: str = "data_parallel") -> None:
    """Assert that the adapter was saved, loads, and is better than none."""
    assert "step 40: loss" in printed
    assert printed.count("saved 'default'") == 1
    example = imported(name)
    model = example.pretrained()
    x, y = example.batch(torch.Generator().manual_seed(9))
    before = (model(x) - y).square().mean()
    randlora.load(model, directory)
    assert (model(x) - y).square().mean() < before / 2


@pytest.mark.medium
def test_the_example_trains_with_ddp(tmp_path: Path) -> None:
    assert_learned(launch(tmp_path), tmp_path / "out")


def run(out: Path, stage: int) -> str:
    """Run the example in a process that is in a group already; return what it prints."""
    deepspeed()
    printed = StringIO()
    in_a_group = mock.patch.multiple(dist, init_process_group=mock.DEFAULT, destroy_process_group=mock.DEFAULT)
    with in_a_group, redirect_stdout(printed):
        imported("data_parallel").main(40, out, stage)
    return printed.getvalue()


@pytest.mark.medium
@needs_deepspeed
@pytest.mark.parametrize("stage", [further(2), 3])
def test_the_example_trains_with_deepspeed(zero_pair: Processes, tmp_path: Path, stage: int) -> None:
    assert_learned("".join(zero_pair.run(run, tmp_path / "out", stage)), tmp_path / "out")

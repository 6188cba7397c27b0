"""`randlora demo` does what it says, on what it makes itself."""

import json
from pathlib import Path

import pytest
import torch

import randlora
from randlora.__main__ import main


def test_the_demo_learns_and_gives_the_same_outputs_after_saving_and_merging(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_rng_state()
    assert main(["demo", "--json", "--keep", str(tmp_path / "kept")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["after"] < found["before"] / 5
    assert (found["loads_equal"], found["passed"]) == (True, True)
    assert found["merged_apart"] < 1e-5
    assert randlora.files.verify(tmp_path / "kept").passed
    assert torch.equal(torch.get_rng_state(), before)


def test_the_demo_tells_of_every_step_and_replaces_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    shown = capsys.readouterr().out
    calls = ["inject", "save", "load", "merge", "files.verify"]
    assert [f"randlora.{call}(" in shown for call in calls] == [True] * len(calls)
    assert max(map(len, shown.splitlines())) <= 84
    assert main(["demo", "--keep", str(tmp_path)]) == 1

"""What `save` writes depends on the adapter alone: not on the process, and not on whether it was loaded meanwhile."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import randlora
from tests.checkpoint_files import CASES, HEADED, Case, Stored, both_ways, every_case, trained
from tests.golden import BODIES, GOLDEN, Golden, build, plain
from tests.model_directories import contents

every_golden = pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.name)


def saved(model: nn.Module, directory: Path, bases: Stored = "seed") -> dict[str, bytes]:
    """Save an adapter and return the bytes of all files by name."""
    randlora.save(model, directory, bases=bases)
    return contents(directory)


def digests(parent: Path) -> dict[str, str]:
    """Save adapters of every kind and return the SHA-256 of each file."""
    models = {golden.name: (build(golden), golden.stored) for golden in GOLDEN}
    models |= {case.name: (trained(case), "seed") for case in CASES}
    unordered = {"0", "2"}, {"head", "norm", "body.0.bias", "body.2.bias"}
    models["sets"] = trained(HEADED, targets=unordered[0], train_also=unordered[1]), "seed"
    return {
        f"{name}/{file}": hashlib.sha256(data).hexdigest()
        for name, (model, bases) in models.items()
        for file, data in saved(model, parent / name, bases).items()
    }


@every_golden
def test_an_adapter_is_saved_to_the_same_bytes_again_over_it_and_after_loading(golden: Golden, tmp_path: Path) -> None:
    model = build(golden)
    first = saved(model, tmp_path / "first", golden.stored)
    assert saved(model, tmp_path / "second", golden.stored) == first
    assert saved(model, tmp_path / "first", golden.stored) == first
    loaded = plain(BODIES[golden.body])
    randlora.load(loaded, tmp_path / "first")
    assert saved(loaded, tmp_path / "third", golden.stored) == first


@every_case
@both_ways
def test_an_adapter_of_any_model_is_saved_to_the_same_bytes_after_loading(
    case: Case, bases: Stored, tmp_path: Path
) -> None:
    first = saved(trained(case), tmp_path / "first", bases)
    model = case.build()
    randlora.load(model, tmp_path / "first")
    assert saved(model, tmp_path / "second", bases) == first


@pytest.mark.medium
def test_two_processes_that_hash_differently_save_the_same_bytes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    command = [sys.executable, "-m", "tests.test_checkpoint_same_bytes", str(tmp_path / "other")]
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300)
    own = digests(tmp_path / "own")
    assert json.loads(run.stdout) == own
    assert len(own) == 3 * (len(GOLDEN) + len(CASES) + 1)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(digests(Path(sys.argv[1]))))

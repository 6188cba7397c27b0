"""No input of the corpus breaks a promise; a target sees a check that is gone, and limits hold."""

import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from randlora.checkpoint.read import read_adapter
from randlora.errors import CheckpointError
from tests.fuzz.files import CORPUS, tree
from tests.fuzz.limits import Violation, bounded, writing_only
from tests.fuzz.mutate import parse, reseal, unparse
from tests.fuzz.targets import TARGETS
from tests.test_golden import DATA

SLOW = {"adapter", "checkpoint", "command_line"}  # that load models, or import transformers and bitsandbytes
INPUTS = [
    pytest.param(name, path, id=f"{name}/{path.name}", marks=pytest.mark.medium if name in SLOW else ())
    for name in TARGETS
    for path in sorted((CORPUS / name).iterdir())
]


@pytest.mark.parametrize(("name", "path"), INPUTS)
def test_no_input_of_the_corpus_breaks_a_promise(name: str, path: Path) -> None:
    TARGETS[name].run(path.read_bytes())


CHECKS: list[tuple[str, str, Any]] = [
    ("adapter", "randlora.checkpoint.tensors._shape_problems", lambda *_, **__: []),
    ("peft_config", "randlora.checkpoint.peft_config.peft_kind", lambda _: "dense"),
    ("patterns", "randlora.config.NO_REGEX", ()),
    ("command_line", "randlora.cli.app.FILES_ERROR", 0),
]


@pytest.mark.medium
@pytest.mark.parametrize(("name", "place", "broken"), CHECKS)
def test_a_check_that_is_gone_is_seen_from_the_corpus(
    name: str, place: str, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, broken)
    inputs = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    with pytest.raises((Exception, Violation)):
        list(map(TARGETS[name].run, inputs))


def test_a_call_that_uses_too_much_is_stopped() -> None:
    with Path("/dev/zero").open("rb", buffering=0) as zeros:
        for busy in (int, partial(zeros.read, 2**20)):  # in Python, and in the system
            begin = time.process_time()
            with pytest.raises(Violation), bounded(0.2, 100):
                all(True for _ in iter(busy, 1))
            assert time.process_time() - begin < 1
    with pytest.raises(RuntimeError), bounded(0.2, 100):
        torch.empty(2**30)
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)


def test_writing_is_refused_outside_of_a_directory(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for place in (inside, outside):
        place.mkdir()
        (place / "y").write_text("y")
    with writing_only(inside):
        (inside / "x").write_text("x")
        (inside / "x").rename(inside / "y")
        for write in ((inside / ".." / "outside" / "x").touch, lambda: (inside / "y").rename(outside / "y")):
            with pytest.raises(PermissionError):
                write()
    assert tree(tmp_path) == {"inside": "folder", "inside/y": b"x", "outside": "folder", "outside/y": b"y"}


@pytest.mark.parametrize("name", ["golden_v1_stored", "golden_v2_options"])
def test_a_file_that_is_sealed_again_is_read_and_one_that_is_not_is_refused(name: str, tmp_path: Path) -> None:
    path = Path(shutil.copytree(DATA / name, tmp_path / name)) / "adapter_model.safetensors"
    file = parse(path.read_bytes())
    file["__metadata__"]["randlora"]["library_version"] = "another"
    path.write_bytes(unparse(file))
    with pytest.raises(CheckpointError, match="checksum"):
        read_adapter(path.parent)
    reseal(file)
    path.write_bytes(unparse(file))
    assert (header := read_adapter(path.parent).header)
    assert header.library_version == "another"

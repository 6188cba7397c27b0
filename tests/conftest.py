"""Set-up shared by all tests: Hypothesis profiles, one thread a process, a fixed seed."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.further import leave_to_slow
from tests.torture.faults import fast_disk

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, which accelerate imports, prints what it found
if os.environ.setdefault("OMP_NUM_THREADS", "1") == "1":  # the processes that tests start take it from there
    torch.set_num_threads(1)  # the tests run in parallel, and on small tensors threads only get in each other's way

settings.register_profile("quick", max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Give every test the same random weights, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _without_compiled_programs(request: pytest.FixtureRequest) -> None:
    """Forget what other tests compiled: the compiler counts the programs of one code, whatever model they are of."""
    if request.node.get_closest_marker("medium") and (dynamo := sys.modules.get("torch._dynamo")):
        dynamo.reset()


@pytest.fixture
def fast_path() -> Iterator[Path]:
    """A directory where flushing takes no time."""
    with fast_disk() as directory:
        yield directory


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Hub that huggingface_hub's client talks to, with ``tmp_path`` as the directory that it works in."""
    from tests.hub_server import running_hub

    with running_hub(tmp_path, monkeypatch) as running:
        yield running


@pytest.fixture(scope="session")
def without_transformers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process with this package, and without transformers, which takes seconds to import."""
    lacking = tmp_path_factory.mktemp("lacking")
    (lacking / "transformers.py").write_text("raise ImportError", encoding="utf-8")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(lacking), str(Path(__file__).parent.parent)])}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave combinations that further values of two tables make to `make slow`, before it is chosen what to run."""
    leave_to_slow(items)


def pytest_collection_finish() -> None:
    """Keep what was imported out of the garbage collector's rounds, some of which tests ask for themselves."""
    gc.collect()
    gc.freeze()

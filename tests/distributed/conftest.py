"""The processes that the tests here share, and their mark."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.engines import LACKING, has_deepspeed
from tests.distributed.processes import For, Processes

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.distributed)


@pytest.fixture(scope="session")
def pair() -> Iterator[Processes]:
    """Two processes with gloo."""
    processes = Processes(2)
    yield processes
    processes.stop()


@pytest.fixture(scope="session")
def zero_pair() -> Iterator[Processes]:
    """Two processes for DeepSpeed, which replaces ``torch.nn.functional.linear`` in them."""
    processes = Processes(2)
    yield processes
    processes.stop()


@pytest.fixture
def processes_of(request: pytest.FixtureRequest) -> For:
    """Give two processes for an engine by its name, and skip the test if that needs DeepSpeed and there is none."""

    def given(engine: str) -> Processes:
        is_zero = engine.lower().startswith("zero")
        if is_zero and not has_deepspeed:
            pytest.skip(LACKING)
        found: Processes = request.getfixturevalue("zero_pair" if is_zero else "pair")
        return found

    return given


@pytest.fixture(scope="session")
def four() -> Iterator[Processes]:
    """Four processes with gloo, for meshes of two dimensions."""
    processes = Processes(4)
    yield processes
    processes.stop()

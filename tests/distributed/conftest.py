"""The groups of processes that the tests here share, and how a test comes to run in one of them."""

import inspect
import tempfile
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from hypothesis import is_hypothesis_test

from tests.distributed.engines import LACKING, has_deepspeed
from tests.distributed.processes import FOUR, PAIR, ZERO_PAIR, import_once, run_test

HERE = Path(__file__).parent


def pytest_sessionstart(session: pytest.Session) -> None:
    """Import while tests are collected. This is only called if it is for these tests that pytest was started."""
    capture: Any = session.config.pluginmanager.getplugin("capturemanager")
    capture.resume_global_capture()  # what the processes print belongs to the tests
    import_once()
    capture.suspend_global_capture()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.distributed)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if (mark := pyfuncitem.get_closest_marker("in_group")) is None:
        return None
    (group,) = mark.args
    if "zero" in str(pyfuncitem.funcargs.get("engine", "")).lower() and group is PAIR:
        group = ZERO_PAIR
    if group is ZERO_PAIR and not has_deepspeed:
        pytest.skip(LACKING)
    function: Any = pyfuncitem.obj

    def together(**arguments: Any) -> None:
        if place := arguments.get("tmp_path"):  # each example has an empty directory
            arguments["tmp_path"] = Path(tempfile.mkdtemp(dir=place))
        group.run(run_test, function.__module__, function.__name__, arguments)

    if is_hypothesis_test(function):
        function.hypothesis.inner_test = wraps(function.hypothesis.inner_test)(together)
        return None
    together(**{name: pyfuncitem.funcargs[name] for name in inspect.signature(function).parameters})
    return True


def pytest_unconfigure() -> None:
    for group in (PAIR, ZERO_PAIR, FOUR):
        group.stop()

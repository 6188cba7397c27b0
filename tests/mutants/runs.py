"""What children do in a copy of the tree: run a file of tests and say which lines each runs, or run chosen tests."""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from coverage import Coverage, CoverageData

from tests.mutants.copies import Copy

UNWRITTEN = "ignore::pytest.PytestAssertRewriteWarning"  # plugins were imported before
ARGUMENTS = ("-q", "--tb=short", "-m", "not slow", "-p", "no:cacheprovider", "--hypothesis-seed=0", "-W", UNWRITTEN)
OPTIONS: dict[str, Any] = {"source": ["randlora"], "config_file": False, "messages": False}


def run(copy: Copy, plugin: object, *arguments: str) -> int:
    given = [*ARGUMENTS, f"--basetemp={copy.place / 'temporary'}", *arguments]
    return int(pytest.main(given, plugins=[plugin]))


class Contexts:
    """A plugin of pytest that makes each test a context of the coverage, and times it."""

    def __init__(self, coverage: Coverage, directory: str) -> None:
        self.coverage, self.directory = coverage, directory
        self.seconds: dict[str, float] = defaultdict(float)
        self.passed: dict[str, bool] = {}
        self.now = ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        cpu = sum(os.times()[:4])
        self.now = item.nodeid
        self.coverage.switch_context(item.nodeid)
        try:
            return (yield)
        finally:
            self.coverage.switch_context("")
            self.now = ""
            self.seconds[item.nodeid] += sum(os.times()[:4]) - cpu  # the wall's time is long on a busy machine

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed[report.nodeid] = self.passed.get(report.nodeid, True) and report.passed

    def pytest_collection_finish(self) -> None:
        """Have the functions that the distributed tests run in other processes measured there."""
        if "tests.distributed.processes" not in sys.modules:
            return
        processes = sys.modules["tests.distributed.processes"].Processes
        run = processes.run

        def measured(group: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            call = pickle.dumps((function, args, kwargs))
            answers = run(group, traced, self.directory, self.now, call)
            self.seconds[self.now] += sum(used for _, used in answers)
            return [answer for answer, _ in answers]

        processes.run = measured


def traced(directory: str, context: str, call: bytes) -> tuple[Any, float]:
    """Return what a function returns in this process, and the seconds it took, and write which lines it ran."""
    began = time.process_time()
    function, args, kwargs = pickle.loads(call)
    coverage = Coverage(data_file=f"{directory}/part-{os.getpid()}-{time.monotonic_ns()}", **OPTIONS)
    coverage.start()
    coverage.switch_context(context)
    try:
        return function(*args, **kwargs), time.process_time() - began
    finally:
        coverage.stop()
        coverage.save()


def collect(copy: Copy, file: str) -> dict[str, Any]:
    with TemporaryDirectory() as directory:
        coverage = Coverage(data_file=f"{directory}/whole", **OPTIONS)
        plugin = Contexts(coverage, directory)
        coverage.start()
        run(copy, plugin, file)
        coverage.stop()
        coverage.save()
        lines: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for path in Path(directory).iterdir():
            data = CoverageData(str(path))
            data.read()
            for measured in data.measured_files():
                name = Path(measured).relative_to(copy.root).as_posix()
                for line, contexts in data.contexts_by_lineno(measured).items():
                    for context in filter(None, contexts):
                        lines[context][name] |= 1 << line
    return {
        test: {
            "seconds": round(seconds, 4),
            "passed": plugin.passed.get(test, False),
            "lines": {name: f"{bits:x}" for name, bits in lines[test].items()},
        }
        for test, seconds in plugin.seconds.items()
    }


class Chosen:
    """A plugin of pytest that leaves out all other tests, and remembers which one failed."""

    def __init__(self, tests: Sequence[str]) -> None:
        self.rank = {test: rank for rank, test in enumerate(tests)}
        self.failed: list[str] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((item for item in items if item.nodeid in self.rank), key=lambda item: self.rank[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport


def run_chosen(copy: Copy, tests: Sequence[str]) -> tuple[bool, list[str]]:
    plugin = Chosen(tests)
    code = run(copy, plugin, "-x", "--timeout=400", *dict.fromkeys(test.split("::")[0] for test in tests))
    return code in {0, 5}, plugin.failed

"""Running a file of tests in a child of the server, and writing which lines of the package each test runs."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from coverage import Coverage, CoverageData


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

        def measured(group: Any, function: Callable[..., Any], *args: Any, seconds: float = 0, **kwargs: Any) -> Any:
            call = pickle.dumps((function, args, kwargs))
            answers = run(group, traced, self.directory, self.now, call, seconds=max(seconds, PATIENCE))
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


PATIENCE = 600
"""Seconds for a call of another process, which takes longer while it is measured."""

OPTIONS: dict[str, Any] = {"source": ["randlora"], "config_file": False, "messages": False}


def collect(request: dict[str, Any]) -> int:
    """Run a file of tests and write its tests, each with its seconds and a bit for every line, by file."""
    tree = Path.cwd()
    with TemporaryDirectory() as directory:
        coverage = Coverage(data_file=f"{directory}/whole", **OPTIONS)
        plugin = Contexts(coverage, directory)
        coverage.start()
        code = int(pytest.main([*request["arguments"], request["file"]], plugins=[plugin]))
        coverage.stop()
        coverage.save()
        lines: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for path in Path(directory).iterdir():
            data = CoverageData(str(path))
            data.read()
            for file in data.measured_files():
                name = Path(file).relative_to(tree).as_posix()
                for line, contexts in data.contexts_by_lineno(file).items():
                    for context in filter(None, contexts):
                        lines[context][name] |= 1 << line
    tests = {
        test: {
            "seconds": round(seconds, 4),
            "passed": plugin.passed.get(test, False),
            "lines": {name: f"{bits:x}" for name, bits in lines[test].items()},
        }
        for test, seconds in plugin.seconds.items()
    }
    text = json.dumps({"code": code, "tests": tests})
    beside = Path(request["output"] + ".part")
    beside.write_bytes(gzip.compress(text.encode()))
    beside.rename(request["output"])
    return 0

"""Running chosen tests in a child of the server until one fails, in the order given."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 300


class Chosen:
    """A plugin of pytest that leaves out all other tests, and remembers which one failed."""

    def __init__(self, tests: list[str]) -> None:
        self.rank = {test: rank for rank, test in enumerate(tests)}
        self.failed: list[str] = []
        self.ran = 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((item for item in items if item.nodeid in self.rank), key=lambda item: self.rank[item.nodeid])
        self.ran = len(items)

    def pytest_collection_finish(self) -> None:
        """Have the distributed tests wait for each other longer, because the machine may be busy."""
        if "tests.distributed.processes" in sys.modules:
            processes = sys.modules["tests.distributed.processes"].Processes
            run = processes.run
            processes.run = lambda *args, seconds=0, **kwargs: run(*args, seconds=max(seconds, PATIENCE), **kwargs)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def run_chosen(request: dict[str, Any]) -> int:
    """Run the tests, write what failed, and return pytest's exit code."""
    plugin = Chosen(request["tests"])
    files = dict.fromkeys(test.split("::")[0] for test in request["tests"])
    code = int(pytest.main([*request["arguments"], *files], plugins=[plugin]))
    Path(request["output"]).write_text(json.dumps({"failed": plugin.failed, "ran": plugin.ran}), encoding="utf-8")
    return code

"""The laws that a device can break, run before anything is timed on it: what computes wrongly need not be fast."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from benchmarks.command import Settings, main
from benchmarks.results import Row
from benchmarks.timing import Figure

ROOT = Path(__file__).resolve().parents[1]
FILE = "tests/test_layers.py"
DEVICE = "RANDLORA_TEST_DEVICE"
CASE = "laws that a device can break"


def run(settings: Settings) -> Sequence[Row]:
    """Run the tests on the device, which print what they find, and count those that held.

    Raises:
        RuntimeError: Where no test ran.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "laws.xml"
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", FILE]
        quick = {**os.environ, DEVICE: settings.device, "HYPOTHESIS_PROFILE": "quick"}
        ended = subprocess.run(words, cwd=ROOT, env=quick, check=False)
        if not report.is_file():
            raise RuntimeError(f"pytest ended with status {ended.returncode} and no report")
        return [Row(CASE, held(report))]


def held(report: Path) -> dict[str, Figure]:
    """Read how many tests there were and how many of them held; one that was skipped did not."""
    suites = list(ET.parse(report).iter("testsuite"))
    everything, missed = (
        sum(int(suite.get(field, 0)) for suite in suites for field in fields)
        for fields in (("tests",), ("failures", "errors", "skipped"))
    )
    if not everything:
        raise RuntimeError(f"no test of {FILE} ran")
    return {
        "held": Figure(everything - missed, everything - missed, "laws"),
        "all": Figure(everything, everything, "laws"),
    }


if __name__ == "__main__":
    main(("laws", run))

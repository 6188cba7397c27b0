"""Fuzzing as campaigns of `make torture`: each target for a minute, in a process of its own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from tests.fuzz.targets import TARGETS
from tests.torture.row import Campaign, Row

ROOT = Path(__file__).parent.parent.parent
FINDINGS = Path("build", "fuzz")  # of the repository
SECONDS, FEWEST = 60.0, 10.0
STARTING = 300.0
"""Seconds that importing everything and replaying the corpus may take before and after."""

COUNT = re.compile(r"^stat::number_of_executed_units: *(\d+)", re.MULTILINE)
COVERED = re.compile(r"^#\d+\s.* cov: (\d+) .* corp: (\d+)/", re.MULTILINE)
ARTIFACTS = "crash-*", "timeout-*", "oom-*"


def fuzz(name: str, scale: float) -> Row:
    """Fuzz one target, and return what was found. Inputs that break a promise are left in build/fuzz."""
    start, seconds = time.monotonic(), max(FEWEST, SECONDS * scale)
    shutil.rmtree(ROOT / FINDINGS / name, ignore_errors=True)
    command = [sys.executable, "-m", "tests.fuzz", name, "--seconds", str(seconds), "--out", str(FINDINGS / name)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=seconds + STARTING, check=False
        )
        output, code = done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        output, code = str(error.stderr), -1
    failures = [line.removeprefix("FINDING ") for line in output.splitlines() if line.startswith("FINDING ")]
    failures += [str(path) for kind in ARTIFACTS for path in sorted((ROOT / FINDINGS / name).glob(kind))]
    count, covered = COUNT.findall(output), COVERED.findall(output)
    if not count:
        failures.append(f"exit code {code}: {output[-2000:]}")
    notes = f"{covered[-1][0]} places of the code, {covered[-1][1]} inputs kept" if covered else ""
    return Row(
        f"fuzz {name.replace('_', ' ')}",
        TARGETS[name].tried,
        int(count[-1]) if count else 0,
        tuple(failures),
        time.monotonic() - start,
        notes,
    )


CAMPAIGNS: dict[str, Campaign] = {f"fuzz-{name.replace('_', '-')}": partial(fuzz, name) for name in TARGETS}
"""By the name under which `make torture` runs each."""

"""All campaigns, and those of random calls, fuzzed inputs, and adapters that come and go."""

import gc
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import traceback
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import hypothesis
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import randlora
from tests.checkpoint_files import HEADED
from tests.fuzz.targets import TARGETS
from tests.kit import snapshot
from tests.pages import ROOT
from tests.state_machine.machine import run_program
from tests.torture import Row, kills, share, training

PROGRAMS, STEPS = 1000, 60
FUZZING, FEWEST, STARTING = 60.0, 10.0, 300.0
"""Seconds of fuzzing, at least, and how many more importing everything and replaying the corpus may take."""
COUNT = re.compile(r"^stat::number_of_executed_units: *(\d+)", re.MULTILINE)
COVERED = re.compile(r"^#\d+\s.* cov: (\d+) .* corp: (\d+)/", re.MULTILINE)
CYCLES, TRACED = 10_000, 1000  # tracing makes a cycle five times as long
WARM_UP = 200  # after which every cache is full
GROWTH, TRACED_GROWTH = 4 * 2**20, 16 * 2**10  # bytes of the process, and of objects of Python


def state_machine(scale: float, seed: int | None = None) -> Row:
    seed = secrets.randbits(32) if seed is None else seed
    failures, count = list[str](), 0

    @hypothesis.seed(seed)
    @settings(
        max_examples=share(PROGRAMS, scale), deadline=None, database=None, print_blob=False,
        report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(data=st.data())
    def programs(data: st.DataObject) -> None:
        nonlocal count
        count += 1
        run_program(data, STEPS)

    try:
        programs()
    except Exception as error:  # whatever a broken promise raised
        sys.stderr.write("\n".join([*getattr(error, "__notes__", ()), ""]))  # the shortest program
        failures.append("".join(traceback.format_exception_only(error)).partition("\n")[0])
    tried = f"programs of {STEPS} random calls against a float64 model of the truth"
    return Row(tried, count, failures, f"seed {seed}")


def fuzz(name: str, scale: float) -> Row:
    seconds, findings = max(FEWEST, FUZZING * scale), ROOT / "build" / "fuzz" / name
    shutil.rmtree(findings, ignore_errors=True)
    command = [sys.executable, "-m", "tests.fuzz", name, "--seconds", str(seconds), "--out", str(findings)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, errors="replace",
            timeout=seconds + STARTING, check=False,
        )  # fmt: skip
        output = done.stderr
    except subprocess.TimeoutExpired as error:
        output = str(error.stderr)
    failures = [line.removeprefix("FINDING ") for line in output.splitlines() if line.startswith("FINDING ")]
    failures += [str(path) for kind in ("crash", "timeout", "oom") for path in sorted(findings.glob(f"{kind}-*"))]
    count, covered = COUNT.findall(output), COVERED.findall(output)
    failures += [] if count else [f"it did not finish: {output[-2000:]}"]
    notes = "{} places of the code, {} inputs kept".format(*covered[-1]) if covered else ""
    return Row(TARGETS[name].tried, int(count[-1]) if count else 0, failures, notes)


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def cycles(scale: float) -> Row:
    number, traced_number = share(CYCLES, scale), share(TRACED, scale)
    model = HEADED.build()
    before = snapshot(model)
    x, y = torch.randn(4, 6), torch.randn(4, 3)

    def run(turns: int) -> None:
        for turn in range(turns):
            randlora.inject(model, r=2, seed=turn % 3, targets=["0", "2"], train_also=["head"])
            optimizer = torch.optim.AdamW(randlora.trainable_parameters(model), lr=0.1)
            torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            with torch.no_grad():
                alone = model(x)
                with randlora.merged(model):
                    torch.testing.assert_close(model(x), alone)
            randlora.eject(model)
        gc.collect()

    tracemalloc.start()
    run(WARM_UP)
    traced_before, _ = tracemalloc.get_traced_memory()
    run(traced_number)
    traced = tracemalloc.get_traced_memory()[0] - traced_before
    tracemalloc.stop()
    resident_before = resident()
    run(number)
    grown = resident() - resident_before
    failures = [] if snapshot(model) == before else ["the model is not what it was"]
    notes = f"memory grew by {grown / 2**10:,.0f} KiB, objects of Python by {traced / 2**10:,.1f} KiB"
    if grown > GROWTH or traced > TRACED_GROWTH:
        failures.append(notes)
    return Row("inject, train, merge, eject", number, failures, f"{notes} in {traced_number:,} more")


CAMPAIGNS: dict[str, Callable[[float], Row]] = {
    "state-machine": state_machine,
    "kills": kills.at_random_times,
    **{f"fuzz-{name.replace('_', '-')}": partial(fuzz, name) for name in TARGETS},
    "training": training.killed_while_training,
    "trainer": training.killed_trainer,
    "faults": kills.at_every_call,
    "cycles": cycles,
    "two-writers": kills.two_writers,
    "disk-full": kills.on_a_full_disk,
}
"""By name, the longest first, so that none is left to run alone at the end."""


def run(name: str, scale: float) -> tuple[str, Row, float]:
    """Run a campaign; return its name, its row and its seconds. An error in it is a failure, so that the others run."""
    torch.set_num_threads(1)  # campaigns run side by side, and threads would get in each other's way on small tensors
    start = time.monotonic()
    try:
        row = CAMPAIGNS[name](scale)
    except Exception as error:
        row = Row("the campaign did not finish", 0, [repr(error)])
    return name.replace("-", " "), row, time.monotonic() - start

"""The campaign of `make torture`: a thousand programs of the state machine, from a new seed each time."""

import secrets
import sys
import time

import hypothesis
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.state_machine.machine import RandLoRAMachine
from tests.torture.row import Row

PROGRAMS, STEPS = 1000, 60


def campaign(scale: float, seed: int | None = None) -> Row:
    """Run programs of random calls. The notes say the seed, with which the same programs run again.

    Of programs that fail, Hypothesis looks for the shortest, which is printed.
    """
    seed = secrets.randbits(32) if seed is None else seed
    programs = max(1, round(PROGRAMS * scale))
    started, failures, count = time.monotonic(), [], 0

    class Counted(RandLoRAMachine):
        def __init__(self) -> None:
            nonlocal count
            count += 1
            super().__init__()

    longer = settings(
        max_examples=programs, stateful_step_count=STEPS, deadline=None, database=None, print_blob=False,
        report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    try:
        run_state_machine_as_test(hypothesis.seed(seed)(Counted), settings=longer)
    except Exception as error:  # whatever a broken promise raised
        print(*getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)  # noqa: T201  # the shortest program
        failures.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    tried = f"programs of {STEPS} random calls against a float64 model of the truth"
    return Row("state machine", tried, count, tuple(failures), time.monotonic() - started, f"seed {seed}")

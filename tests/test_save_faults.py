"""A write that is killed or fails at any of its system calls leaves the old adapter or the new one."""

from itertools import count
from pathlib import Path

import pytest

from tests.torture.faults import ERRORS
from tests.torture.replacing import SCENARIOS, Scenario, Stage, after_a_kill, after_an_error

pytestmark = [
    pytest.mark.medium,
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),  # of Python 3.12, in a process with threads
]

TESTED = {"new", "over ours", "over PEFT's", "LoRA over ours"}
"""`make torture` runs all scenarios."""

every_scenario = pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(found, marks=[pytest.mark.slow] if found.name != "over ours" else [])
        for found in SCENARIOS
        if found.name in TESTED
    ],
    ids=lambda scenario: scenario.name,
)


@every_scenario
def test_a_kill_at_any_call_leaves_the_old_or_the_new_and_nothing_after_the_next(
    scenario: Scenario, fast_path: Path
) -> None:
    stage = Stage(scenario, fast_path)
    for at in count(1):
        broken = after_a_kill(stage, at)
        if broken is None:
            break
        assert broken == []
    assert at > 20


@every_scenario
def test_an_error_at_any_call_leaves_the_old_or_the_new_and_nothing_hidden(scenario: Scenario, fast_path: Path) -> None:
    stage = Stage(scenario, fast_path)
    for at in count(1):
        broken = after_an_error(stage, at, ERRORS[at % len(ERRORS)])
        if broken is None:
            break
        assert broken == []
    assert at > 20

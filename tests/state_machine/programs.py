"""Programs of random calls that the state machine makes."""

import inspect
from typing import Any

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import INITIALIZE_RULE_MARKER, RULE_MARKER

from tests.state_machine.machine import RandLoRAMachine

methods = [method for _, method in inspect.getmembers(RandLoRAMachine, inspect.isfunction)]
RULES = {method.__name__: rule for method in methods if (rule := getattr(method, RULE_MARKER, None))}


def run_program(data: st.DataObject, steps: int) -> None:
    """Take the rule that was called least of those that can be: Hypothesis itself leaves out half in each run."""
    machine, calls = RandLoRAMachine(), dict.fromkeys(data.draw(st.permutations([*RULES])), 0)

    def call(rule: Any) -> None:
        note(rule.function.__name__)  # hypothesis prints the notes and the values of the shortest program that fails
        rule.function(machine, **{name: data.draw(each, name) for name, each in rule.arguments.items()})
        machine.holds()

    try:
        call(getattr(RandLoRAMachine.build, INITIALIZE_RULE_MARKER))
        for _ in range(steps):
            possible = [name for name in calls if all(holds(machine) for holds in RULES[name].preconditions)]
            least = min(possible, key=calls.__getitem__)
            call(RULES[least])
            calls[least] += 1
    finally:
        machine.teardown()

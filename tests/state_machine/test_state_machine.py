"""The state machine at a length that `make test` can afford, and every refusal once."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.state_machine.machine import RandLoRAMachine, run_program
from tests.state_machine.recipes import Recipe
from tests.state_machine.refusals import REFUSALS, WHEN


@pytest.mark.medium
@settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_verb_does_what_the_truth_says(data: st.DataObject) -> None:
    run_program(data, steps=25)


@pytest.mark.medium
def test_every_refusal_is_met_by_two_adapters_or_merged_ones_or_none() -> None:
    recipe, met = Recipe((0, 1)), set[int]()
    machine = RandLoRAMachine()
    machine.build("text", torch.float32, recipe, recipe, (1.0, 1.0, 1.0))
    steps: list[Callable[[], object]] = [machine.merge_for_a_while, lambda: machine.leave(None)]
    steps += [lambda: machine.merge(True, None), machine.eject, machine.teardown]
    for go_on in steps:
        for place, (when, _, _) in enumerate(REFUSALS):
            if all(WHEN[word](machine) for word in when.split()):
                machine.refuse(place)
                met.add(place)
        go_on()
    assert met == {*range(len(REFUSALS))}

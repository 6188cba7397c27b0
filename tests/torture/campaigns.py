"""All campaigns of `make torture`, and running one."""

from __future__ import annotations

import time

import torch

from tests.fuzz.campaign import CAMPAIGNS as FUZZING
from tests.state_machine.campaign import campaign as state_machine
from tests.torture.cycles import cycles
from tests.torture.kills import at_every_call, at_random_times, on_a_full_disk, two_writers
from tests.torture.row import Campaign, Row
from tests.torture.training import killed_trainer, killed_while_training

CAMPAIGNS: dict[str, Campaign] = {
    "state-machine": state_machine,
    "kills": at_random_times,
    **FUZZING,
    "training": killed_while_training,
    "trainer": killed_trainer,
    "faults": at_every_call,
    "cycles": cycles,
    "two-writers": two_writers,
    "disk-full": on_a_full_disk,
}
"""By name, the longest first, so that none is left to run alone at the end."""


def run(name: str, scale: float) -> Row:
    """Run one campaign. An error in it is a failure, so that the others run nevertheless."""
    torch.set_num_threads(1)  # campaigns run side by side, and threads would get in each other's way on small tensors
    start = time.monotonic()
    try:
        return CAMPAIGNS[name](scale)
    except Exception as error:
        return Row(name, "the campaign did not finish", 0, (repr(error),), time.monotonic() - start)

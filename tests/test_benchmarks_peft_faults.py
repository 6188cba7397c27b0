"""The faults of PEFT, none of which is ours, and how they are counted."""

import pytest

from benchmarks import peft_faults
from benchmarks.command import Settings
from benchmarks.peft_faults import FAULTS, Seen
from benchmarks.results import Results
from benchmarks.targets import verdicts


@pytest.mark.parametrize("words", FAULTS)
def test_a_fault_of_peft_is_not_ours(words: str) -> None:
    assert not peft_faults.provoke(FAULTS[words]).randlora


@pytest.mark.parametrize(("of_peft", "of_ours"), [(True, False), (True, True), (False, False)])
def test_the_gate_asks_that_peft_has_every_fault_and_we_have_none(
    of_peft: bool, of_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {"one": lambda _: Seen(peft=True, randlora=False), "two": lambda _: Seen(of_peft, of_ours)}
    monkeypatch.setattr(peft_faults, "FAULTS", some)
    rows = peft_faults.run(Settings("cpu", is_quick=True))
    assert [row.case for row in rows] == ["one", "two", "all faults"]
    met = [verdict.is_met for verdict in verdicts(Results("peft_faults", {}, rows, "cpu"))]
    assert met == [not of_ours, of_peft]

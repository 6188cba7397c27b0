"""The state machine: all rules together, and calls that must be refused."""

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from tests.kit import untouched
from tests.state_machine.adapter_rules import AdapterRules
from tests.state_machine.file_rules import FileRules
from tests.state_machine.model_rules import ModelRules
from tests.state_machine.models import KINDS
from tests.state_machine.recipes import DTYPES, Factors, Recipe, factors, recipes
from tests.state_machine.refusals import REFUSALS
from tests.state_machine.several_rules import SeveralRules


class RandLoRAMachine(AdapterRules, SeveralRules, ModelRules, FileRules):
    """A model under all that can be done to it."""

    @initialize(
        kind=st.sampled_from([*KINDS]), dtype=st.sampled_from(DTYPES), first=recipes, second=recipes, chosen=factors
    )
    def build(self, kind: str, dtype: torch.dtype, first: Recipe, second: Recipe, chosen: Factors) -> None:
        """Start with two adapters of which some are active, where Hypothesis would seldom get by itself."""
        self.start(KINDS[kind], dtype)
        self.begin(first, second)
        if self.truth.adapters:
            self.activate(chosen, "mapping")

    @rule(words=st.sampled_from([*REFUSALS]))
    def refuse(self, words: str) -> None:
        refusal = REFUSALS[words]
        if refusal.applies(self):
            with untouched(self.model), pytest.raises(refusal.error):
                refusal.call(self)

    def teardown(self) -> None:
        with self.cleanup:
            while self.blocks:
                self.leave()
                self.holds()
            if hasattr(self, "truth") and self.truth.adapters:
                self.eject()
                self.holds()

"""The benchmark of experts: who trains what on which stacks, and that every target has its row."""

import pytest
import torch

from benchmarks import experts
from benchmarks.command import Settings
from benchmarks.models import training_step
from benchmarks.targets import TARGETS
from tests.further import further

SMALL = {"Mixtral": ("Mixtral", 64, 32, 4, 2), "many": ("Qwen3-MoE", 64, 32, 8, 2)}
CASE = experts.Case(*SMALL["Mixtral"], "eager", 8)


@pytest.mark.medium
@pytest.mark.parametrize("is_quick", [True, further(False)])
def test_every_target_of_experts_has_its_row_and_its_contestants(
    is_quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "MODELS", {"Mixtral": ("Mixtral", 64, 32, 8, 2)})
    monkeypatch.setattr(experts, "REPEATS", 1)
    found = {row.case: row for row in experts.run(Settings("cpu", is_quick=is_quick))}
    asked = [target for target in TARGETS if target.benchmark == "experts"]
    assert asked
    assert all({target.first, target.second} <= set(found[target.case].figures) for target in asked)
    assert len(found) == 4 * (2 if is_quick else 3)
    assert len({frozenset(row.figures) for row in found.values()}) == 1  # else a table of ratios has no baseline


@pytest.mark.parametrize("name", experts.NAMES)
def test_a_contestant_trains_the_stacks_of_experts_and_nothing_else(name: str) -> None:
    model = experts.adapt(experts.build(CASE), name, CASE)
    trained = {of for of, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == (0 if name == "frozen" else 2 if name == "full" else 4)
    assert all("mlp.experts" in of for of in trained)
    before = {of: parameter.detach().clone() for of, parameter in model.named_parameters()}
    step = training_step(model, experts.tokens_of(CASE, "cpu"))
    for _ in range(2):  # at first one of the two factors of an update is zero, and the other has no gradient
        step()
    assert {of for of, value in model.named_parameters() if not torch.equal(value, before[of])} == trained


def test_lora_has_the_rank_nearest_above_our_number_of_parameters() -> None:
    counts = [
        sum(parameter.numel() for parameter in experts.adapt(experts.build(CASE), name, CASE).parameters()
            if parameter.requires_grad)
        for name in ("dense", "LoRA")
    ]  # fmt: skip
    assert counts[0] <= counts[1] < counts[0] * (1 + 1 / (CASE.lora_rank - 1))

"""Models that carry adapters of other libraries."""

from typing import Any

import peft
import pytest
from torch import nn

import randlora
from randlora.errors import AdapterError, TargetError
from tests.kit import untouched
from tests.laws import Mixed

CONFIGS = [
    peft.LoraConfig(r=2, target_modules=["q"]),
    peft.RandLoraConfig(r=2, target_modules=["q"]),
    peft.VeraConfig(r=2, target_modules=["q"]),
    peft.IA3Config(target_modules=["q"], feedforward_modules=[]),
]
TARGETS: list[Any] = [None, "all", "all-linear", ["down"], ["q"], ["lora_A"], r".*down"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("is_wrapped", [True, False])  # the latter is what transformers' add_adapter does
def test_a_model_with_adapters_of_peft_is_refused_by_name(config: Any, is_wrapped: bool) -> None:
    is_wrapped |= isinstance(config, peft.VeraConfig)  # which PEFT cannot put into a model otherwise
    model: Any = peft.get_peft_model(Mixed(), config) if is_wrapped else peft.inject_adapter_in_model(config, Mixed())
    for targets in TARGETS:
        with untouched(model), pytest.raises(AdapterError, match=r"adapters of PEFT: .*peft\.tuners.*unload\(\)"):
            randlora.inject(model, r=2, targets=targets)
        with pytest.raises(AdapterError, match=r"cannot find targets: .* adapters of PEFT: .*peft\.tuners"):
            randlora.find_targets(model, targets)


@pytest.mark.parametrize("config", CONFIGS[:2], ids=lambda config: type(config).__name__)
def test_a_model_that_peft_has_left_is_adapted(config: Any) -> None:
    model: Any = peft.get_peft_model(Mixed(), config).unload()
    assert "q" in randlora.inject(model, r=2, targets="all-linear").targets


class OwnLoRA(nn.Module):
    """A LoRA as people write it themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.lora_A, self.lora_B = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)


@pytest.mark.parametrize("targets", ["all", "all-linear", None, ["1"]])
def test_matrices_of_an_adapter_of_ones_own_are_skipped_with_the_reason(targets: Any) -> None:
    report = randlora.inject(nn.Sequential(nn.Linear(8, 8), OwnLoRA()), r=2, targets=targets)
    assert "1.linear" in report.targets
    assert report.skipped.keys() == {"1.lora_A", "1.lora_B"}
    assert not [fqn for fqn in report.targets if "lora" in fqn]


def test_a_matrix_of_an_adapter_is_refused_where_it_is_named() -> None:
    with pytest.raises(TargetError, match=r"1\.lora_A \(Linear\) cannot be adapted: it is a part of another adapter"):
        randlora.inject(nn.Sequential(nn.Linear(8, 8), OwnLoRA()), r=2, targets=["1.lora_A"])

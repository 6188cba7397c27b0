"""Models that carry adapters of other libraries."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import randlora
from randlora.errors import AdapterError, CheckpointError, MergeError, TargetError
from tests.kit import fill, untouched
from tests.laws import TOKENS, Mixed

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


def test_a_mixed_model_of_peft_is_refused_by_name_until_peft_has_left() -> None:
    mixed: Any = peft.get_peft_model(Mixed(), CONFIGS[0], mixed=True)
    mixed.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["up"]))
    mixed.set_adapter(["default", "other"])
    said = r"adapters of PEFT: .*q \(peft\.tuners\.lora\..*up \(peft\.tuners\.loha\..* merge or remove them first"
    for targets in TARGETS:
        with untouched(mixed), pytest.raises(AdapterError, match=said):
            randlora.inject(mixed, r=2, targets=targets)
    assert {"q", "up"} <= {*randlora.inject(mixed.unload(), r=2, targets="all-linear").targets}


@pytest.mark.parametrize("is_mixed", [True, False], ids=["mixed", "one kind"])
def test_what_peft_wraps_later_is_said_to_be_lost_until_peft_has_left(is_mixed: bool, tmp_path: Path) -> None:
    model = fill(randlora_only())
    expected = model(TOKENS)
    wrapped: Any = peft.get_peft_model(model, CONFIGS[0], mixed=is_mixed)
    torch.testing.assert_close(wrapped(TOKENS), expected, rtol=0, atol=0)
    said = "q no longer has adapter 'default'"
    with untouched(wrapped), pytest.raises(AdapterError, match=said):
        [*randlora.trainable_parameters(wrapped)]
    with untouched(wrapped), pytest.raises(CheckpointError, match=said):
        randlora.save(wrapped, tmp_path / "adapter")
    with untouched(wrapped), pytest.raises(MergeError, match=said):
        randlora.merge(wrapped)
    with untouched(wrapped), pytest.raises(AdapterError, match=said), randlora.serving.routed(wrapped, ["default"]):
        pass
    with untouched(wrapped), pytest.raises(AdapterError, match="the model has adapters of PEFT"):
        randlora.inject(model, r=2, name="second")
    wrapped.unload()
    torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=0)
    randlora.save(model, tmp_path / "adapter")
    loaded = randlora_only()
    randlora.eject(loaded)
    randlora.load(loaded, tmp_path / "adapter")
    torch.testing.assert_close(loaded(TOKENS), expected, rtol=0, atol=0)


def randlora_only() -> nn.Module:
    torch.manual_seed(0)
    model = Mixed()
    randlora.inject(model, r=2, targets=["q", "up"])
    return model


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

"""Values of the wrong type, unusual modes, adapters of other libraries: errors of ours, or the right result."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import randlora
from randlora.errors import AdapterError, CheckpointError, ConfigError, MergeError, RandLoRAError, TargetError
from tests.kit import all_bits, fill, set_alpha, untouched
from tests.laws import TOKENS, Mixed

VALUES: list[Any] = [1, 1.0, -1, "yes", b"no", np.True_, (), [], {}, [[]], {"a": "b"}, {1: 1.0}, object(), ...]
VALUES += [None, torch.ones(2), 10**400, 10**5000, float("nan"), {"default": 10**400}, [10**5000]]
VERBS: list[Callable[..., Any]] = [randlora.inject, randlora.plan, randlora.eject, randlora.activate, randlora.remove]
VERBS += [randlora.delta_weight, randlora.set_compute, randlora.merge, randlora.unmerge, randlora.adapters]
VERBS += [randlora.prepare_quantized, randlora.find_targets, randlora.rename, randlora.set_trainable]
VERBS += [
    randlora.serving.combine,
    randlora.adapter_state,
    randlora.swap,
    randlora.update_norms,
    randlora.limit_norms,
]
REQUIRED: dict[str, Any] = {
    "names": "default",
    "name": "default",
    "fqn": "0",
    "adapters": {"default": 0.5},
    "to": "b",
    "limit": 0.5,
}


def adapted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    model.get_submodule("2").requires_grad_(False)
    randlora.inject(model, r=2, targets=["0"], train_also=["1"])
    return fill(model)


@pytest.mark.medium
@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_an_argument_of_any_type_is_used_or_refused_by_an_error_of_ours(verb: Callable[..., Any]) -> None:
    parameters = inspect.signature(verb).parameters
    without = [name for name, each in parameters.items() if each.default is inspect.Parameter.empty and name != "model"]
    given = REQUIRED | dict.fromkeys(("state", "source"), randlora.adapter_state(adapted()))
    required = {name: given[name] for name in without}
    required |= {"name": "other"} if verb in (randlora.inject, randlora.plan, randlora.serving.combine) else {}
    model, refused = adapted(), ""
    for name in parameters:
        for value in VALUES:
            model = model if refused else adapted()  # a call that is refused leaves it as it was
            before = all_bits(model.state_dict())
            arguments: dict[str, Any] = {"model": model, **required, name: value}
            refused = ""
            try:
                verb(**arguments)
            except RandLoRAError as error:
                refused = str(error)
            except Exception as error:
                raise AssertionError(f"{verb.__name__}({name}={value!r})") from error
            assert len(refused) < 2000
            if refused:
                assert all_bits(model.state_dict()) == before
                assert [info.name for info in randlora.adapters(model)] == ["default"]


def test_a_model_that_contains_itself_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].add_module("around", model)
    with pytest.raises(TargetError, match=r"contains itself: 0\.around is the model"):
        randlora.inject(model, r=2)


def test_an_r_that_no_layer_is_as_wide_as_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with untouched(model), pytest.raises(ConfigError, match="r=1000000 is larger than its layers, which are at most 8"):
        randlora.inject(model, r=10**6)


@pytest.mark.parametrize("alpha", [0, -0.0, -7, {"0": -1e-30, ".*": 8}], ids=str)
def test_an_alpha_that_trains_nothing_or_backwards_is_refused_for_a_new_adapter(alpha: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for verb in (randlora.plan, randlora.inject, randlora.training_memory):
        with untouched(model), pytest.raises(ConfigError, match=r"alpha=-?[\de-]+ must be positive"):
            verb(model, 2, targets=["0", "1"], alpha=alpha)


def test_an_alpha_of_a_file_is_loaded_whatever_it_is(tmp_path: Path) -> None:
    trained, model = adapted(), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    set_alpha(trained, -3.0)
    expected = randlora.delta_weight(trained, "0")
    randlora.save(trained, tmp_path)
    randlora.load(model, tmp_path)
    assert torch.equal(randlora.delta_weight(model, "0"), expected)
    assert randlora.adapters(model)[0].options["0"].alpha == -3


def test_a_model_built_in_inference_mode_is_adapted_merged_and_restored() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        x = torch.randn(2, 8)
    base = all_bits(model.state_dict())
    randlora.inject(model, r=2, train_also=["1"])
    randlora.eject(model)
    assert all_bits(model.state_dict()) == base
    assert all(parameter.requires_grad for parameter in model.parameters())
    randlora.inject(model, r=2)
    fill(model)
    with torch.inference_mode():
        expected = model(x)
        randlora.merge(model)
        torch.testing.assert_close(model(x), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_layers_without_a_shape_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4), nn.LazyBatchNorm1d())
    with untouched(model), pytest.raises(TargetError, match=r"train_also includes 1\.weight, which has no shape yet"):
        randlora.inject(model, r=2, targets=["0"], train_also=["1"])
    randlora.prepare_quantized(model)
    for verb in (randlora.eject, randlora.merge):
        randlora.inject(model, r=2, targets=["0"])
        randlora.activate(model, "default")
        randlora.set_trainable(model, "default")
        verb(model)
        assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.requires_grad_(True),
        lambda model: model.requires_grad_(False),
        lambda model: randlora.prepare_quantized(model.bfloat16()),
        lambda model: randlora.inject(model, r=2, targets=["2"], name="b", train_also=["1", "0.bias"], active=True),
        lambda model: randlora.merge(model, reversible=True),
        lambda model: model.load_state_dict(model.state_dict(), assign=True),
        lambda model: prune.remove(prune.l1_unstructured(model[2], "weight", 0.5), "weight"),
    ],
)
def test_flags_are_what_they_were_whatever_was_called_between(call: Callable[[Any], object]) -> None:
    model = adapted()
    call(model)
    randlora.eject(model)
    assert {name for name, each in model.named_parameters() if not each.requires_grad} == {"2.weight", "2.bias"}


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
    with pytest.raises(TargetError, match=r"1\.lora_A \(Linear\) cannot be adapted: by its name it is part"):
        randlora.inject(nn.Sequential(nn.Linear(8, 8), OwnLoRA()), r=2, targets=["1.lora_A"])

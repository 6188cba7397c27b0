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

import randlora
from randlora.errors import AdapterError, CheckpointError, ConfigError, MergeError, RandLoRAError, TargetError
from tests.kit import all_bits, fill, set_alpha, untouched
from tests.laws import TOKENS, Mixed

VALUES: list[Any] = [1.0, -1, "yes", b"no", np.True_, (), {}, [[]], {"a": "b"}, {1: 1.0}, object(), None, torch.ones(2)]
VALUES += [10**400, 10**5000, float("nan"), {"default": 10**400}, [10**5000]]
VERBS: list[Callable[..., Any]] = [
    *(randlora.inject, randlora.eject, randlora.activate, randlora.remove, randlora.delta_weight),
    *(randlora.set_compute, randlora.merge, randlora.unmerge, randlora.adapters, randlora.prepare_quantized),
    *(randlora.find_targets, randlora.rename, randlora.set_trainable, randlora.serving.combine),
    *(randlora.adapter_state, randlora.swap, randlora.update_norms, randlora.limit_norms),
]
REQUIRED: dict[str, Any] = {
    "names": "default",
    "name": "default",
    "fqn": "0",
    "adapters": {"default": 0.5},
    "to": "b",
    "limit": 0.5,
}


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))


def adapted() -> nn.Sequential:
    model = layers()
    model[2].requires_grad_(False)
    randlora.inject(model, r=2, targets=["0"], train_also=["1"])
    return fill(model)


@pytest.mark.medium
@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_an_argument_of_any_type_is_used_or_refused_by_an_error_of_ours(verb: Callable[..., Any]) -> None:
    parameters = inspect.signature(verb).parameters
    without = [name for name, each in parameters.items() if each.default is inspect.Parameter.empty and name != "model"]
    given = REQUIRED | dict.fromkeys(("state", "source"), randlora.adapter_state(adapted()))
    required = {name: given[name] for name in without}
    required |= {"name": "other"} if verb in (randlora.inject, randlora.serving.combine) else {}
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


class OwnLoRA(nn.Module):
    """A LoRA as people write it themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.lora_A, self.lora_B = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)


def containing_itself() -> nn.Sequential:
    model = layers()
    model[0].add_module("around", model)
    return model


def lazy() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4), nn.LazyBatchNorm1d())


REFUSED: list[tuple[Callable[[], nn.Module], dict[str, Any], type[RandLoRAError], str]] = [
    (containing_itself, {}, TargetError, r"contains itself: 0\.around is the model"),
    (layers, {"r": 10**6}, ConfigError, "r=1000000 is larger than its layers, which are at most 8"),
    *(
        (layers, {"targets": ["0", "2"], "alpha": alpha}, ConfigError, r"alpha=-?[\de-]+ must be positive")
        for alpha in (0, -0.0, -7, {"0": -1e-30, ".*": 8})
    ),
    (lazy, {"targets": ["0"], "train_also": ["1"]}, TargetError, r"includes 1\.weight, which has no shape yet"),
    (OwnLoRA, {"targets": ["lora_A"]}, TargetError, r"lora_A \(Linear\) cannot be adapted: by its name it is part"),
]


@pytest.mark.parametrize(("build", "options", "error", "message"), REFUSED)
def test_what_cannot_be_adapted_is_refused(
    build: Callable[[], nn.Module], options: dict[str, Any], error: type[RandLoRAError], message: str
) -> None:
    model = build()
    for verb in (randlora.plan, randlora.inject, randlora.training_memory):
        before = list(model.modules())
        with pytest.raises(error, match=message):
            verb(model, **{"r": 2, **options})
        assert list(model.modules()) == before


def test_an_alpha_of_a_file_is_loaded_whatever_it_is(tmp_path: Path) -> None:
    trained, model = adapted(), layers()
    set_alpha(trained, -3.0)
    expected = randlora.delta_weight(trained, "0")
    randlora.save(trained, tmp_path)
    randlora.load(model, tmp_path)
    assert torch.equal(randlora.delta_weight(model, "0"), expected)
    assert randlora.adapters(model)[0].options["0"].alpha == -3


def test_a_model_built_in_inference_mode_or_without_shapes_is_adapted_merged_and_restored() -> None:
    with torch.inference_mode():
        model, x = layers(), torch.randn(2, 8)
    base = all_bits(model.state_dict())
    randlora.inject(model, r=2, train_also=["1"])
    randlora.eject(model)
    assert all_bits(model.state_dict()) == base
    randlora.inject(model, r=2)
    fill(model)
    with torch.inference_mode():
        expected = model(x)
        randlora.merge(model)
        torch.testing.assert_close(model(x), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())
    randlora.prepare_quantized(shapeless := lazy())
    for verb in (randlora.eject, randlora.merge):
        randlora.inject(shapeless, r=2, targets=["0"])
        randlora.activate(shapeless, "default")
        randlora.set_trainable(shapeless, "default")
        verb(shapeless)
        assert all(parameter.requires_grad for parameter in shapeless.parameters())


CONFIGS = [
    peft.LoraConfig(r=2, target_modules=["q"]),
    peft.RandLoraConfig(r=2, target_modules=["q"]),
    peft.VeraConfig(r=2, target_modules=["q"]),
    peft.IA3Config(target_modules=["q"], feedforward_modules=[]),
]
TARGETS: list[Any] = [None, "all", ["down"], ["q"], ["lora_A"]]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_a_model_with_adapters_of_peft_is_refused_by_name(config: Any) -> None:
    models: list[Any] = [peft.get_peft_model(Mixed(), config)]
    if not isinstance(config, peft.VeraConfig):  # as transformers' add_adapter does, and PEFT cannot with VeRA
        models.append(peft.inject_adapter_in_model(config, Mixed()))
    for model in models:
        for targets in TARGETS:
            with untouched(model), pytest.raises(AdapterError, match=r"adapters of PEFT: .*peft\.tuners.*unload\(\)"):
                randlora.inject(model, r=2, targets=targets)
        with pytest.raises(AdapterError, match=r"cannot find targets: .* adapters of PEFT: .*peft\.tuners"):
            randlora.find_targets(model, "all")
    assert "q" in randlora.inject(models[0].unload(), r=2, targets="all-linear").targets


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
    torch.manual_seed(0)
    loaded = Mixed()
    randlora.inject(model := Mixed(), r=2, targets=["q", "up"])
    loaded.load_state_dict(fill(model).state_dict(), strict=False)
    expected = model(TOKENS)
    wrapped: Any = peft.get_peft_model(model, CONFIGS[0], mixed=is_mixed)
    torch.testing.assert_close(wrapped(TOKENS), expected, rtol=0, atol=0)
    refused: list[tuple[type[RandLoRAError], Callable[[], object]]] = [
        (AdapterError, lambda: [*randlora.trainable_parameters(wrapped)]),
        (CheckpointError, lambda: randlora.save(wrapped, tmp_path / "adapter")),
        (MergeError, lambda: randlora.merge(wrapped)),
        (AdapterError, lambda: randlora.serving.routed(wrapped, ["default"]).__enter__()),
    ]
    for error, call in refused:
        with untouched(wrapped), pytest.raises(error, match="q no longer has adapter 'default'"):
            call()
    with untouched(wrapped), pytest.raises(AdapterError, match="the model has adapters of PEFT"):
        randlora.inject(model, r=2, name="second")
    wrapped.unload()
    torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=0)
    randlora.save(model, tmp_path / "adapter")
    randlora.load(loaded, tmp_path / "adapter")
    torch.testing.assert_close(loaded(TOKENS), expected, rtol=0, atol=0)


@pytest.mark.parametrize("targets", ["all", None, ["1"]])
def test_matrices_of_an_adapter_of_ones_own_are_skipped_with_the_reason(targets: Any) -> None:
    report = randlora.inject(nn.Sequential(nn.Linear(8, 8), OwnLoRA()), r=2, targets=targets)
    assert "1.linear" in report.targets
    assert report.skipped.keys() == {"1.lora_A", "1.lora_B"}

"""`inject`, `plan` and `eject`: what they change, and what they refuse before anything changes."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import numpy as np
import peft
import pytest
import torch
from torch import nn

import randlora
from randlora import RandLoRAConfig
from randlora.config import LARGEST_FACTOR
from randlora.errors import AdapterError, CheckpointError, ConfigError, RandLoRAError, TargetError
from randlora.functional import Compute
from tests.kit import adapt, all_bits, fill, same_bits, set_alpha, untouched
from tests.laws import TOKENS, Mixed

ADAPTED = ("q", "up", "down")


def test_inject_adds_only_diagonals_and_eject_gives_back_every_object_and_bit_also_in_inference_mode() -> None:
    model = Mixed().eval()
    model.norm.requires_grad_(False)
    expected, names = model(TOKENS), {*model.state_dict()}
    with untouched(model):
        with torch.inference_mode():
            assert randlora.inject(model, r=4, train_also=["norm", "q.bias"]).targets == ADAPTED
            for compute in get_args(Compute):
                randlora.set_compute(model, compute)
                randlora.activate(model, {"default": -LARGEST_FACTOR})
                assert same_bits(model(TOKENS), expected)
        added = {f"{fqn}.randlora_{part}.default" for fqn in ADAPTED for part in ("lambda", "gamma")}
        assert {*model.state_dict()} - names == added
        trained = {name for name, each in model.named_parameters() if each.requires_grad}
        assert trained == added | {"norm.weight", "norm.bias", "q.bias"}
        randlora.activate(model, "default")
        model(TOKENS).square().mean().backward()
        torch.optim.SGD(randlora.trainable_parameters(model), lr=0.1).step()
        assert not torch.allclose(model(TOKENS), expected)
        model.later = nn.Linear(12, 2)
        assert randlora.eject(model) == ADAPTED
        assert model.later.weight.requires_grad
        del model.later


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))


class OwnLoRA(nn.Module):
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


def adapted() -> nn.Sequential:
    model = layers()
    model[2].requires_grad_(False)
    return adapt(model, r=2, targets=["0"], train_also=["1"])


def computed() -> nn.Sequential:
    model: Any = layers()
    model[0]._parameters["weight"] = model[0].weight * 2
    return model  # type: ignore[no-any-return]


NAMED = "expected a printable name without dots"
RESERVED = "not an attribute of ParameterDict or a keyword of Python"
REFUSED: list[tuple[Callable[[], nn.Module], dict[str, Any], type[RandLoRAError], str]] = [
    (containing_itself, {}, TargetError, r"contains itself: 0\.around is the model"),
    (computed, {"targets": ["2"]}, AdapterError, r"0\.weight is not a leaf tensor and cannot be frozen; detach it"),
    (layers, {"r": 1025}, ConfigError, "r=1025 is larger than its layers, which are at most 8"),
    (layers, {"targets": ["0"], "alpha": -0.0}, ConfigError, r"alpha must be positive, got -?0:"),
    (layers, {"targets": ["0"], "alpha": {"0": -1e-30, ".*": 8}}, ConfigError, r"alpha must be positive, got -1e-30"),
    (lazy, {"targets": ["0"], "train_also": ["1"]}, TargetError, r"includes 1\.weight, which has no shape yet"),
    (lazy, {"targets": ["1"]}, TargetError, "1 is of type LazyLinear|1 .*no shape yet"),
    (OwnLoRA, {"targets": ["lora_A"]}, TargetError, r"lora_A \(Linear\) cannot be adapted: by its name it is part"),
    (Mixed, {"r": 1, "basis": "very_sparse", "seed": 7, "targets": ["q"]}, ConfigError, "standard deviation of 0"),
    (Mixed, {"train_also": ["hed"]}, TargetError, r"train_also=.hed. matches no module .* are .*head"),
    (Mixed, {"targets": ["q"], "train_also": ["q", "hed"]}, TargetError, "2 problems"),
    (Mixed, {"config": RandLoRAConfig(), "r": None, "seed": 4}, ConfigError, "either config= or single options"),
    *((Mixed, {"name": name}, AdapterError, NAMED) for name in ("", "a.b", "a\nb", 3)),
    *((Mixed, {"name": name}, AdapterError, RESERVED) for name in ("class", "keys", "training", "randlora_layer")),
    (adapted, {"name": "default"}, AdapterError, "has an adapter of that name; remove it"),
]


@pytest.mark.parametrize(("build", "options", "error", "message"), REFUSED)
def test_what_cannot_work_is_refused_before_anything_changes(
    build: Callable[[], nn.Module], options: dict[str, Any], error: type[RandLoRAError], message: str
) -> None:
    model = build()
    verbs: list[Callable[..., object]] = [randlora.inject, randlora.plan, randlora.training_memory]
    for verb in verbs[:1] if build in (adapted, Mixed) else verbs:
        unchanged = nullcontext() if build is containing_itself else untouched(model)  # no state dict can be made of it
        with unchanged, pytest.raises(error, match=message):
            verb(model, **{"r": 2, **options})


VALUES: list[Any] = [1.0, -1, "yes", b"no", np.True_, (), {}, [[]], {"a": "b"}, {1: 1.0}, object(), None, torch.ones(2)]
VALUES += [10**400, 10**5000, float("nan"), {"default": 10**400}, [10**5000]]
VERBS: list[Callable[..., Any]] = [
    *(randlora.inject, randlora.eject, randlora.activate, randlora.remove, randlora.delta_weight),
    *(randlora.set_compute, randlora.merge, randlora.unmerge, randlora.adapters, randlora.prepare_quantized),
    *(randlora.find_targets, randlora.set_trainable, randlora.serving.combine),
    *(randlora.adapter_state, randlora.swap, randlora.update_norms, randlora.limit_norms),
]
REQUIRED: dict[str, Any] = {"names": "default", "name": "default", "fqn": "0", "to": "b", "limit": 0.5}
REQUIRED["adapters"] = {"default": 0.5}


@pytest.mark.medium
@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_an_argument_of_any_type_is_used_or_refused_by_an_error_of_ours(verb: Callable[..., Any]) -> None:
    parameters = inspect.signature(verb).parameters
    without = [name for name, each in parameters.items() if each.default is inspect.Parameter.empty and name != "model"]
    known = REQUIRED | dict.fromkeys(("state", "source"), randlora.adapter_state(adapted()))
    required = {name: known[name] for name in without}
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


def test_a_model_built_in_inference_mode_is_adapted_merged_and_restored() -> None:
    with torch.inference_mode():
        model, x = layers(), torch.randn(2, 8)
    base = all_bits(model.state_dict())
    randlora.inject(model, r=2, train_also=["1"])
    randlora.eject(model)
    assert all_bits(model.state_dict()) == base
    adapt(model, r=2)
    with torch.inference_mode():
        expected = model(x)
        randlora.merge(model)
        torch.testing.assert_close(model(x), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_uninitialized_layers_that_are_no_targets_do_not_matter(tmp_path: Path) -> None:
    for verb in (randlora.eject, randlora.merge):
        model = nn.Sequential(nn.Linear(4, 6), nn.LazyLinear(3), nn.LazyConv1d(2, 1))
        randlora.prepare_quantized(model)
        with untouched(model):
            planned = randlora.plan(model, r=2, targets="0")
        assert randlora.inject(model, r=2, targets="0") == planned
        randlora.activate(model, "default")
        randlora.save(fill(model), tmp_path / "adapter")
        with randlora.merged(model):
            model[:2](torch.ones(2, 4))  # the first forward initializes the second layer
        verb(model)
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_buffers_that_nothing_gives_values_are_noted() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"rope": nn.Linear(6, 6), "norm": nn.BatchNorm1d(6)})
        model["rope"].register_buffer("inv_freq", torch.ones(3), persistent=False)
    (note,) = (note for note in randlora.inject(model, r=2, targets=["rope"]).notes if "no values" in note)
    assert "rope.inv_freq on the meta device" in note


def test_an_alpha_of_a_file_is_loaded_whatever_it_is(tmp_path: Path) -> None:
    trained, model = adapted(), layers()
    set_alpha(trained, -3.0)
    randlora.save(trained, tmp_path)
    model.load_state_dict(trained.state_dict(), strict=False)
    randlora.load(model, tmp_path)
    assert torch.equal(randlora.delta_weight(model, "0"), randlora.delta_weight(trained, "0"))
    assert randlora.adapters(model)[0].options["0"].alpha == -3


@pytest.mark.parametrize("kind", [peft.LoraConfig, peft.RandLoraConfig, peft.VeraConfig, peft.IA3Config])
def test_a_model_with_adapters_of_peft_is_refused_by_name(kind: Any) -> None:
    options: dict[str, Any] = {"feedforward_modules": []} if kind is peft.IA3Config else {"r": 2}
    config = kind(target_modules=["q"], **options)
    also, is_mixed = "", kind is peft.LoraConfig
    if kind is peft.RandLoraConfig:  # as transformers' add_adapter does
        model: Any = peft.inject_adapter_in_model(config, Mixed())
    else:
        model = peft.get_peft_model(Mixed(), config, mixed=is_mixed)
    if is_mixed:
        model.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["up"]))
        model.set_adapter(["default", "other"])
        also = r"up \(peft\.tuners\.loha\..*"
    said = rf"adapters of PEFT: .*q.*\(peft\.tuners\..*{also} merge or remove them first.*unload\(\)"
    targets: list[Any] = [None, "all", ["down"], ["q"], ["lora_A"]]
    for each in targets:
        with untouched(model), pytest.raises(AdapterError, match=said):
            randlora.inject(model, r=2, targets=each)
    with pytest.raises(AdapterError, match=r"cannot find targets: .* adapters of PEFT: .*peft\.tuners"):
        randlora.find_targets(model, "all")
    if hasattr(model, "unload"):
        assert {"q", "up"} <= {*randlora.inject(model.unload(), r=2, targets="all-linear").targets}


def test_what_peft_wraps_later_is_said_to_be_lost_until_peft_has_left(tmp_path: Path) -> None:
    randlora.inject(model := Mixed(), r=2, targets=["q", "up"])
    expected = fill(model)(TOKENS)
    wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q"]))
    assert same_bits(wrapped(TOKENS), expected)
    with untouched(wrapped), pytest.raises(CheckpointError, match="q no longer has adapter 'default'"):
        randlora.save(wrapped, tmp_path / "adapter")
    with untouched(wrapped), pytest.raises(AdapterError, match="the model has adapters of PEFT"):
        randlora.inject(model, r=2, name="second")
    wrapped.unload()
    assert same_bits(model(TOKENS), expected)
    randlora.save(model, tmp_path / "adapter")


@pytest.mark.parametrize("targets", ["all", None, ["1"]])
def test_matrices_of_an_adapter_of_ones_own_are_skipped_with_the_reason(targets: Any) -> None:
    report = randlora.plan(nn.Sequential(nn.Linear(8, 8), OwnLoRA()), r=2, targets=targets)
    assert ("1.linear" in report.targets, {*report.skipped}) == (True, {"1.lora_A", "1.lora_B"})

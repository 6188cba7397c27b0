"""`inject`, `plan` and `eject`: what they change, what they must not, and what they refuse before anything changes."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from torch import nn
from torch.nn.parameter import UninitializedParameter

import randlora
from randlora import RandLoRAConfig
from randlora.config import LARGEST_FACTOR
from randlora.errors import AdapterError, CheckpointError, ConfigError, MergeError, RandLoRAError, TargetError
from randlora.functional import Compute
from randlora.state import adapted_root, is_adapted
from tests.kit import all_bits, assert_unchanged, fill, same_bits, set_alpha, snapshot, untouched
from tests.laws import TOKENS, Mixed
from tests.models import llama
from tests.strategies import KINDS_AND_STREAMS, seeds

ADAPTED = ("q", "up", "down")


@given(kind=st.sampled_from(KINDS_AND_STREAMS), r=st.integers(3, 12), seed=seeds)
def test_a_fresh_adapter_leaves_every_bit_of_a_models_output(kind: tuple[str, str], r: int, seed: int) -> None:
    model, options = Mixed(), {"r": r, "seed": seed, "basis": kind[0], "stream": kind[1]}
    before = model(TOKENS)
    try:
        with untouched(model):
            planned = randlora.plan(model, **options)  # type: ignore[arg-type]
        assert randlora.inject(model, **options) == planned  # type: ignore[arg-type]
    except ConfigError:  # a ternary draw of so few numbers may be all zeros
        assert kind[0] == "very_sparse"
        reject()
    for compute in get_args(Compute):
        randlora.set_compute(model, compute)
        randlora.activate(model, {"default": -LARGEST_FACTOR})
        assert same_bits(model(TOKENS), before)


def test_inject_adapts_every_linear_layer_but_the_head_and_freezes_the_rest() -> None:
    model, twin = Mixed().eval(), Mixed()
    modules, tensors = {name for name, _ in model.named_modules()}, {*model.state_dict()}
    report = randlora.inject(model, r=4)
    added = {f"{fqn}.randlora_{part}" for fqn in ADAPTED for part in ("lambda", "gamma")}
    assert report.targets == ADAPTED
    assert {name for name, _ in model.named_modules()} - modules == added
    assert {*model.state_dict()} - tensors == {f"{name}.default" for name in added}
    trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
    assert trainable == {model.get_parameter(f"{name}.default") for name in added}
    assert trainable == {*randlora.trainable_parameters(model)}
    assert not any(module.training for module in model.modules())
    randlora.inject(twin, r=4)
    twin.load_state_dict(fill(model).state_dict())
    assert same_bits(twin(TOKENS), model(TOKENS))


def test_eject_gives_back_the_original_objects_and_every_bit_also_of_what_inference_mode_made() -> None:
    model = Mixed()
    model.norm.requires_grad_(False)
    before, expected = snapshot(model), model(TOKENS)
    with torch.inference_mode():
        randlora.inject(model, r=4, train_also=["norm", "q.bias"])
        model(TOKENS)
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(TOKENS).square().mean().backward()
        optimizer.step()
    assert not torch.allclose(model(TOKENS), expected)
    model.later = nn.Linear(12, 2)
    assert randlora.eject(model) == ADAPTED
    assert model.later.weight.requires_grad
    del model.later
    assert_unchanged(model, before)


# What is refused


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))


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


def with_one() -> Mixed:
    model = Mixed()
    randlora.inject(model, r=4, targets=["down"], name="taken")
    return model


NAMED = "expected a printable name without dots"
RESERVED = "not an attribute of ParameterDict or a keyword of Python"
REFUSED: list[tuple[Callable[[], nn.Module], dict[str, Any], type[RandLoRAError], str]] = [
    (containing_itself, {}, TargetError, r"contains itself: 0\.around is the model"),
    (layers, {"r": 10**6}, ConfigError, "r=1000000 is larger than its layers, which are at most 8"),
    (layers, {"targets": ["0"], "alpha": -0.0}, ConfigError, r"alpha=[\d.-]+ must be positive"),
    (layers, {"targets": ["0"], "alpha": {"0": -1e-30, ".*": 8}}, ConfigError, r"alpha=-1e-30 must be positive"),
    (lazy, {"targets": ["0"], "train_also": ["1"]}, TargetError, r"includes 1\.weight, which has no shape yet"),
    (lazy, {"targets": ["1"]}, TargetError, "1 is of type LazyLinear|1 .*no shape yet"),
    (OwnLoRA, {"targets": ["lora_A"]}, TargetError, r"lora_A \(Linear\) cannot be adapted: by its name it is part"),
    (with_one, {"r": 0}, ConfigError, "r must be a positive integer"),
    (with_one, {"r": 1, "basis": "very_sparse", "seed": 7, "targets": ["q"]}, ConfigError, "standard deviation of 0"),
    (with_one, {"targets": "no"}, TargetError, "'no' matches no layer or weight that can be adapted; the nearest "),
    (with_one, {"exclude": "q|up|down"}, TargetError, "no layer is left to adapt"),
    (with_one, {"train_also": ["hed"]}, TargetError, r"train_also='hed' matches no module .* are .*head"),
    (with_one, {"targets": ["q"], "train_also": ["q"]}, TargetError, "q.weight, which the targets name too"),
    (with_one, {"targets": ["q"], "train_also": ["q", "hed"]}, TargetError, "2 problems"),
    (with_one, {"config": RandLoRAConfig(), "r": None, "seed": 4}, ConfigError, "either config= or single options"),
    *((with_one, {"name": name}, AdapterError, NAMED) for name in ("", "a.b", "a\nb")),
    *((with_one, {"name": name}, AdapterError, RESERVED) for name in ("class", "keys", "training")),
    (with_one, {"name": "taken"}, AdapterError, "has an adapter of that name; remove it"),
]


@pytest.mark.parametrize(("build", "options", "error", "message"), REFUSED)
def test_what_cannot_work_is_refused_before_anything_changes(
    build: Callable[[], nn.Module], options: dict[str, Any], error: type[RandLoRAError], message: str
) -> None:
    model = build()
    unchanged = nullcontext() if build is containing_itself else untouched(model)  # no state dict can be made of it
    with unchanged, pytest.raises(error, match=message):
        randlora.inject(model, **{"r": 2, **options})
    for verb in (randlora.plan, randlora.training_memory) if build is not with_one else ():
        with pytest.raises(error, match=message):
            verb(model, **{"r": 2, **options})


VALUES: list[Any] = [1.0, -1, "yes", b"no", np.True_, (), {}, [[]], {"a": "b"}, {1: 1.0}, object(), None, torch.ones(2)]
VALUES += [10**400, 10**5000, float("nan"), {"default": 10**400}, [10**5000]]
VERBS: list[Callable[..., Any]] = [
    *(randlora.inject, randlora.eject, randlora.activate, randlora.remove, randlora.delta_weight),
    *(randlora.set_compute, randlora.merge, randlora.unmerge, randlora.adapters, randlora.prepare_quantized),
    *(randlora.find_targets, randlora.rename, randlora.set_trainable, randlora.serving.combine),
    *(randlora.adapter_state, randlora.swap, randlora.update_norms, randlora.limit_norms),
]
REQUIRED: dict[str, Any] = {"names": "default", "name": "default", "fqn": "0", "to": "b", "limit": 0.5}
REQUIRED["adapters"] = {"default": 0.5}


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


def test_adapters_of_a_part_belong_to_it_and_a_wrapper_shows_them() -> None:
    for inner_first in (True, False):
        model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
        first, second = (model[0], model) if inner_first else (model, model[0])
        randlora.inject(first, r=2, targets="all-linear")
        with untouched(first), pytest.raises(AdapterError, match="has adapters that were added to a different module"):
            randlora.inject(second, r=2, targets="all-linear", name="other")
    one, other = Mixed(), Mixed()
    around = nn.Sequential(nn.Sequential(one, other))
    assert not is_adapted(around)
    randlora.inject(one, r=4)
    assert is_adapted(around)
    assert adapted_root(around)[0] is one
    randlora.inject(other, r=4)
    with pytest.raises(AdapterError, match=r"several submodules have adapters \(0\.0, 0\.1\): call this"):
        randlora.merge(around)


# Models in unusual states


def test_a_model_built_in_inference_mode_is_adapted_merged_and_restored() -> None:
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


def test_uninitialized_layers_that_are_no_targets_do_not_matter(tmp_path: Path) -> None:
    unused = nn.LazyConv1d(2, 1)
    for verb in (randlora.eject, randlora.merge):
        model = nn.Sequential(nn.Linear(4, 6), nn.LazyLinear(3), nn.Sequential(unused))
        randlora.prepare_quantized(model)
        with untouched(model):
            planned = randlora.plan(model, r=2, targets="0")
        assert randlora.inject(model, r=2, targets="0").targets == planned.targets == ("0",)
        assert not any(parameter.requires_grad for parameter in model[1].parameters())
        randlora.activate(model, "default")
        randlora.set_trainable(model, "default")
        randlora.save(fill(model), tmp_path / "adapter")
        with randlora.merged(model):
            pass
        adapted = model[:2](torch.ones(2, 4))  # the first forward initializes the second layer
        assert (adapted.shape, isinstance(unused.weight, UninitializedParameter)) == ((2, 3), True)
        verb(model)
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_buffers_without_values_that_no_state_dict_has_are_spoken_of_when_the_model_changes() -> None:
    with torch.device("meta"):
        model, unused = llama(), Mixed()
    before = dict(unused.named_modules())
    assert randlora.plan(unused, r=4).targets == ADAPTED
    assert (dict(unused.named_modules()), randlora.adapters(unused)) == (before, [])
    (note,) = randlora.inject(model, r=2).notes
    empty = "model.rotary_emb.inv_freq, model.rotary_emb.original_inv_freq"
    assert note.startswith(f"no values: {empty} on the meta device")
    assert randlora.plan(llama(), r=2).notes == randlora.inject(llama(), r=2).notes == ()


def test_an_alpha_of_a_file_is_loaded_whatever_it_is(tmp_path: Path) -> None:
    trained, model = adapted(), layers()
    set_alpha(trained, -3.0)
    randlora.save(trained, tmp_path)
    model.load_state_dict(trained.state_dict(), strict=False)
    randlora.load(model, tmp_path)
    assert torch.equal(randlora.delta_weight(model, "0"), randlora.delta_weight(trained, "0"))
    assert randlora.adapters(model)[0].options["0"].alpha == -3


# Adapters of others

LORA = peft.LoraConfig(r=2, target_modules=["q"])
CONFIGS = [LORA, peft.RandLoraConfig(r=2, target_modules=["q"]), peft.VeraConfig(r=2, target_modules=["q"])]
CONFIGS.append(peft.IA3Config(target_modules=["q"], feedforward_modules=[]))


def peft_models(config: Any) -> list[Any]:
    models: list[Any] = [peft.get_peft_model(Mixed(), config)]
    if not isinstance(config, peft.VeraConfig):  # as transformers' add_adapter does, and PEFT cannot with VeRA
        models.append(peft.inject_adapter_in_model(config, Mixed()))
    if config is LORA:
        models.append(peft.get_peft_model(Mixed(), config, mixed=True))
        models[-1].add_adapter("other", peft.LoHaConfig(r=2, target_modules=["up"]))
        models[-1].set_adapter(["default", "other"])
    return models


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_a_model_with_adapters_of_peft_is_refused_by_name(config: Any) -> None:
    targets: list[Any] = [None, "all", ["down"], ["q"], ["lora_A"]]
    for model in peft_models(config):
        also = r"up \(peft\.tuners\.loha\..*" if isinstance(model, peft.PeftMixedModel) else ""
        said = rf"adapters of PEFT: .*q.*\(peft\.tuners\..*{also} merge or remove them first.*unload\(\)"
        for each in targets:
            with untouched(model), pytest.raises(AdapterError, match=said):
                randlora.inject(model, r=2, targets=each)
        with pytest.raises(AdapterError, match=r"cannot find targets: .* adapters of PEFT: .*peft\.tuners"):
            randlora.find_targets(model, "all")
        if hasattr(model, "unload"):
            assert {"q", "up"} <= {*randlora.inject(model.unload(), r=2, targets="all-linear").targets}


@pytest.mark.parametrize("is_mixed", [True, False], ids=["mixed", "one kind"])
def test_what_peft_wraps_later_is_said_to_be_lost_until_peft_has_left(is_mixed: bool, tmp_path: Path) -> None:
    randlora.inject(model := Mixed(), r=2, targets=["q", "up"])
    expected = fill(model)(TOKENS)
    wrapped: Any = peft.get_peft_model(model, LORA, mixed=is_mixed)
    assert same_bits(wrapped(TOKENS), expected)
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
    assert same_bits(model(TOKENS), expected)
    randlora.save(model, tmp_path / "adapter")


@pytest.mark.parametrize("targets", ["all", None, ["1"]])
def test_matrices_of_an_adapter_of_ones_own_are_skipped_with_the_reason(targets: Any) -> None:
    report = randlora.plan(nn.Sequential(nn.Linear(8, 8), OwnLoRA()), r=2, targets=targets)
    assert ("1.linear" in report.targets, {*report.skipped}) == (True, {"1.lora_A", "1.lora_B"})

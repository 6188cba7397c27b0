"""Names of other libraries, and reports that are taken for models, are answered with what is meant."""

import copy
import inspect
import operator
import pickle
import re
from dataclasses import fields
from typing import Any

import peft
import pytest
import torch
from torch import nn

import randlora
from randlora.config import MEANT, RandLoRAConfig
from randlora.errors import ConfigError, OptionError, RandLoRAError
from randlora.hints import CALLS
from tests.kit import untouched

VERBS = (randlora.inject, randlora.plan, randlora.training_memory, randlora.files.plan, randlora.files.training_memory)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8))


@pytest.mark.parametrize("verb", [*VERBS, RandLoRAConfig], ids=lambda verb: f"{verb.__module__}.{verb.__name__}")
def test_an_option_that_a_call_does_not_have_is_answered_in_its_own_name(verb: Any) -> None:
    given = MEANT.keys() - inspect.signature(verb).parameters.keys()
    arguments = () if verb is RandLoRAConfig else (small() if "model" in inspect.signature(verb).parameters else "x",)
    with pytest.raises(OptionError) as caught:
        verb(*arguments, **dict.fromkeys(given))
    first, *lines = str(caught.value).splitlines()
    assert first == f"cannot call {verb.__name__}, {len(given)} problems:"
    assert {*lines} == {f"  - unknown option {option}=: {MEANT[option]}" for option in given}


def test_every_option_of_pefts_configs_is_answered() -> None:
    known = inspect.signature(randlora.inject).parameters.keys()
    theirs = {field.name for config in (peft.LoraConfig, peft.RandLoraConfig) for field in fields(config)}
    assert theirs - known <= MEANT.keys()
    assert not MEANT.keys() & known
    with pytest.raises(OptionError) as caught:
        randlora.inject(small(), **peft.LoraConfig(target_modules=["0"], use_dora=True).to_dict())
    assert "and 1 more" not in str(caught.value)
    assert all(word in str(caught.value) for word in ("use targets=", "use alpha=", "use_dora=: leave it out"))


def test_the_answers_name_options_that_there_are() -> None:
    known = {*inspect.signature(randlora.inject).parameters, *inspect.signature(randlora.save).parameters}
    for answer in MEANT.values():
        assert {*re.findall(r"(\w+)=", answer)} <= known | {"use_rslora"}
        assert answer.startswith(("use ", "leave it out"))


@pytest.mark.parametrize("name", CALLS)
def test_a_call_of_peft_is_answered_with_one_that_there_is(name: str) -> None:
    with pytest.raises(AttributeError, match=f"'{name}': call ") as caught:
        getattr(randlora, name)
    assert not hasattr(randlora, name)
    called = re.findall(r"randlora\.([\w.]+)\(", str(caught.value))
    assert called
    assert all(callable(operator.attrgetter(each)(randlora)) for each in called)


def test_a_report_that_is_taken_for_the_model_says_where_the_model_is() -> None:
    model: Any = small()
    report: Any = randlora.inject(model, 2)
    with untouched(model):
        for name in ("parameters", "train", "to", "generate"):
            with pytest.raises(AttributeError, match=r"write randlora\.inject\(model\), not model = "):
                getattr(report, name)
        with pytest.raises(TypeError, match=r"write randlora\.inject\(model\), not model = "):
            report(1)
        for verb in (randlora.merge, randlora.trainable_parameters, randlora.inject, randlora.adapters):
            with pytest.raises(RandLoRAError, match=r"not model = randlora\.inject"):
                verb(report)
        for call in (lambda: randlora.save(report, "x"), lambda: randlora.load(report, "x")):
            with pytest.raises(RandLoRAError, match=r"not model = randlora\.inject"):
                call()
    assert copy.deepcopy(report) == pickle.loads(pickle.dumps(report)) == report
    with pytest.raises(AttributeError, match="MergeReport has no 'eval'"):
        randlora.merge(model).eval()  # type: ignore[attr-defined]


@pytest.mark.parametrize("as_config", [False, True])
def test_a_config_that_is_given_otherwise_is_answered_with_the_call_that_is_meant(*, as_config: bool) -> None:
    model: Any = small()
    theirs = peft.RandLoraConfig(r=4, target_modules=["0"], randlora_alpha=8, projection_prng_key=3, sparse=True)
    lora = peft.LoraConfig(r=4, target_modules=["0"], lora_alpha=8, lora_dropout=0.5)
    given: list[Any] = [theirs, lora] if as_config else [theirs, lora, RandLoRAConfig(r=4)]
    for config in given:
        with untouched(model), pytest.raises(ConfigError) as caught:
            randlora.inject(model, config=config) if as_config else randlora.inject(model, config)
        call = "randlora.inject(" + str(caught.value).split("randlora.inject(")[1]
        fresh = small()
        report = eval(call, {"randlora": randlora, "model": fresh, "config": config})
        assert report.targets == ("0",)
        assert report.config.r == (32 if config is lora else 4)
        if config is theirs:
            assert (report.config.alpha, report.config.seed, report.config.basis) == (8, 3, "sparse")
        if config is lora:
            assert (report.config.alpha, report.config.dropout) == (randlora.equivalent_alpha(4, 8), 0.5)


def test_the_parameters_to_train_can_be_listed_again_and_again() -> None:
    model = small()
    randlora.inject(model, 2)
    parameters = randlora.trainable_parameters(model)
    assert [id(each) for each in parameters] == [id(each) for each in parameters]
    assert len(parameters) == 2
    assert nn.utils.clip_grad_norm_(parameters, 1.0) == 0


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, lambda model: model.to("cpu", torch.half)])
def test_training_in_half_precision_by_a_conversion_is_warned_of_with_the_way_back(convert: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    randlora.inject(model, 2, train_also=["1"])
    convert(model)  # which may be for inference
    with pytest.warns(UserWarning, match="in which small steps are lost: convert the model before inject") as caught:
        randlora.trainable_parameters(model)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match="small steps are lost"):
        exec(str(caught[0].message).split("`")[1], {"randlora": randlora, "model": model})
    assert {each.dtype for each in randlora.trainable_parameters(model)} == {torch.float32}

"""Every preset finds its layers in the model that transformers builds for the type, and agrees with PEFT's choice."""

import re
from typing import Any

import pytest
import torch
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as THEIR_TARGETS
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import randlora
from randlora.targets.defaults import HEAD_NAMES, TARGET_PRESETS
from tests.further import further

NOT_IN_TRANSFORMERS = {
    "RefinedWeb": "Falcon's name while its code came with the checkpoint",
    "RefinedWebModel": "the same",
    "btlm": "its code comes with the checkpoint",
    "chatglm": "its code comes with the checkpoint; transformers' own port is another type, glm",
    "rwkv7": "its code comes with the checkpoint",
}
"""Types whose model cannot be built offline."""

ALTERNATIVES = {"blip-2": "the language model inside is an OPT or a T5"}
"""Types whose preset names layers that only some variants have."""

OPTIONS = {name: {"pad_token_id": 1} for name in ("idefics3", "smolvlm")}
"""What a type's config needs: transformers 5.12 pads these with an id outside of their vocabulary."""

BUILDABLE = sorted(TARGET_PRESETS.keys() - NOT_IN_TRANSFORMERS)
SLOW_TO_IMPORT = ("bark", "cpmant", "llama4", "phi4_multimodal")
CLASSIFIERS = ("bert", "deberta-v2", "distilbert", "electra", "roberta", "vit", "wav2vec2")
MASKED_LANGUAGE_MODELS = ("bert", "distilbert")
LANGUAGE_MODELS = (
    *MASKED_LANGUAGE_MODELS,
    "bloom",
    "falcon",
    "gpt2",
    "gpt_neox",
    "gptj",
    "llama",
    "mistral",
    "opt",
    "phi3",
    "qwen3",
    "rwkv",
    "t5",
)


def build(model_type: str, auto_class: Any = transformers.AutoModel) -> nn.Module:
    config = transformers.AutoConfig.for_model(model_type, **OPTIONS.get(model_type, {}))
    config.architectures = []  # the first class of a type with several
    with torch.device("meta"):
        model = auto_class.from_config(config)
    assert isinstance(model, nn.Module)
    return model


def last_components(model: nn.Module) -> set[str]:
    return {target.fqn.rsplit(".", 1)[-1] for target in randlora.find_targets(model)}


def test_every_preset_is_for_a_type_that_transformers_or_the_list_above_knows() -> None:
    assert TARGET_PRESETS.keys() - set(CONFIG_MAPPING) == NOT_IN_TRANSFORMERS.keys()


@pytest.mark.parametrize("model_type", [further(each) if each in SLOW_TO_IMPORT else each for each in BUILDABLE])
def test_a_preset_finds_the_layers_it_names(model_type: str) -> None:
    model = build(model_type)
    preset = TARGET_PRESETS[model_type]
    report = randlora.plan(model, r=8)
    assert report.rule.startswith(f"the preset of model_type {model_type!r}")
    if isinstance(preset, str):
        assert all(re.fullmatch(preset, fqn) for fqn in report.targets)
    elif model_type in ALTERNATIVES:
        assert last_components(model) <= set(preset)
    else:
        assert last_components(model) == set(preset)


@pytest.mark.parametrize("model_type", sorted(THEIR_TARGETS))
def test_a_preset_is_the_choice_of_peft_where_peft_has_one(model_type: str) -> None:
    ours, theirs = TARGET_PRESETS[model_type], THEIR_TARGETS[model_type]
    assert (ours if isinstance(ours, str) else list(ours)) == theirs


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_all_linear_leaves_out_the_output_head_of_a_language_model(model_type: str) -> None:
    auto_class = transformers.AutoModelForCausalLM
    if model_type in MASKED_LANGUAGE_MODELS:
        auto_class = transformers.AutoModelForMaskedLM
    if model_type == "t5":
        auto_class = transformers.AutoModelForSeq2SeqLM
    model = build(model_type, auto_class)
    head = model.get_output_embeddings()  # type: ignore[operator]
    [name] = [fqn for fqn, module in model.named_modules() if module is head]
    report = randlora.plan(model, r=8, targets="all-linear")
    others = {fqn: why for fqn, why in report.skipped.items() if "rescale_every=0" not in why}  # of RWKV
    assert others == {name: "the output head"}
    assert report.targets


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_all_linear_leaves_out_the_head_of_a_classifier(model_type: str) -> None:
    auto_class = {
        "vit": transformers.AutoModelForImageClassification,
        "wav2vec2": transformers.AutoModelForAudioClassification,
    }.get(model_type, transformers.AutoModelForSequenceClassification)
    report = randlora.plan(build(model_type, auto_class), r=8, targets="all-linear")
    assert report.skipped
    assert {fqn.split(".")[0] for fqn in report.skipped} <= HEAD_NAMES
    assert set(report.skipped.values()) == {"the output head"}

"""Which layers `training_memory(load_in_4bit=True)` counts in 4 bits: those that transformers itself would replace."""

from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer

from randlora.model.memory_codes import planned_codes
from randlora.targets.census import Census

RESNET = {
    "depths": [1] * 4,
    "hidden_sizes": [8] * 4,
    "embedding_size": 8,
    "out_features": ["stage2", "stage3", "stage4"],
}
DETR = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}


def llama() -> Any:
    config = transformers.LlamaConfig(num_hidden_layers=1, pad_token_id=0)
    return transformers.LlamaForSequenceClassification(config)


def detr() -> Any:
    backbone = transformers.ResNetConfig(**RESNET)
    options = {"backbone_config": backbone, "with_box_refine": True, "two_stage": True}
    config = transformers.DeformableDetrConfig(**DETR, **HEADS, **options)
    return transformers.DeformableDetrForObjectDetection(config)


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(num_hidden_layers=1, tie_word_embeddings=False))


def roberta() -> Any:
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(num_hidden_layers=1))


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(num_hidden_layers=1))


def t5() -> Any:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(num_layers=1))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1))


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(bert, id="a head that is not the last layer"),
        pytest.param(llama, id="a last layer that is no output embedding"),
        pytest.param(roberta, id="a last layer with a bias, which is quantized"),
        pytest.param(detr, id="layers that are tied to others and no head"),
        pytest.param(t5, id="layers that the class keeps in float32"),
        pytest.param(gpt2, id="layers of Conv1D"),
        pytest.param(mixtral, id="experts in stacks, which are not quantized"),
    ],
)
def test_the_layers_in_4_bits_are_those_that_transformers_replaces(build: Callable[[], Any]) -> None:
    with torch.device("meta"):
        model = build()
    planned = planned_codes(Census.of(model))
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    replace_with_bnb_linear(model, kept, transformers.BitsAndBytesConfig(load_in_4bit=True))
    replaced = {f"{fqn}.weight" for fqn, layer in model.named_modules() if type(layer) is bitsandbytes.nn.Linear4bit}
    assert replaced
    assert planned.keys() == replaced

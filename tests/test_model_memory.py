"""The memory that training needs, by formulas: within 15 % of what is measured, and what is held exactly."""

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from torch import nn
from torch.torch_version import TorchVersion
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer

import randlora
from benchmarks.held import peak_of
from benchmarks.memory import kept_by
from randlora.errors import ConfigError, RandLoRAError
from randlora.model.memory import TrainingMemory, planned_codes
from randlora.targets.census import Census
from tests.kit import working_nbytes
from tests.model_directories import write
from tests.models import GPT2, LLAMA, RealModel
from tests.quantized import FP4, NF4, quantized_model
from tests.quantized import MODELS as QUANTIZED

WITHIN = 0.15
BATCH, TOKENS, WORDS = 4, 128, 2000
SIDES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIDES, "vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
GROUPED = {**TEXT, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": GROUPED,
    "Qwen3ForCausalLM": {**GROUPED, "head_dim": 64},
    "Phi3ForCausalLM": GROUPED,
    "Gemma3ForCausalLM": {**GROUPED, "head_dim": 64},
    "GPTNeoXForCausalLM": TEXT,
    "OPTForCausalLM": {**TEXT, "ffn_dim": 1024, "word_embed_proj_dim": 256, "dropout": 0.0},
    "MixtralForCausalLM": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "ViTForImageClassification": {**SIDES, "image_size": 88, "patch_size": 8, "num_labels": 10},
}
EXPERTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
ALL: dict[str, Any] = {"r": 16, "targets": "all-linear"}

with_fused_attention = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.7", reason="attention with grouped heads is not fused on a CPU in torch 2.6"
)


def build(name: str, **options: Any) -> Any:
    kind = getattr(transformers, name)
    return kind(kind.config_class(**(options or MODELS[name])))


def memory(model: nn.Module, **options: Any) -> TrainingMemory:
    return randlora.training_memory(model, **{"r": 4, **options})


def trained(model: Any, *, checkpointing: bool = False, **options: Any) -> int:
    model.train()
    randlora.inject(model, **options)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    ids = torch.randint(WORDS, (BATCH, TOKENS))
    inputs = {"input_ids": ids, "labels": ids}
    if model.config.model_type == "vit":
        inputs = {"pixel_values": torch.randn(BATCH, 3, 88, 88).to(model.dtype), "labels": torch.zeros(BATCH).long()}

    def step() -> None:
        output = model(**inputs)  # held until the end of the step, as in usual code
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    held = [*model.parameters(), *model.buffers()]
    held += [weight.quant_state.absmax for weight in model.parameters() if hasattr(weight, "quant_state")]
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return sum(int(tensor.nbytes) for tensor in (*held, *moments)) + working_nbytes(model) + peak_of(step, "cpu")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("LlamaForCausalLM", torch.float32, {"targets": ["lm_head", "q_proj"], "train_also": ["down_proj"]}),
        ("LlamaForCausalLM", torch.bfloat16, {"checkpointing": True}),
        ("OPTForCausalLM", torch.float32, {"basis": "block"}),
        ("MixtralForCausalLM", torch.bfloat16, {"targets": EXPERTS}),
        ("ViTForImageClassification", torch.bfloat16, {"basis": "sparse", "train_also": "classifier"}),
        pytest.param(
            *("Qwen3ForCausalLM", torch.bfloat16, {"targets": "all-linear", "r": {"q_proj": 8, ".*": 64}}),
            marks=with_fused_attention,
        ),
        *(
            pytest.param(name, dtype, options, marks=pytest.mark.slow)
            for name in MODELS
            for dtype, options in (
                (torch.float32, {"targets": "all-linear", "basis": "block"}),
                (torch.bfloat16, {"targets": "all-linear", "checkpointing": True}),
            )
        ),
    ],
)
def test_the_sum_is_within_15_percent_of_a_real_step(name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    options = {"r": 16, **options}
    with torch.device("meta"):
        planned = memory(build(name).to(dtype), tokens=BATCH * (122 if "ViT" in name else TOKENS), **options)
    assert planned.total == pytest.approx(trained(build(name).to(dtype), **options), rel=WITHIN)


def test_a_step_in_4_bits_takes_what_was_planned_before_and_after_it_was_loaded(tmp_path: Path) -> None:
    dense = build("LlamaForCausalLM").to(torch.bfloat16)
    options: dict[str, Any] = {**ALL, "tokens": BATCH * TOKENS}
    write(dense, tmp_path / "dense")
    planned = randlora.files.training_memory(tmp_path / "dense", load_in_4bit=True, **options)
    assert planned == memory(dense, load_in_4bit=True, **options)
    bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=bits)
    model.save_pretrained(tmp_path / "nf4")
    stored = randlora.files.training_memory(tmp_path / "nf4", **options)
    assert memory(model, **options).total == pytest.approx(stored.total, rel=0.02)
    total = trained(model, **ALL)
    assert [planned.total, stored.total] == pytest.approx([total, total], rel=WITHIN)


@pytest.mark.parametrize(("kind", "quantization"), [(QUANTIZED[0], NF4), *((kind, FP4) for kind in QUANTIZED[1:])])
def test_what_would_be_loaded_in_4_bits_is_what_is(kind: RealModel, quantization: Any) -> None:
    model = quantized_model(kind, quantization)
    held = {tensor.untyped_storage().data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]}
    weights = [weight for weight in model.parameters() if hasattr(weight, "quant_state")]
    nested = [weight.quant_state for weight in weights if weight.quant_state.nested]
    scales = [tensor for weight in weights for tensor in (weight.quant_state.absmax, weight.quant_state.code)]
    scales += [tensor for state in nested for tensor in (state.offset, state.state2.absmax, state.state2.code)]
    exact = sum(tensor.nbytes for tensor in (*held.values(), *scales))
    assert memory(model).weights == exact
    with torch.device("meta"):
        planned = memory(kind.build(), load_in_4bit=True)
    assert nested or planned.weights == exact
    assert memory(kind.build(), load_in_4bit=True) == planned
    assert str(planned).startswith("memory for training on one device, float32, weights in 4 bits:\n")
    with pytest.raises(ConfigError, match="load_in_4bit=True is for a model that is not quantized"):
        memory(model, load_in_4bit=True)


SMALL = {"num_hidden_layers": 1}
RESNET: dict[str, Any] = {"depths": [1] * 4, "hidden_sizes": [8] * 4, "embedding_size": 8}
RESNET["out_features"] = ["stage2", "stage3", "stage4"]
DETR = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
DETR |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "with_box_refine": True, "two_stage": True}
REPLACED: dict[str, dict[str, Any]] = {
    "BertForMaskedLM": {**SMALL, "tie_word_embeddings": False},  # its head is not the last layer
    "LlamaForSequenceClassification": {**SMALL, "pad_token_id": 0},  # its last layer is no output embedding
    "RobertaForSequenceClassification": SMALL,  # whose last layer has a bias, and is quantized
    "DeformableDetrForObjectDetection": DETR,  # of which layers are tied to others, and no head
    "T5ForConditionalGeneration": {"num_layers": 1},  # whose class keeps layers in float32
    "GPT2LMHeadModel": {"n_layer": 1},  # whose layers are Conv1D
    "MixtralForCausalLM": SMALL,  # whose experts are in stacks, which are not quantized
}


@pytest.mark.parametrize("name", REPLACED)
def test_the_layers_in_4_bits_are_those_that_transformers_replaces(name: str) -> None:
    beside = {"backbone_config": transformers.ResNetConfig(**RESNET)} if "Detr" in name else {}
    with torch.device("meta"):
        model = build(name, **REPLACED[name], **beside)
    planned = planned_codes(Census.of(model))
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    replace_with_bnb_linear(model, kept, transformers.BitsAndBytesConfig(load_in_4bit=True))
    replaced = {f"{fqn}.weight" for fqn, layer in model.named_modules() if type(layer) is bitsandbytes.nn.Linear4bit}
    assert planned.keys() == replaced != set()


def test_a_quantized_weight_is_counted_as_it_is_stored() -> None:
    layer = bitsandbytes.nn.Linear8bitLt(64, 128, bias=False, has_fp16_weights=False)
    assert memory(nn.Sequential(layer).to("cpu"), targets=["0"]).weights == 64 * 128 + 4 * 128
    quantization = pytest.importorskip("torchao.quantization")
    for config in (quantization.Int8WeightOnlyConfig, quantization.Float8WeightOnlyConfig):
        quantization.quantize_(model := nn.Sequential(nn.Linear(64, 128, bias=False)), config())
        assert memory(model, targets=["0"]).weights == 64 * 128 + 4 * 128


@pytest.mark.parametrize(
    ("kind", "dtype", "basis", "train"),
    [
        (LLAMA, torch.float32, "sparse", "both"),
        (LLAMA, torch.float32, "dense", "lambda"),
        (GPT2, torch.float32, "block", "both"),
        (GPT2, torch.bfloat16, "dense", "both"),
    ],
)
def test_what_is_held_is_that_of_a_trained_model(kind: RealModel, dtype: torch.dtype, basis: Any, train: Any) -> None:
    options: dict[str, Any] = {"basis": basis, "train": train, "train_also": ["norm" if kind is LLAMA else "ln_f"]}
    model: Any = kind.build()
    planned = memory(model, dtype=dtype, **options)
    with torch.device("meta"):
        assert planned == memory(kind.build(), dtype=dtype, **options)
    held = [*model.to(dtype).parameters(), *kind.build().buffers()]  # torch converts buffers too, transformers does not
    randlora.inject(model, 4, **options)
    held += [each for name, each in model.named_parameters() if "gamma" in name and train == "lambda"]
    assert planned.weights == sum(tensor.nbytes for tensor in held)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    model(input_ids=torch.randint(60, (2, 9))).logits.float().sum().backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert planned.parameters == sum(parameter.nbytes for parameter in parameters)
    assert planned.gradients == sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
    assert planned.optimizer == sum(moment.nbytes for moment in moments)
    if basis != "block":  # of which such small layers have dense copies
        assert planned.bases == working_nbytes(model)


@with_fused_attention
@pytest.mark.parametrize(("dtype", "targets"), [(torch.float32, None), (torch.bfloat16, "all-linear")])
def test_what_a_llama_keeps_for_backward_is_counted(dtype: torch.dtype, targets: Any) -> None:
    model = build("LlamaForCausalLM").to(dtype).train()
    planned = memory(model, r=16, targets=targets, tokens=BATCH * TOKENS)
    randlora.inject(model, 16, targets=targets)
    ids = torch.randint(WORDS, (BATCH, TOKENS))
    kept = kept_by(model, lambda: model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    assert planned.activations == pytest.approx(kept, rel=0.03)


def test_shards_have_equally_many_rows() -> None:
    with torch.device("meta"):
        uneven = nn.Sequential(nn.Linear(8, 9, bias=False))
    sharded = [memory(uneven, targets=["0"], strategy="fsdp2", devices=devices).weights for devices in (1, 2, 4, 16)]
    assert sharded == [4 * 8 * rows for rows in (9, 5, 3, 1)]


def test_an_adapted_model_is_planned_for_another_adapter() -> None:
    plain, model = (build("LlamaForCausalLM") for _ in range(2))
    randlora.inject(model, r=4)
    assert memory(model).parameters == memory(plain).parameters > 0


def test_what_cannot_be_planned_is_refused() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"devices": 0}, "devices must be at least 1, got 0"),
        ({"tokens": -1}, "tokens must be at least 0, got -1"),
        ({"strategy": "pp"}, "strategy must be one of ddp, fsdp2, got 'pp'"),
        ({"dtype": torch.int8}, "dtype must be a floating one, got torch.int8"),
        ({"token": 1}, "unknown option token="),
    ]
    for options, message in refused:
        with pytest.raises(RandLoRAError, match=message):
            memory(nn.Sequential(nn.Linear(8, 8)), **options)


def test_what_is_not_counted_is_said_and_what_does_nothing_is_not_counted() -> None:
    text = str(memory(LLAMA.build(), tokens=18, devices=2, strategy="fsdp2"))
    assert text.startswith("memory for training on each of 2 devices, fsdp2, float32, within 15 %:\n")
    assert "not counted: attention that keeps its weights" in text
    assert ["without tokens" in each for each in (text, str(memory(LLAMA.build())))] == [False, True]
    with torch.device("meta"):
        model = LLAMA.build()
    both, last = (memory(model, targets=rf"model\.layers\.{which}\..*_proj", tokens=8) for which in (".", "1"))
    assert both.activations == 2 * last.activations > 0  # layers before the first adapted one keep nothing

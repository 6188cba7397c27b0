"""The memory that training needs, by formulas: within 15 % of what is measured, and what is held exactly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import randlora
from benchmarks.held import peak_of
from benchmarks.memory import kept_by
from randlora.errors import ConfigError, RandLoRAError
from randlora.functional.cost import Pass
from randlora.model.memory import TrainingMemory
from randlora.state import adapted_root
from tests.further import further
from tests.model_directories import write
from tests.models import GPT2, LLAMA, RealModel
from tests.quantized import FP4, NF4, quantized_model
from tests.quantized import MODELS as QUANTIZED

WITHIN = 0.15
BATCH, TOKENS, WORDS = 4, 128, 2000
SIDES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIDES, "vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=2)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**TEXT, num_key_value_heads=2, head_dim=64)
    ),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**TEXT, num_key_value_heads=2)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**TEXT, num_key_value_heads=2, head_dim=64)
    ),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**TEXT)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**TEXT, ffn_dim=1024, word_embed_proj_dim=256, dropout=0.0)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**SIDES, image_size=88, patch_size=8, num_labels=10)
    ),
}
EXPERTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]


def memory(model: nn.Module, **options: Any) -> TrainingMemory:
    return randlora.training_memory(model, **{"r": 4, **options})


def trained(model: Any, *, checkpointing: bool = False, **options: Any) -> int:
    """Train an adapter for two steps and return the most memory that the second has, with all that is held."""
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
        output = model(**inputs)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    held = [*model.parameters(), *model.buffers()]
    held += [weight.quant_state.absmax for weight in model.parameters() if hasattr(weight, "quant_state")]
    moments = [value for state in optimizer.state.values() for value in state.values()]
    bases = sum(basis.working_nbytes for basis in adapted_root(model)[1].bank)
    return sum(int(tensor.nbytes) for tensor in (*held, *moments)) + bases + peak_of(step, "cpu")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("llama", torch.float32, {"targets": "all-linear"}),
        ("llama", torch.bfloat16, {"targets": "all-linear", "basis": "block"}),
        ("llama", torch.bfloat16, {"checkpointing": True}),
        ("llama", torch.float32, {"targets": ["lm_head", "q_proj"], "train_also": ["down_proj"]}),
        ("opt", torch.float32, {"basis": "block"}),
        ("mixtral", torch.bfloat16, {"targets": EXPERTS}),
        ("vit", torch.float32, {"targets": "all-linear", "checkpointing": True}),
        ("vit", torch.bfloat16, {"basis": "sparse", "train_also": "classifier"}),
        ("qwen3", torch.bfloat16, {"targets": "all-linear", "r": {"q_proj": 8, ".*": 64}}),
        *(
            further(name, dtype, {"targets": targets, "basis": basis, "checkpointing": checkpointing})
            for name in MODELS
            for dtype in (torch.float32, torch.bfloat16)
            for targets in (None, EXPERTS if name == "mixtral" else "all-linear")
            for basis in ("dense", "block")
            for checkpointing in (False, True)
        ),
    ],
)
def test_the_sum_is_within_15_percent_of_a_measured_step(
    name: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    options = {"r": 16, **options}
    with torch.device("meta"):
        planned = memory(MODELS[name]().to(dtype), tokens=BATCH * (122 if name == "vit" else TOKENS), **options)
    assert planned.total == pytest.approx(trained(MODELS[name]().to(dtype), **options), rel=WITHIN)


def test_a_model_of_4_bits_is_counted_as_it_is_stored(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    options: dict[str, Any] = {"r": 16, "targets": "all-linear"}
    write(MODELS["llama"]().to(torch.bfloat16), tmp_path / "dense")
    bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=bits)
    model.save_pretrained(tmp_path / "nf4")
    planned = randlora.files.training_memory(tmp_path / "nf4", tokens=BATCH * TOKENS, **options)
    assert memory(model, tokens=BATCH * TOKENS, **options).total == pytest.approx(planned.total, rel=0.02)
    assert planned.total == pytest.approx(trained(model, **options), rel=WITHIN)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_what_would_be_loaded_in_4_bits_is_what_is(kind: RealModel, double: bool) -> None:
    model = quantized_model(kind, FP4 if not double else NF4)
    held = {tensor.untyped_storage().data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]}
    weights = [weight for weight in model.parameters() if hasattr(weight, "quant_state")]
    nested = [weight.quant_state for weight in weights if weight.quant_state.nested]
    scales = [tensor for weight in weights for tensor in (weight.quant_state.absmax, weight.quant_state.code)]
    scales += [tensor for state in nested for tensor in (state.offset, state.state2.absmax, state.state2.code)]
    exact = sum(tensor.nbytes for tensor in (*held.values(), *scales))
    assert memory(model).weights == exact
    with torch.device("meta"):
        planned = memory(kind.build(), load_in_4bit=True)
    if not double:
        assert planned.weights == exact
    assert memory(kind.build(), load_in_4bit=True) == planned
    assert str(planned).startswith("memory for training on one device, float32, weights in 4 bits:\n")
    with pytest.raises(ConfigError, match="load_in_4bit=True is for a model that is not quantized"):
        memory(model, load_in_4bit=True)


def test_a_step_in_4_bits_takes_what_was_planned_before_it_was_loaded(tmp_path: Path) -> None:
    options: dict[str, Any] = {"r": 16, "targets": "all-linear"}
    dense = MODELS["llama"]().to(torch.bfloat16)
    write(dense, tmp_path)
    planned = randlora.files.training_memory(tmp_path, tokens=BATCH * TOKENS, load_in_4bit=True, **options)
    assert planned == memory(dense, tokens=BATCH * TOKENS, load_in_4bit=True, **options)
    bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=bits)
    assert planned.total == pytest.approx(trained(model, **options), rel=WITHIN)
    whole = randlora.files.training_memory(tmp_path, tokens=BATCH * TOKENS, **options)
    assert planned.backward - whole.backward == 704 * 256 * 2  # the widest weight, dequantized for one product


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_a_weight_of_torchao_is_counted_as_it_is_stored(config: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 128, bias=False))
    quantization.quantize_(model, getattr(quantization, config)())
    assert memory(model, targets=["0"]).weights == 64 * 128 + 4 * 128


def forward(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=torch.randint(60, (2, 9))).logits
    return logits


@pytest.mark.parametrize("basis", ["dense", "block", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LLAMA, GPT2], ids=lambda kind: kind.name)
def test_what_is_held_is_that_of_a_trained_model(kind: RealModel, dtype: torch.dtype, basis: str) -> None:
    options: dict[str, Any] = {"basis": basis, "train_also": ["norm" if kind is LLAMA else "ln_f"]}
    model = kind.build()
    planned = memory(model, dtype=dtype, **options)
    with torch.device("meta"):
        assert planned == memory(kind.build(), dtype=dtype, **options)
    model.to(dtype)
    held = [*model.parameters(), *model.buffers()]
    if dtype == torch.bfloat16:  # torch converts buffers too, transformers does not
        held = [*model.parameters(), *kind.build().buffers()]
    assert planned.weights == sum(tensor.nbytes for tensor in held)
    randlora.inject(model, 4, **options)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    forward(model).float().sum().backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert planned.parameters == sum(parameter.nbytes for parameter in parameters)
    assert planned.gradients == sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
    assert planned.optimizer == sum(moment.nbytes for moment in moments)
    if basis != "block":  # of which such small layers have dense copies
        assert planned.bases == sum(basis.working_nbytes for basis in adapted_root(model)[1].bank)


def test_block_bases_of_a_large_layer_are_what_is_computed_with() -> None:
    model = nn.ModuleDict({"up": nn.Linear(512, 1024, dtype=torch.bfloat16)})
    planned = memory(model, r=32, targets=["up"], basis="block")
    randlora.inject(model, 32, targets=["up"], basis="block")
    model["up"](torch.zeros(1, 512, dtype=torch.bfloat16))
    assert planned.bases == pytest.approx(
        sum(basis.working_nbytes for basis in adapted_root(model)[1].bank), rel=WITHIN
    )


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_llama_keeps_for_backward_is_counted(dtype: torch.dtype, targets: Any) -> None:
    model: Any = MODELS["llama"]().to(dtype).train()
    planned = memory(model, r=16, targets=targets, tokens=BATCH * TOKENS)
    randlora.inject(model, 16, targets=targets)
    ids = torch.randint(WORDS, (BATCH, TOKENS))
    kept = kept_by(model, lambda: model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    assert planned.activations == pytest.approx(kept, rel=0.03)


def test_layers_before_the_first_adapted_one_keep_nothing() -> None:
    with torch.device("meta"):
        model = MODELS["llama"]()
    both, last = (memory(model, targets=rf"model\.layers\.{which}\..*_proj", tokens=8) for which in (".", "1"))
    assert both.activations == 2 * last.activations > 0


@pytest.mark.parametrize("basis", ["dense", "block"])
@pytest.mark.parametrize(
    ("tokens", "checkpointing", "shape"),
    [
        (96, False, (1024, 512)),
        (2048, True, (512, 1024)),
        *(further(tokens, False, shape) for tokens in (96, 2048) for shape in ((1024, 512), (512, 1024))),
    ],
)
def test_the_work_is_that_of_the_operators_that_run(
    basis: Any, tokens: int, checkpointing: bool, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for user in ("functional.pairs", "model.memory"):  # a counter of operators has no passes
        monkeypatch.setattr(f"randlora.{user}.pass_over", lambda *_: Pass(0, is_measured=True))
    model = nn.ModuleDict({"a": nn.Linear(*shape, bias=False)})
    weight, down, up = model.get_parameter("a.weight").detach(), leaf(32, shape[0]), leaf(shape[1], 32)
    options: dict[str, Any] = {"r": 32, "targets": ["a"], "basis": basis}
    planned = memory(model, tokens=tokens, checkpointing=checkpointing, **options)
    randlora.inject(model, **options)
    x, times = leaf(tokens, shape[0]), 2 if checkpointing else 1
    of_lora = multiply_adds(lambda: F.linear(x, weight) + F.linear(F.linear(x, down), up), times)
    assert planned.work == pytest.approx(multiply_adds(lambda: model["a"](x), times) / of_lora, rel=0.01)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def multiply_adds(forward: Callable[[], Tensor], times: int) -> int:
    with FlopCounterMode(display=False) as counter:
        outputs = [forward() for _ in range(times)]
        outputs[0].sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    ("style", "expected"),
    [("colwise", (1 / 2, 1 / 2)), ("rowwise", (1 / 2, 1)), ("packed_colwise", (1 / 2, 1 / 2)), ("replicate", (1, 1))],
)
def test_a_style_splits_a_weight_and_perhaps_its_bias(style: str, expected: tuple[float, float]) -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"up": nn.Linear(64, 64, bias=False), "down": nn.Linear(64, 64)})
    options: dict[str, Any] = {"targets": ["up"], "strategy": "tp", "tp_plan": {"down": style}, "devices": 2}
    of_weight, of_bias = expected
    assert memory(model, **options).weights == 4 * (64 * 64 + 64 * 64 * of_weight + 64 * of_bias)


def test_a_plan_of_tensor_parallelism_names_layers_with_stars() -> None:
    with torch.device("meta"):
        model: Any = LLAMA.build()
    whole, split = memory(model, tokens=8), memory(model, tokens=8, strategy="tp", devices=2)
    assert split.weights < 0.6 * whole.weights  # all but norms
    assert split.parameters == whole.parameters
    assert split.activations < whole.activations


def test_shards_are_of_the_first_dimension_and_padded_to_equally_many_rows() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 9, bias=False))
    options: dict[str, Any] = {"targets": ["0"], "strategy": "fsdp2"}
    assert [memory(model, devices=devices, **options).weights for devices in (1, 2, 4, 16)] == [
        4 * 8 * rows for rows in (9, 5, 3, 1)
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 0}, "devices must be at least 1, got 0"),
        ({"tokens": -1}, "tokens must be at least 0, got -1"),
        ({"strategy": "pp"}, "strategy must be one of ddp, fsdp2, tp, got 'pp'"),
        ({"dtype": torch.int8}, "dtype must be a floating one, got torch.int8"),
        ({"strategy": "tp", "load_in_4bit": True}, 'load_in_4bit=True and strategy="tp" exclude each other'),
        ({"strategy": "tp"}, "strategy='tp' needs tp_plan, because the model does not have a plan"),
        ({"token": 1}, "unknown option token="),
        ({"targets": "nothing"}, "nothing"),
    ],
)
def test_what_cannot_be_planned_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RandLoRAError, match=message) as raised:
        memory(nn.Sequential(nn.Linear(8, 8)), **options)
    assert isinstance(raised.value, ConfigError) or "targets" in options or "token" in options


def test_what_is_not_counted_is_said() -> None:
    text = str(memory(LLAMA.build(), tokens=18, devices=2, strategy="fsdp2"))
    assert text.startswith("memory for training on each of 2 devices, fsdp2, float32, within 15 %:\n")
    assert "not counted: attention that keeps its weights" in text
    assert "work of a step in the adapted layers" in text
    assert "without tokens" not in text
    assert "without tokens" in str(memory(LLAMA.build()))


def test_what_is_not_multiplied_by_tokens_is_no_work() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(64, 64))
    assert memory(model, targets=["0"], tokens=8).work is None

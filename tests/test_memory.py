"""The memory that training needs, by formulas: each part is what a model that runs here holds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import randlora
from benchmarks.held import peak_of
from benchmarks.memory import kept_by
from randlora.bases.basis import Basis
from randlora.bases.spec import BasisSpec
from randlora.errors import ConfigError, RandLoRAError
from randlora.functional import Diagonals, adapted_linear
from randlora.functional.region import Region, all_of, take_spans
from randlora.layers.diagonals import diagonal_shapes
from randlora.memory.parts import Part, style_of
from randlora.memory.pieces import Piece
from randlora.memory.temporary import peak_beside
from randlora.memory.training import TrainingMemory
from randlora.state import adapted_root
from tests.models import GPT2, LLAMA, RealModel

every_basis = pytest.mark.parametrize("basis", ["dense", "block", "sparse"])
TOKENS = 18


def memory(model: nn.Module, **options: Any) -> TrainingMemory:
    return randlora.training_memory(model, 4, **{"device_type": "cpu", **options})


def forward(model: Any) -> Callable[[], Tensor]:
    """Return a forward whose first layers have an input that needs a gradient."""
    ids = torch.randint(60, (2, TOKENS // 2))
    x = model.get_input_embeddings()(ids).detach().requires_grad_()

    def run() -> Tensor:
        logits: Tensor = model(inputs_embeds=x).logits
        return logits

    return run


def frozen(kind: RealModel, **options: Any) -> Any:
    """Build a model whose attention keeps its weights, not its output, which would be an adapted layer's input."""
    model: Any = kind.build()
    model.set_attn_implementation("eager")
    return model.requires_grad_(requires_grad=False)


@every_basis
@pytest.mark.parametrize("kind", [LLAMA, GPT2], ids=lambda kind: kind.name)
def test_layers_keep_their_inputs_and_those_that_share_one_keep_it_once(kind: RealModel, basis: str) -> None:
    model = frozen(kind)
    before = kept_by(model, forward(model))
    planned = memory(model, targets="all-linear", basis=basis, tokens=TOKENS)
    randlora.inject(model, 4, targets="all-linear", basis=basis)  # type: ignore[arg-type]
    assert kept_by(model, forward(model)) - before == planned.inputs


def test_an_input_that_the_model_keeps_too_is_counted_nevertheless() -> None:
    model = frozen(LLAMA)
    model.set_attn_implementation("sdpa")
    before = kept_by(model, forward(model))
    planned = memory(model, targets="all-linear", tokens=TOKENS)
    randlora.inject(model, 4, targets="all-linear")
    kept = kept_by(model, forward(model)) - before
    of_attention = 2 * TOKENS * 32 * 4  # of both layers, as wide as the model
    assert kept in (planned.inputs - of_attention, planned.inputs)  # torch 2.6 keeps an attention's output in itself


def test_with_checkpointing_one_block_at_a_time_keeps_its_inputs() -> None:
    model = LLAMA.build()
    every, one = (memory(model, tokens=TOKENS, checkpointing=each).inputs for each in (False, True))
    assert every == 2 * one > 0


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", [LLAMA, GPT2], ids=lambda kind: kind.name)
def test_with_checkpointing_each_block_keeps_its_input(kind: RealModel) -> None:
    found = []
    for count in (2, 1):
        model = frozen(kind)
        of_blocks = model.model if kind is LLAMA else model.transformer
        name = "layers" if kind is LLAMA else "h"
        setattr(of_blocks, name, getattr(of_blocks, name)[:count])
        model.config.num_hidden_layers = count
        planned = memory(model, tokens=TOKENS, checkpointing=True)
        model.train().gradient_checkpointing_enable({"use_reentrant": True})
        found.append((planned.block_inputs, kept_by(model, forward(model))))
    (both, kept), (one, less) = found
    assert both == 2 * one > 0
    assert kept - less == one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_counted_with_what_a_loss_makes_of_them(dtype: torch.dtype) -> None:
    model: Any = LLAMA.build().to(dtype)
    model.lm_head = nn.Linear(32, 2000, bias=False, dtype=dtype)
    hidden, labels = torch.randn(1, 300, 32, dtype=dtype), torch.randint(2000, (1, 300))

    def step() -> None:
        logits = model.lm_head(hidden)
        model.loss_function(logits, labels, 2000).backward()

    planned = memory(model, tokens=300).logits
    assert peak_of(step, "cpu") == pytest.approx(planned, rel=0.03)
    assert memory(model.model, tokens=300).logits == 0


@every_basis
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LLAMA, GPT2], ids=lambda kind: kind.name)
def test_everything_held_is_that_of_a_trained_model(kind: RealModel, dtype: torch.dtype, basis: str) -> None:
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
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    forward(model)().float().sum().backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert planned.parameters == sum(parameter.nbytes for parameter in trained)
    assert planned.gradients == sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None)
    assert planned.optimizer == sum(moment.nbytes for moment in moments)
    bank = adapted_root(model)[1].bank
    assert planned.bases == sum(one.working_nbytes for one in bank)
    assert planned.host == bank.nbytes
    assert planned.total == sum((
        planned.weights,
        planned.parameters,
        planned.gradients,
        planned.optimizer,
        planned.bases,
    ))


sides = st.integers(1, 6).map(lambda count: 32 * count)


@settings(max_examples=20)
@given(
    sides,
    sides,
    st.sampled_from([1, 3, 40, 700]),
    st.sampled_from(["dense", "block", "sparse"]),
    st.sampled_from([None, (0, 1), (1, 0), (1, 2)]),
)
def test_the_height_of_a_step_is_that_of_the_arithmetic(
    rows: int, columns: int, tokens: int, basis: Any, part: tuple[int, int] | None
) -> None:
    shape, r = (rows, columns), 8
    spec = BasisSpec(basis, "portable", 0, r, max(shape), min(shape), (2, 4) if basis == "block" else None)
    real, planned = (Basis(spec, (max(shape), min(shape))) for _ in range(2))
    piece = Piece(shape, r, tokens)
    if part is not None:  # of three devices, under tensor parallelism
        piece = piece.split(part[0], 3, part[1], spec.blocks or (1, 1))
    whole = Region(all_of(rows), all_of(columns))
    region, (height, width) = piece.region or whole, piece.extent
    sides = region.sides(is_wide=piece.is_wide)
    pair = real.pair(max(shape), min(shape), device=torch.device("cpu"), dtype=torch.float32, sides=sides)
    lam, gamma = (torch.randn(each).requires_grad_() for each in diagonal_shapes(shape, r))
    x, weight, grad = (
        torch.randn(tokens, width).requires_grad_(),
        torch.randn(height, width),
        torch.randn(tokens, height),
    )

    def adapted() -> None:
        diagonals = Diagonals(lam, take_spans(gamma, sides.small, 1), 1.5)
        if part is None:
            output = adapted_linear(x, pair, diagonals, weight=weight)
        else:
            output = F.linear(x, weight) + adapted_linear(x, pair, diagonals, is_wide=piece.is_wide)
        torch.autograd.grad(output, [x, lam, gamma], grad)

    def plain() -> None:
        torch.autograd.grad(F.linear(x, weight), [x], grad)

    measured = peak_of(adapted, "cpu") - peak_of(plain, "cpu")
    found = peak_beside(piece, planned, torch.float32, "cpu")
    # a part of 32 rows takes up to 11 % less in 6 of all 1,728 cases that can be drawn, and none takes more
    above = 0.02 if part is None else 0.12
    assert -0.02 * measured - 1024 <= found - measured <= above * measured + 1024


def test_a_stack_of_experts_keeps_a_row_for_each_expert_that_a_token_is_sent_to() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = transformers.MixtralForCausalLM(config).requires_grad_(requires_grad=False)
    before = kept_by(model, forward(model))
    options: dict[str, Any] = {"targets": ["gate_up_proj", "down_proj"]}
    planned = memory(model, tokens=TOKENS, **options)
    randlora.inject(model, 4, **options)
    assert kept_by(model, forward(model)) - before == planned.inputs == 2 * TOKENS * 2 * (32 + 48) * 4


def test_attention_keeps_the_sum_of_weight_and_update() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4, batch_first=True)})
    model.requires_grad_(requires_grad=False)
    x = torch.randn(1, TOKENS, 32, requires_grad=True)
    before = kept_by(model, lambda: model["attention"](x, x, x)[0])
    planned = memory(model, targets=["in_proj_weight"], tokens=TOKENS)
    randlora.inject(model, 4, targets=["in_proj_weight"])
    assert kept_by(model, lambda: model["attention"](x, x, x)[0]) - before == planned.inputs


@given(st.lists(st.integers(1, 20), min_size=1, max_size=3), st.integers(1, 9))
def test_shards_cover_a_parameter_and_are_padded_by_less_than_a_row_for_each_device(
    shape: list[int], devices: int
) -> None:
    part = Part("x", tuple(shape), 4)
    row = part.nbytes // shape[0]
    assert part.nbytes <= devices * part.shard_bytes(devices) < part.nbytes + devices * row
    assert part.shard_bytes(1) == part.nbytes == part.split_bytes(devices, None)


@pytest.mark.parametrize(
    ("shape", "style", "expected"),
    [
        ((6, 9), "colwise", (3, 9)),
        ((6,), "colwise", (3,)),
        ((6, 9), "rowwise", (6, 5)),
        ((6,), "rowwise", (6,)),  # the bias is added after the sum
        ((7, 6, 9), "packed_colwise", (7, 3, 9)),
        ((7, 4), "embedding_rowwise", (4, 4)),
        ((7, 4), "embedding_colwise", (7, 2)),
        ((7, 4), "replicate", (7, 4)),
    ],
)
def test_a_style_splits_one_side_of_a_weight(shape: Any, style: str, expected: Any) -> None:
    assert Part("x", shape, 4).split_bytes(2, style) == Part("x", expected, 4).nbytes


@pytest.mark.parametrize(
    ("fqn", "style"),
    [
        ("model.layers.11.self_attn.q_proj", "colwise"),
        ("model.layers.11.self_attn.q_proj.weight", "colwise"),
        ("model.layers.0.mlp.down_proj.weight", "rowwise"),
        ("model.layers.0.input_layernorm.weight", None),
        ("", None),
    ],
)
def test_a_plan_of_tensor_parallelism_names_layers_with_stars(fqn: str, style: str | None) -> None:
    model: Any = LLAMA.build()
    assert style_of(fqn, model.tp_plan) == style


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 0}, "devices must be at least 1, got 0"),
        ({"tokens": -1}, "tokens must be at least 0, got -1"),
        ({"strategy": "pp"}, "strategy must be one of ddp, fsdp2, tp, got 'pp'"),
        ({"dtype": torch.int8}, "dtype must be a floating one, got torch.int8"),
        ({"strategy": "tp"}, "strategy='tp' needs tp_plan, because the model has no plan of its own"),
        ({"token": 1}, "unknown option token="),
        ({"targets": "nothing"}, "nothing"),
    ],
)
def test_what_cannot_be_planned_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RandLoRAError, match=message) as raised:
        memory(nn.Sequential(nn.Linear(8, 8)), **options)
    assert isinstance(raised.value, ConfigError) or "targets" in options or "token" in options


def test_what_is_not_counted_is_said() -> None:
    text = str(memory(LLAMA.build(), tokens=TOKENS, devices=2, strategy="fsdp2"))
    assert text.startswith("memory for training on each of 2 devices, fsdp2, float32:\n")
    assert "not counted: what else the model itself keeps" in text
    assert "work of a step in the adapted layers" in text
    assert "without tokens" not in text
    assert "without tokens" in str(memory(LLAMA.build()))

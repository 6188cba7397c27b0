"""Preparing a quantized model: what each step changes, and that a prepared model trains."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import randlora
from randlora import prepare_quantized
from randlora.errors import AdapterError
from randlora.quantized.prepare import PreparationReport
from tests.kit import assert_unchanged, same_bits, snapshot, untouched
from tests.laws import TOKENS, Mixed
from tests.models import (
    BERT,
    GPT2,
    LLAMA,
    SIDES,
    RealModel,
    every_transformers_model,
    logits,
    outputs,
    reproducible,
    tokens,
)
from tests.prepared import NOTHING, gradient, hooks, only, output_of
from tests.quantized import four_bit_linear, half_precision_model


@every_transformers_model
def test_norms_and_dense_layers_become_float32_in_place_and_nothing_else_changes(
    kind: RealModel, tmp_path: Path
) -> None:
    model = half_precision_model(kind, tmp_path)
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    report = prepare_quantized(model, **only("full_precision"))
    dense = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    norms = [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
    tied = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding) and kind is GPT2]
    assert set(report.cast) == {*dense, *norms, *tied[:1]}
    for name, parameter in model.named_parameters():
        held, value = before[name]
        assert parameter is held
        assert not parameter.requires_grad
        expected = torch.float32 if name.rpartition(".")[0] in report.cast else value.dtype
        assert parameter.dtype == expected
        assert same_bits(parameter, value.to(expected))


@pytest.mark.parametrize("kind", [LLAMA, GPT2, BERT], ids=lambda kind: kind.name)
def test_a_prepared_model_computes_what_pefts_does_and_holds_no_more(kind: RealModel, tmp_path: Path) -> None:
    ours, theirs = half_precision_model(kind, tmp_path / "ours"), half_precision_model(kind, tmp_path / "theirs")
    prepare_quantized(ours)
    theirs = peft.prepare_model_for_kbit_training(theirs, use_gradient_checkpointing=False)
    prepare_quantized(theirs, **only("unpacked"))
    assert same_bits(outputs(ours, kind.inputs()), outputs(theirs, kind.inputs()))
    assert sum(p.nbytes for p in ours.parameters()) < sum(p.nbytes for p in theirs.parameters())


@pytest.mark.parametrize("bits", [4, 8])
@every_transformers_model
def test_a_prepared_model_trains_with_gradients_down_to_its_inputs(kind: RealModel, bits: int, tmp_path: Path) -> None:
    model = half_precision_model(kind, tmp_path, bits=bits)
    report = prepare_quantized(model)
    assert report.notes == ()
    assert report.checkpointing
    assert len(report.quantized) == sum("bit" in type(module).__name__ for module in model.modules())
    assert report.unpacked == (report.quantized if bits == 4 else ())
    inputs = output_of(model, report.input_gradients[0])
    output = logits(model.train()(**kind.inputs()))
    assert output.dtype == torch.float32
    output.square().mean().backward()
    assert gradient(inputs).abs().max() > 0


@every_transformers_model
def test_a_second_call_changes_nothing_more(kind: RealModel, tmp_path: Path) -> None:
    model = half_precision_model(kind, tmp_path)
    first = prepare_quantized(model)
    before, hung = snapshot(model), hooks(model)
    second = prepare_quantized(model)
    assert_unchanged(model, before)
    assert hooks(model) == hung
    assert second == dataclasses.replace(first, cast=())


def test_a_model_made_16_bits_again_is_prepared_again_with_the_hooks_it_has() -> None:
    model = Mixed(torch.bfloat16)
    first, hung = prepare_quantized(model), hooks(model)
    assert prepare_quantized(model.half()) == first
    assert hooks(model) == hung
    assert model.head.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_call_without_steps_and_a_model_of_more_bits_are_left_alone(dtype: torch.dtype) -> None:
    model = Mixed(dtype)
    before = snapshot(model)
    is_half = dtype.itemsize == 2
    report = prepare_quantized(model, **(NOTHING if is_half else only("full_precision")))
    assert_unchanged(model, before)
    assert set(hooks(model).values()) == {(0, 0)}
    assert report == PreparationReport()


def test_a_model_without_quantized_layers_is_prepared_all_the_same() -> None:
    model = Mixed(torch.bfloat16)
    report = prepare_quantized(model)
    assert str(report).splitlines() == [
        "quantized layers: none",
        "converted to float32: q, up, down, norm and 1 more",
        "outputs that now require grad: embed",
        "checkpointing: off",
        "layers with repacking disabled: none",
        "checkpointing stays off: Mixed has no method for it",
    ]
    assert model.embed.weight.dtype == torch.bfloat16
    inputs = output_of(model, "embed")
    model(TOKENS).sum().backward()
    assert gradient(inputs).dtype == torch.float32


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@every_transformers_model
def test_a_copy_of_a_prepared_model_is_prepared(kind: RealModel, copied: Callable[[nn.Module], nn.Module]) -> None:
    model = kind.build().bfloat16()
    prepare_quantized(model, checkpointing=False)  # transformers then adds hooks of its own, which pickle cannot take
    twin = copied(model)
    assert same_bits(outputs(twin, kind.inputs()), outputs(model, kind.inputs()))
    prepare_quantized(twin, checkpointing=False)
    assert hooks(twin) == hooks(model)
    assert all(parameter.requires_grad for parameter in twin.parameters())


def test_what_is_tied_stays_tied_and_a_layer_used_twice_is_hooked_once() -> None:
    model = Mixed(torch.bfloat16)
    model.head = nn.Linear(12, 11, bias=False, dtype=torch.bfloat16)
    model.head.weight = model.embed.weight
    model.again = model.q
    report = prepare_quantized(model, **only("full_precision"))
    assert model.head.weight is model.embed.weight
    assert report.cast == ("embed", "q", "up", "down", "norm", "head")
    assert hooks(model)["q"] == (0, 1)


class Stored(Tensor):
    """Values in a form of a library's own."""


def test_weights_without_values_yet_or_of_another_librarys_form_are_left_alone() -> None:
    stored = nn.Linear(4, 4, dtype=torch.bfloat16)
    stored.weight = nn.Parameter(stored.weight.detach().as_subclass(Stored), requires_grad=False)
    model = nn.Sequential(nn.LayerNorm(4, dtype=torch.bfloat16), stored, nn.LazyLinear(4, bias=False))
    report = prepare_quantized(model, **only("full_precision"))
    assert report.cast == ("0",)
    assert isinstance(model[2].weight, nn.UninitializedParameter)
    assert stored(model[0](torch.randn(2, 4))).dtype == torch.bfloat16


@pytest.mark.parametrize("adapted_first", [False, True])
def test_dense_layers_that_are_adapted_are_prepared_too(adapted_first: bool) -> None:
    model = Mixed(torch.bfloat16)
    if not adapted_first:
        prepare_quantized(model)
    randlora.inject(model, r=4, targets=["q", "down"])
    prepare_quantized(model)
    assert model.get_parameter("q.weight").dtype == torch.float32
    output = model(TOKENS)
    assert output.dtype == torch.float32
    output.square().mean().backward()
    assert all(parameter.grad is not None for parameter in randlora.trainable_parameters(model))


def test_a_merged_model_is_not_prepared() -> None:
    model = nn.Sequential(four_bit_linear(), nn.LayerNorm(32, dtype=torch.bfloat16))
    randlora.inject(model, r=4)
    with (
        randlora.merged(model, quantized="dequantize"),
        untouched(model),
        pytest.raises(AdapterError, match=r"cannot prepare the model while the adapters are merged"),
    ):
        prepare_quantized(model)


class Convolutional(nn.Module):
    """A convolution after a norm, with a weight of its own and with one computed from others."""

    def __init__(self, *, is_parametrized: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        convolution = nn.Conv1d(4, 4, 3)
        self.conv = nn.utils.parametrizations.weight_norm(convolution) if is_parametrized else convolution

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.conv(self.norm(x))
        return output


def encoder_layer() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(8), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))


def parametrized_linear() -> nn.Module:
    linear: nn.Module = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    return nn.Sequential(nn.LayerNorm(8), linear)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: Convolutional(is_parametrized=False), (2, 4, 8)),
        (lambda: Convolutional(is_parametrized=True), (2, 4, 8)),
        (encoder_layer, (2, 4, 8)),
        (parametrized_linear, (4, 8)),
    ],
    ids=["convolution", "parametrized convolution", "attention", "parametrized linear"],
)
def test_matrices_that_keep_their_16_bits_meet_the_float32_that_norms_give(
    build: Callable[[], nn.Module], shape: tuple[int, ...], training: bool
) -> None:
    model = build().bfloat16().train(training)
    x = torch.randn(shape, dtype=torch.bfloat16)
    expected = copy.deepcopy(model)(x)
    report = prepare_quantized(model, **only("full_precision"))
    kept = {parameter.dtype for parameter in model.parameters() if parameter.ndim > 1}
    assert torch.bfloat16 in kept
    assert report.cast
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(model(x).float(), expected.float(), rtol=0.05, atol=0.05)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(vocab_size=64, num_local_experts=4, num_key_value_heads=2, **SIDES)
    return reproducible(lambda: transformers.MixtralForCausalLM(config))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return reproducible(lambda: transformers.T5ForConditionalGeneration(config))


def text_pairs() -> dict[str, Tensor]:
    return {**tokens(), "decoder_input_ids": tokens()["input_ids"]}


@pytest.mark.parametrize(
    "kind",
    [RealModel("mixtral", mixtral, tokens, ()), RealModel("t5", t5, text_pairs, ())],
    ids=lambda kind: kind.name,
)
def test_experts_and_position_biases_in_16_bits_work_on(kind: RealModel, tmp_path: Path) -> None:
    model = half_precision_model(kind, tmp_path).train()
    expected = outputs(model, kind.inputs())
    report = prepare_quantized(model, **only("full_precision"))
    assert report.cast
    torch.testing.assert_close(outputs(model, kind.inputs()), expected.float(), rtol=0.1, atol=0.1)

"""Preparing a quantized model: what each step changes, and gradients where there would be none without it."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

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
    VIT,
    RealModel,
    every_transformers_model,
    logits,
    outputs,
)
from tests.quantized import checkpoint_activations, four_bit_linear, half_precision_model, needs_repacking

NOTHING = {"full_precision": False, "inputs_require_grad": False, "checkpointing": False, "unpacked": False}


def only(step: str) -> dict[str, bool]:
    return NOTHING | {step: True}


def hooks(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
    }


def output_of(model: nn.Module, fqn: str) -> list[Tensor]:
    """Collect what a module returns from now on, with its gradients."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        found.append(output)

    model.get_submodule(fqn).register_forward_hook(keep)
    return found


def gradient(found: list[Tensor]) -> Tensor:
    (output,) = found
    assert output.grad is not None
    return output.grad


@every_transformers_model
def test_norms_and_dense_layers_become_float32_in_place_and_nothing_else_changes(kind: RealModel) -> None:
    model = half_precision_model(kind)
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
def test_a_prepared_model_computes_what_pefts_does_and_holds_no_more(kind: RealModel) -> None:
    ours, theirs = half_precision_model(kind), half_precision_model(kind)
    prepare_quantized(ours)
    theirs = peft.prepare_model_for_kbit_training(theirs, use_gradient_checkpointing=False)
    prepare_quantized(theirs, **only("unpacked"))
    assert same_bits(outputs(ours, kind.inputs()), outputs(theirs, kind.inputs()))
    assert sum(p.nbytes for p in ours.parameters()) < sum(p.nbytes for p in theirs.parameters())


@pytest.mark.parametrize("bits", [4, 8])
@every_transformers_model
def test_a_prepared_model_trains_with_gradients_down_to_its_inputs(kind: RealModel, bits: int) -> None:
    model = half_precision_model(kind, bits=bits)
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
def test_a_second_call_changes_nothing_more(kind: RealModel) -> None:
    model = half_precision_model(kind)
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


def test_a_model_of_text_and_images_has_two_inputs() -> None:
    sides = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text, vision = {"vocab_size": 64, **sides}, {"image_size": 16, "patch_size": 8, **sides}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    report = prepare_quantized(model, **only("inputs_require_grad"))
    assert [name.rpartition(".")[2] for name in report.input_gradients] == ["token_embedding", "patch_embedding"]


def convolutions() -> nn.Module:
    sides = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2}
    return transformers.ConvNextModel(transformers.ConvNextConfig(**sides))  # type: ignore[no-any-return]


@pytest.mark.parametrize("build", [lambda: nn.Sequential(nn.Linear(4, 4)), convolutions])
def test_a_model_without_embeddings_is_reported(build: Callable[[], nn.Module]) -> None:
    model = build()
    report = prepare_quantized(model, **only("inputs_require_grad"))
    assert report.input_gradients == ()
    assert report.notes == ("no embedding was found: for reentrant checkpointing, make the inputs require grad",)
    assert set(hooks(model).values()) == {(0, 0)}


def trainable_gradients(model: nn.Module, kind: RealModel) -> dict[str, Tensor | None]:
    """Train the norms of a model for one step."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name.lower() or "ln_" in name)
    logits(model(**kind.inputs())).float().square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("reentrant", [False, True])
@every_transformers_model
def test_checkpointing_changes_no_gradient(kind: RealModel, reentrant: bool) -> None:
    plain, model = (
        half_precision_model(kind).train(),
        half_precision_model(kind).train(),
    )
    for each in (plain, model):
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    if reentrant:
        checkpoint_activations(model, is_reentrant=True)
    assert prepare_quantized(model).checkpointing
    assert not prepare_quantized(plain, checkpointing=False).checkpointing
    used = {module._gradient_checkpointing_func.keywords["use_reentrant"] for module in checkpointed(model)}
    assert used == {reentrant}
    expected = trainable_gradients(plain, kind)
    torch.testing.assert_close(trainable_gradients(model, kind), expected, rtol=1e-5, atol=1e-7)
    assert all(value is not None for value in expected.values())


def checkpointed(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]


def test_reentrant_checkpointing_needs_inputs_that_require_grad() -> None:
    model = half_precision_model(VIT).train()  # of images, for which transformers does not see to that itself
    checkpoint_activations(model, is_reentrant=True)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        lost = trainable_gradients(model, VIT)
    assert [name for name, value in lost.items() if value is not None] == ["vit.layernorm.weight", "vit.layernorm.bias"]
    prepare_quantized(model, **only("inputs_require_grad"))
    assert all(value is not None for value in trainable_gradients(model, VIT).values())


class ChecksPoints(nn.Module):
    """A model that offers checkpointing under the older name, and no more of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Mixed()
        self.gradient_checkpointing = False
        self.options: list[dict[str, Any]] = []

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
        self.gradient_checkpointing = True
        self.options.append(gradient_checkpointing_kwargs)


def test_the_older_name_of_checkpointing_is_known_and_called_once() -> None:
    model = ChecksPoints()
    assert prepare_quantized(model).checkpointing
    assert prepare_quantized(model).checkpointing
    assert model.options == [{"use_reentrant": False}]


def test_a_transformers_model_that_cannot_checkpoint_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LLAMA.build()
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    report = prepare_quantized(model)
    assert not report.checkpointing
    assert report.notes == ("checkpointing stays off: LlamaForCausalLM has no method for it",)


def input_gradient_after_evaluation(layer: nn.Module) -> Tensor | None:
    """Evaluate a layer, then train what lies before it; ``None`` where nothing comes back."""
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.eval()(x)
    leaf = x.clone().requires_grad_()
    output = layer.train()(leaf)
    if output.requires_grad:
        output.sum().backward()
    return leaf.grad


@pytest.mark.parametrize("out_features", [32, 48, 7])
@pytest.mark.parametrize("compress_statistics", [True, False])
def test_an_evaluation_costs_a_prepared_layer_neither_gradients_nor_bits(
    out_features: int, compress_statistics: bool
) -> None:
    layer = four_bit_linear(64, out_features, compress_statistics=compress_statistics)
    model = nn.Sequential(layer)
    before = copy.deepcopy(layer.state_dict())
    report = prepare_quantized(model, **only("unpacked"))
    assert (report.quantized, report.unpacked, report.put_in_order) == (("0",), ("0",), ())
    found = input_gradient_after_evaluation(model)
    assert found is not None
    assert found.abs().max() > 0
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@needs_repacking
@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel was not registered:UserWarning")
@pytest.mark.parametrize("compress_statistics", [True, False])
def test_without_the_step_an_evaluation_cuts_gradients_off_and_a_later_call_mends_that(
    compress_statistics: bool,
) -> None:
    model = nn.Sequential(four_bit_linear(bias=False, compress_statistics=compress_statistics))
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    expected = model(x)  # with a bias, a forward pass in training would raise from here on
    if input_gradient_after_evaluation(model) is not None:
        pytest.skip("this bitsandbytes passes gradients through repacked layers")
    report = prepare_quantized(model)
    assert (report.quantized, report.unpacked, report.put_in_order) == (("0",), ("0",), ("0",))
    assert "restored after repacking: 0 (scales rounded to bfloat16)" in str(report)
    assert input_gradient_after_evaluation(model) is not None
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0.02 * expected.abs().max().item())
    assert prepare_quantized(model).put_in_order == ()


@needs_repacking
def test_scales_that_a_state_dict_left_turned_are_turned_back_and_named() -> None:
    layer = four_bit_linear(256, bias=False, compress_statistics=False)
    model, x = nn.Sequential(layer), torch.randn(3, 256, dtype=torch.bfloat16)
    expected = model(x)
    model.eval()(x)
    model.state_dict()
    if layer.weight.quant_state.absmax.ndim == 1:
        pytest.skip("this bitsandbytes turns them back")
    assert prepare_quantized(model).put_in_order == ("0",)
    for is_training in (True, False):
        found = model.train(is_training)(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())


@needs_repacking
def test_a_repacked_layer_whose_weight_lost_its_state_is_named_too() -> None:
    layer = four_bit_linear(bias=False)
    model = nn.Sequential(layer)
    model.eval()(torch.randn(3, 64, dtype=torch.bfloat16))
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert prepare_quantized(model).put_in_order == ("0",)


def test_a_model_that_cannot_name_its_embeddings_is_left_as_it_is() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8, dtype=torch.bfloat16)

        def get_input_embeddings(self) -> nn.Module:
            return self.embed  # type: ignore[return-value]

    model = Broken()
    with pytest.raises(AttributeError):
        prepare_quantized(model)
    assert model.norm.weight.dtype == torch.bfloat16
    assert not model.norm._forward_pre_hooks


def test_what_is_given_in_a_tuple_is_cast_too() -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(8), "rnn": nn.LSTM(8, 8)}).bfloat16()
    prepare_quantized(model)
    state = torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)
    output, _ = model["rnn"](model["norm"](torch.randn(3, 2, 8)), state)
    assert output.dtype == torch.bfloat16

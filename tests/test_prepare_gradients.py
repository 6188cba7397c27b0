"""Gradients where a quantized model would have none: at its inputs, in checkpoints, past repacked layers."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from randlora import prepare_quantized
from tests.laws import Mixed
from tests.models import LLAMA, VIT, RealModel, every_transformers_model, logits
from tests.prepared import NOTHING, checkpoint_activations, gradient, hooks, only, output_of
from tests.quantized import four_bit_linear, half_precision_model, needs_repacking


@every_transformers_model
def test_embeddings_let_their_outputs_require_grad(kind: RealModel, tmp_path: Path) -> None:
    model = half_precision_model(kind, tmp_path).train()
    assert not logits(model(**kind.inputs())).requires_grad
    report = prepare_quantized(model, **only("inputs_require_grad"))
    assert report == dataclasses.replace(prepare_quantized(model, **NOTHING), input_gradients=report.input_gradients)
    inputs = output_of(model, report.input_gradients[0])
    logits(model(**kind.inputs())).float().square().mean().backward()
    assert gradient(inputs).abs().max() > 0


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
def test_checkpointing_changes_no_gradient(kind: RealModel, reentrant: bool, tmp_path: Path) -> None:
    plain, model = (
        half_precision_model(kind, tmp_path / "plain").train(),
        half_precision_model(kind, tmp_path / "other").train(),
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


def test_reentrant_checkpointing_needs_inputs_that_require_grad(tmp_path: Path) -> None:
    model = half_precision_model(
        VIT, tmp_path
    ).train()  # a model of images, for which transformers does not see to that itself
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

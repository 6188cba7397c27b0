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
from tests.models import GPT2, LLAMA, VIT, RealModel, logits, outputs
from tests.quantized import checkpoint_activations, four_bit_linear, half_precision_model, needs_repacking

NOTHING = {"full_precision": False, "inputs_require_grad": False, "checkpointing": False, "unpacked": False}


def only(step: str) -> dict[str, bool]:
    return NOTHING | {step: True}


def hooks(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
    }


def input_gradient(model: nn.Module, fqn: str, run: Callable[[], Tensor]) -> Tensor:
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        found.append(output)

    with model.get_submodule(fqn).register_forward_hook(keep):
        run().float().square().mean().backward()
    (output,) = found
    assert output.grad is not None
    return output.grad


@pytest.mark.parametrize("kind", [LLAMA, GPT2], ids=lambda kind: kind.name)
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
        expected = torch.float32 if name.rpartition(".")[0] in report.cast else value.dtype
        assert (parameter is held, parameter.requires_grad, parameter.dtype) == (True, False, expected)
        assert same_bits(parameter, value.to(expected))
    theirs = peft.prepare_model_for_kbit_training(half_precision_model(kind), use_gradient_checkpointing=False)
    for each in (model, theirs):
        prepare_quantized(each, **only("unpacked"))
    assert same_bits(outputs(model, kind.inputs()), outputs(theirs, kind.inputs()))
    assert sum(p.nbytes for p in model.parameters()) < sum(p.nbytes for p in theirs.parameters())


@pytest.mark.parametrize(("kind", "bits"), [(LLAMA, 4), (GPT2, 8), (VIT, 4)])
def test_a_prepared_model_trains_with_gradients_down_to_its_inputs_and_a_second_call_changes_nothing(
    kind: RealModel, bits: int
) -> None:
    model = half_precision_model(kind, bits=bits)
    report = prepare_quantized(model)
    assert (report.notes, report.checkpointing) == ((), True)
    assert len(report.quantized) == sum("bit" in type(module).__name__ for module in model.modules())
    assert report.unpacked == (report.quantized if bits == 4 else ())
    output = logits(model.train()(**kind.inputs()))
    assert output.dtype == torch.float32
    found = input_gradient(model, report.input_gradients[0], lambda: logits(model(**kind.inputs())))
    assert found.abs().max() > 0
    before, hung = snapshot(model), hooks(model)
    again = prepare_quantized(model)
    assert_unchanged(model, before)
    assert hooks(model) == hung
    assert again == dataclasses.replace(report, cast=())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_a_call_without_steps_and_a_model_of_more_bits_are_left_alone(dtype: torch.dtype) -> None:
    model = Mixed(dtype)
    with untouched(model):
        report = prepare_quantized(model, **(NOTHING if dtype == torch.float16 else only("full_precision")))
    assert set(hooks(model).values()) == {(0, 0)}
    assert report == PreparationReport()


def test_a_model_without_quantized_layers_is_prepared_all_the_same_and_again_and_its_copies() -> None:
    model = Mixed(torch.bfloat16)
    report, hung = prepare_quantized(model), hooks(model)
    assert report.notes == ("checkpointing stays off: Mixed has no method for it",)
    assert "converted to float32: q, up, down, norm and 1 more\noutputs that now require grad: embed" in str(report)
    assert prepare_quantized(model.half()) == report
    assert hooks(model) == hung
    assert (model.embed.weight.dtype, model.head.weight.dtype) == (torch.float16, torch.float32)
    assert input_gradient(model, "embed", lambda: model(TOKENS)).dtype == torch.float32
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(twin(TOKENS), model(TOKENS))
        prepare_quantized(twin)
        assert hooks(twin) == hung
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
def test_dense_layers_that_are_adapted_are_prepared_too_but_no_merged_model(adapted_first: bool) -> None:
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
    said = "cannot prepare the model while the adapters are merged"
    with randlora.merged(model), untouched(model), pytest.raises(AdapterError, match=said):
        prepare_quantized(model)


def convolution(*, is_parametrized: bool) -> nn.Module:
    """Return a convolution after a norm, with a weight or with one computed from others."""
    conv = nn.Conv1d(4, 4, 3)
    return nn.Sequential(nn.BatchNorm1d(4), nn.utils.parametrizations.weight_norm(conv) if is_parametrized else conv)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: convolution(is_parametrized=False), (2, 4, 8)),
        (lambda: convolution(is_parametrized=True), (2, 4, 8)),
        (
            lambda: nn.Sequential(nn.LayerNorm(8), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)),
            (2, 4, 8),
        ),
        (lambda: nn.Sequential(nn.LayerNorm(8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))), (4, 8)),
    ],
    ids=["convolution", "parametrized convolution", "attention", "parametrized linear"],
)
def test_matrices_that_keep_their_16_bits_meet_the_float32_that_norms_give(
    build: Callable[[], nn.Module], shape: tuple[int, ...], training: bool
) -> None:
    model = build().bfloat16().train(training)
    x = torch.randn(shape, dtype=torch.bfloat16)
    expected = copy.deepcopy(model)(x)
    assert prepare_quantized(model, **only("full_precision")).cast
    assert torch.bfloat16 in {parameter.dtype for parameter in model.parameters() if parameter.ndim > 1}
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
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name.lower() or "ln_" in name)
    logits(model(**kind.inputs())).float().square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("kind", "reentrant"), [(LLAMA, False), (VIT, True)])
def test_checkpointing_changes_no_gradient_and_a_reentrant_one_gets_the_inputs_it_needs(
    kind: RealModel, reentrant: bool
) -> None:
    plain, model = half_precision_model(kind).train(), half_precision_model(kind).train()
    if reentrant:
        checkpoint_activations(model, is_reentrant=True)
        with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
            lost = trainable_gradients(model, kind)
        assert None in lost.values()
        model.zero_grad()
    assert prepare_quantized(model).checkpointing
    assert not prepare_quantized(plain, checkpointing=False).checkpointing
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert {each._gradient_checkpointing_func.keywords["use_reentrant"] for each in checkpointed} == {reentrant}
    expected = trainable_gradients(plain, kind)
    torch.testing.assert_close(trainable_gradients(model, kind), expected, rtol=1e-5, atol=1e-7)
    assert None not in expected.values()


def test_a_model_that_cannot_checkpoint_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LLAMA.build()
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    report = prepare_quantized(model)
    assert not report.checkpointing
    assert report.notes == ("checkpointing stays off: LlamaForCausalLM has no method for it",)


def gradient_after_evaluation(layer: nn.Module) -> Tensor | None:
    """Evaluate a layer, then train what lies before it; ``None`` where nothing comes back."""
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.eval()(x)
    leaf = x.clone().requires_grad_()
    output = layer.train()(leaf)
    if output.requires_grad:
        output.sum().backward()
    return leaf.grad


@pytest.mark.parametrize(("out_features", "compress_statistics"), [(32, True), (7, False)])
def test_an_evaluation_costs_a_prepared_layer_neither_gradients_nor_bits(
    out_features: int, compress_statistics: bool
) -> None:
    layer = four_bit_linear(64, out_features, compress_statistics=compress_statistics)
    model = nn.Sequential(layer)
    before = copy.deepcopy(layer.state_dict())
    report = prepare_quantized(model, **only("unpacked"))
    assert (report.quantized, report.unpacked, report.put_in_order) == (("0",), ("0",), ())
    found = gradient_after_evaluation(model)
    assert found is not None
    assert found.abs().max() > 0
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def _nothing(layer: Any) -> None:
    if gradient_after_evaluation(layer) is not None:
        pytest.skip("this bitsandbytes passes gradients through repacked layers")


def _turned(layer: Any) -> None:
    layer.state_dict()
    if layer.weight.quant_state.absmax.ndim == 1:
        pytest.skip("this bitsandbytes turns them back")


def _without_state(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)


@needs_repacking
@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel was not registered:UserWarning")
@pytest.mark.parametrize(
    ("change", "compress_statistics"), [(_nothing, True), (_nothing, False), (_turned, False), (_without_state, True)]
)
def test_without_the_step_an_evaluation_repacks_and_a_later_call_puts_in_order(
    change: Callable[[Any], None], compress_statistics: bool
) -> None:
    layer = four_bit_linear(bias=False, compress_statistics=compress_statistics)
    model, x = nn.Sequential(layer), torch.randn(3, 64, dtype=torch.bfloat16)
    expected = model(x)  # with a bias, a forward pass in training would raise from here on
    model.eval()(x)
    change(layer)
    report = prepare_quantized(model)
    assert (report.quantized, report.unpacked, report.put_in_order) == (("0",), ("0",), ("0",))
    assert "restored after repacking: 0 (scales rounded to bfloat16)" in str(report)
    if change is not _without_state:
        assert gradient_after_evaluation(model) is not None
        for is_training in (True, False):
            found = model.train(is_training)(x)
            torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())
    assert prepare_quantized(model).put_in_order == ()

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
from torch.nn.utils.parametrizations import weight_norm

import randlora
from randlora import prepare_quantized
from randlora.errors import AdapterError
from randlora.quantized.prepare import PreparationReport
from tests.kit import assert_unchanged, same_bits, snapshot, untouched
from tests.laws import TOKENS, Mixed
from tests.models import GPT2, LLAMA, VIT, RealModel, logits, outputs
from tests.quantized import REPACKS, checkpoint_activations, four_bit_linear, half_precision_model

NOTHING = {"full_precision": False, "inputs_require_grad": False, "checkpointing": False, "unpacked": False}


def only(step: str) -> dict[str, bool]:
    return NOTHING | {step: True}


def hooks(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (len(each._forward_hooks), len(each._forward_pre_hooks)) for name, each in model.named_modules()}


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


def test_a_model_without_quantized_layers_is_prepared_all_the_same_and_again_and_its_copies() -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        model = Mixed(dtype)
        with untouched(model):  # by a call without steps, and where there are more bits
            report = prepare_quantized(model, **(NOTHING if dtype == torch.float16 else only("full_precision")))
        assert (report, set(hooks(model).values())) == (PreparationReport(), {(0, 0)})
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


class Stored(Tensor):
    """Values in a form of a library's own."""


def test_what_is_tied_stays_tied_and_what_has_no_values_or_another_form_stays_as_it_is() -> None:
    model = Mixed(torch.bfloat16)
    model.head = nn.Linear(12, 11, bias=False, dtype=torch.bfloat16)
    model.head.weight = model.embed.weight
    model.again = model.q
    model.stored = nn.Linear(4, 4, dtype=torch.bfloat16)
    model.stored.weight = nn.Parameter(model.stored.weight.detach().as_subclass(Stored), requires_grad=False)
    model.lazy = nn.LazyLinear(4, bias=False)
    report = prepare_quantized(model, **only("full_precision"))
    assert model.head.weight is model.embed.weight
    assert report.cast == ("embed", "q", "up", "down", "norm", "head")
    assert hooks(model)["q"] == (0, 1), "a layer that is used twice is hooked once"
    assert isinstance(model.lazy.weight, nn.UninitializedParameter)
    assert model.stored(torch.randn(2, 4)).dtype == torch.bfloat16


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


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3)), (2, 4, 8)),
        (lambda: nn.Sequential(nn.BatchNorm1d(4), weight_norm(nn.Conv1d(4, 4, 3))), (2, 4, 8)),
        (lambda: nn.Sequential(nn.LayerNorm(8), attention()), (2, 4, 8)),
        (lambda: nn.Sequential(nn.LayerNorm(8), weight_norm(nn.Linear(8, 8))), (4, 8)),
    ],
    ids=["convolution", "parametrized convolution", "attention", "parametrized linear"],
)
def test_matrices_that_keep_their_16_bits_meet_the_float32_that_norms_give(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model, x = build().bfloat16(), torch.randn(shape, dtype=torch.bfloat16)
    prepared = copy.deepcopy(model)
    assert prepare_quantized(prepared, **only("full_precision")).cast
    assert torch.bfloat16 in {parameter.dtype for parameter in prepared.parameters() if parameter.ndim > 1}
    for training in (True, False):
        with torch.set_grad_enabled(training):
            expected, found = (each.train(training)(x).float() for each in (model, prepared))
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def text_and_images() -> nn.Module:
    sides = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text, vision = {"vocab_size": 64, **sides}, {"image_size": 16, "patch_size": 8, **sides}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))  # type: ignore[no-any-return]


def convolutions() -> nn.Module:
    sides = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2}
    return transformers.ConvNextModel(transformers.ConvNextConfig(**sides))  # type: ignore[no-any-return]


def without_checkpointing() -> nn.Module:
    model = LLAMA.build()
    model.supports_gradient_checkpointing = False  # type: ignore[assignment]
    return model


NO_EMBEDDING = "no embedding was found: for reentrant checkpointing, make the inputs require grad"


@pytest.mark.parametrize(
    ("build", "step", "inputs", "note"),
    [
        (text_and_images, "inputs_require_grad", ["token_embedding", "patch_embedding"], None),
        (lambda: nn.Sequential(nn.Linear(4, 4)), "inputs_require_grad", [], NO_EMBEDDING),
        (convolutions, "inputs_require_grad", [], NO_EMBEDDING),
        (without_checkpointing, "checkpointing", [], "checkpointing stays off: LlamaForCausalLM has no method for it"),
    ],
)
def test_each_input_and_what_cannot_be_done_is_reported(
    build: Callable[[], nn.Module], step: str, inputs: list[str], note: str | None
) -> None:
    model = build()
    report = prepare_quantized(model, **only(step))
    assert [name.rpartition(".")[2] for name in report.input_gradients] == inputs
    assert (report.notes, report.checkpointing) == ((note,) if note else (), False)
    assert (set(hooks(model).values()) == {(0, 0)}) == (not inputs)


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


def _without_state(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel was not registered:UserWarning")
@pytest.mark.parametrize("compress_statistics", [True, False])
def test_an_evaluation_costs_a_prepared_layer_neither_gradients_nor_bits_and_another_is_put_in_order(
    compress_statistics: bool,
) -> None:
    layer = four_bit_linear(64, 7, compress_statistics=compress_statistics)
    model, before = nn.Sequential(layer), copy.deepcopy(layer.state_dict())
    report = prepare_quantized(model, **only("unpacked"))
    assert (report.quantized, report.unpacked, report.put_in_order) == (("0",), ("0",), ())
    found = gradient_after_evaluation(model)
    assert found is not None
    assert found.abs().max() > 0
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    for change in (gradient_after_evaluation, _without_state) if REPACKS else ():
        layer = four_bit_linear(bias=False, compress_statistics=compress_statistics)
        model, x = nn.Sequential(layer), torch.randn(3, 64, dtype=torch.bfloat16)
        expected = model(x)  # with a bias, a forward pass in training would raise from here on
        model.eval()(x)
        assert change(layer) is None, "bitsandbytes leads no gradient through repacked layers"
        report = prepare_quantized(model)
        assert (report.quantized, report.unpacked, report.put_in_order) == (("0",), ("0",), ("0",))
        assert "restored after repacking: 0 (scales rounded to bfloat16)" in str(report)
        if change is not _without_state:
            assert gradient_after_evaluation(model) is not None
            for is_training in (True, False):
                found = model.train(is_training)(x)
                torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())
        assert prepare_quantized(model).put_in_order == ()

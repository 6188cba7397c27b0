"""Whole transformers models that bitsandbytes quantized: the life of an adapter, files, PEFT, and preparing."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PeftModel, RandLoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import randlora
from randlora import prepare_quantized
from randlora.errors import AdapterError
from randlora.quantized.prepare import PreparationReport
from tests import peer, quantized
from tests.kit import assert_unchanged, fill, same_bits, snapshot, untouched
from tests.laws import TOKENS, Mixed
from tests.models import RealModel, logits, outputs
from tests.quantized import Codes, half_precision_model, quantized_layers, quantized_model

pytestmark = peer.THEIR_WARNINGS

R = peer.R
LLAMA, GPT2, BERT, VIT = quantized.MODELS
CASES = [(LLAMA, quantized.NF4), (GPT2, quantized.FP4), (BERT, quantized.INT8)]
every_case = pytest.mark.parametrize(("kind", "codes"), CASES, ids=lambda value: value.name)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def loss(model: nn.Module, kind: RealModel) -> Tensor:
    torch.manual_seed(1)  # of dropout
    rows = logits(model(**kind.inputs())).flatten(0, -2)
    return nn.functional.cross_entropy(rows, torch.arange(len(rows)) % rows.shape[-1])


@pytest.mark.medium
@every_case
def test_an_adapter_is_planned_as_for_the_dense_model_trained_merged_and_ejected(kind: RealModel, codes: Codes) -> None:
    dense, model, x = kind.build(), quantized_model(kind, codes), kind.inputs()
    assert {type(layer).__name__ for layer in quantized_layers(model).values()} == {codes.kind}
    for targets in (None, "all-linear", kind.targets):
        found, expected = (randlora.plan(each, R, targets=targets) for each in (model, dense))
        assert (found.targets, found.rule, found.skipped) == (expected.targets, expected.rule, expected.skipped)
        assert (found.rows, found.specs) == (expected.rows, expected.specs)
    state, plain = snapshot(model), outputs(model, x)
    classes = {fqn: type(module) for fqn, module in model.named_modules()}
    before = loss(model.train(), kind)
    report = randlora.inject(model, R, targets="all-linear")
    trained = [*randlora.trainable_parameters(model)]
    optimizer, losses = torch.optim.AdamW(trained, lr=3e-3), []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(loss(model, kind))
        losses[-1].backward()
        optimizer.step()
    assert same_bits(losses[0], before)
    assert losses[-1] < 0.95 * losses[0]
    assert len(trained) == 2 * len(report.targets)
    wanted = outputs(model.eval(), x)
    with randlora.disabled(model):
        assert same_bits(outputs(model, x), plain)
    with randlora.merged(model) as merged:
        assert merged.rounding.keys() == {*report.targets}
        assert not merged.notes
        assert distance(outputs(model, x), wanted) < 0.5
    assert same_bits(outputs(model, x), wanted)
    randlora.eject(model)
    assert {fqn: type(module) for fqn, module in model.named_modules()} == classes
    assert_unchanged(model, state)
    assert same_bits(outputs(model, x), plain)


@pytest.mark.medium
def test_a_report_says_how_a_quantized_model_is_trained() -> None:
    def told(model: nn.Module, **options: Any) -> list[str]:
        notes = randlora.inject(model, r=8, **options).notes
        return [note.partition(":")[0] for note in notes if note.startswith("quantized")]

    model = half_precision_model(LLAMA)
    assert told(model) == ["quantized, with norms in 16 bits", "quantized"]
    assert told(model, name="b") == [], "it is frozen"
    model = half_precision_model(LLAMA)
    randlora.prepare_quantized(model)
    assert told(model) == ["quantized"]
    assert told(LLAMA.build().bfloat16()) == []


@pytest.mark.parametrize(("bits", "is_prepared"), [(8, True), (4, False)])
def test_a_model_that_never_ran_computes_after_it_is_dequantized(bits: int, is_prepared: bool) -> None:
    """Loaded in bfloat16; a plain layer does not cast what it is given."""
    model: Any = half_precision_model(LLAMA, bits=bits)
    if is_prepared:
        randlora.prepare_quantized(model)
    randlora.inject(model, r=8, targets="all-linear")
    fill(model)
    with randlora.merged(model, quantized="dequantize") as report:
        assert report.notes == ()  # for a while only
        assert [each for each in model.parameters() if each.requires_grad] == randlora.trainable_parameters(model)
    assert "config still says that it is quantized" in str(randlora.merge(model, quantized="dequantize"))
    assert outputs(model, LLAMA.inputs()).isfinite().all()
    assert quantized_layers(model) == {}


@pytest.mark.medium
@every_case
def test_files_fit_models_as_codes_dense_in_peft_and_dequantized(kind: RealModel, codes: Codes, tmp_path: Path) -> None:
    options: dict[str, Any] = {"alpha": peer.ALPHA, "targets": kind.targets, "stream": peer.peft_draw("dense")}
    x = kind.inputs()
    for trained, name in ((quantized_model(kind, codes), "codes"), (kind.build(), "dense")):
        randlora.inject(trained, R, **options)
        randlora.save(fill(trained), tmp_path / name, bases="stored" if kind is LLAMA else "seed")
        for other in (quantized_model(kind, codes), kind.build()):
            randlora.load(other, tmp_path / name)
            (adapter,), (found,) = randlora.adapters(trained), randlora.adapters(other)
            assert adapter.targets == found.targets
            for fqn in adapter.targets:
                assert same_bits(randlora.delta_weight(trained, fqn), randlora.delta_weight(other, fqn))
            if type(trained.get_submodule(adapter.targets[0])) is type(other.get_submodule(adapter.targets[0])):
                assert same_bits(outputs(other, x), outputs(trained, x))
    model = quantized_model(kind, codes)
    randlora.load(model, tmp_path / "codes")
    theirs = PeftModel.from_pretrained(quantized_model(kind, codes), tmp_path / "codes").eval()
    peer.assert_same_effect(model, theirs, kind)
    config = RandLoraConfig(r=R, randlora_alpha=peer.ALPHA, target_modules=list(kind.targets))
    theirs = get_peft_model(quantized_model(kind, codes), config).eval()
    fill(theirs).save_pretrained(tmp_path / "theirs")
    ours = quantized_model(kind, codes)
    randlora.load(ours, tmp_path / "theirs")
    peer.assert_same_effect(ours, theirs, kind)
    if kind is not GPT2:  # of which transformers leaves nn.Linear where its own code reads the files of Conv1D
        plain = quantized_model(kind, codes).dequantize()
        randlora.load(plain, tmp_path / "codes")
        randlora.merge(plain)
        plain.save_pretrained(tmp_path / "merged")
        again = type(plain).from_pretrained(tmp_path / "merged").eval()
        assert distance(outputs(again, x), outputs(model, x)) < codes.tolerance


# Preparing: what each step changes, and gradients where there would be none without it

NOTHING = {"full_precision": False, "inputs_require_grad": False, "checkpointing": False, "unpacked": False}


def only(step: str) -> dict[str, bool]:
    return NOTHING | {step: True}


def hooks(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (len(each._forward_hooks), len(each._forward_pre_hooks)) for name, each in model.named_modules()}


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


def trainable_gradients(model: nn.Module, kind: RealModel) -> dict[str, Tensor | None]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name.lower() or "ln_" in name)
    logits(model(**kind.inputs())).float().square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("kind", "bits", "reentrant"), [(LLAMA, 4, False), (GPT2, 8, False), (VIT, 4, True)])
def test_a_prepared_model_trains_down_to_inputs_and_is_prepared_once(
    kind: RealModel, bits: int, reentrant: bool
) -> None:
    plain, model = (half_precision_model(kind, bits=bits).train() for _ in range(2))
    if reentrant:  # which gets the inputs it needs
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # renamed
        enable({"use_reentrant": True})
        with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
            assert None in trainable_gradients(model, kind).values()
        model.zero_grad()
    report = prepare_quantized(model)
    assert (report.notes, report.checkpointing) == ((), True)
    assert len(report.quantized) == sum("bit" in type(module).__name__ for module in model.modules())
    assert report.unpacked == (report.quantized if bits == 4 else ())
    assert not prepare_quantized(plain, checkpointing=False).checkpointing
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert {each._gradient_checkpointing_func.keywords["use_reentrant"] for each in checkpointed} == {reentrant}
    expected = trainable_gradients(plain, kind)
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        found.append(output)

    with model.get_submodule(report.input_gradients[0]).register_forward_hook(keep):
        torch.testing.assert_close(trainable_gradients(model, kind), expected, rtol=1e-5, atol=1e-7)
    assert None not in expected.values()
    assert logits(model(**kind.inputs())).dtype == torch.float32
    assert found[0].grad is not None
    assert found[0].grad.abs().max() > 0
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
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(twin(TOKENS), model(TOKENS))
        prepare_quantized(twin)
        assert hooks(twin) == hung
        assert all(parameter.requires_grad for parameter in twin.parameters())
    randlora.inject(model, r=4, targets=["q", "down"])
    said = "cannot prepare the model while the adapters are merged"
    with randlora.merged(model), untouched(model), pytest.raises(AdapterError, match=said):
        prepare_quantized(model)
    adapted = Mixed(torch.bfloat16)
    randlora.inject(adapted, r=4, targets=["q", "down"])
    prepare_quantized(adapted)
    for each in (model, adapted):
        output = each(TOKENS)
        assert output.dtype == each.get_parameter("q.weight").dtype == torch.float32
        output.square().mean().backward()
        assert all(parameter.grad is not None for parameter in randlora.trainable_parameters(each))


HALVES: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv1d(4, 4, 3),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
    "parametrized linear": lambda: weight_norm(nn.Linear(8, 8)),
}


class Stored(Tensor):
    """Values in a form of a library's own."""


def test_what_is_tied_stays_tied_and_what_has_no_values_or_another_form_stays_as_it_is() -> None:
    model: Any = Mixed(torch.bfloat16)
    model.head = nn.Linear(12, 11, bias=False, dtype=torch.bfloat16)
    model.head.weight, model.again, model.lazy = model.embed.weight, model.q, nn.LazyLinear(4, bias=False)
    model.stored = nn.Linear(4, 4, dtype=torch.bfloat16)
    model.stored.weight = nn.Parameter(model.stored.weight.detach().as_subclass(Stored), requires_grad=False)
    report = prepare_quantized(model, **only("full_precision"))
    assert model.head.weight is model.embed.weight
    assert report.cast == ("embed", "q", "up", "down", "norm", "head")
    assert hooks(model)["q"] == (0, 1), "a layer that is used twice is hooked once"
    assert isinstance(model.lazy.weight, nn.UninitializedParameter)
    assert model.stored(torch.randn(2, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", HALVES)
def test_matrices_that_keep_their_16_bits_meet_the_float32_that_norms_give(name: str) -> None:
    model, x = nn.Sequential(nn.LayerNorm(8), HALVES[name]()).bfloat16(), torch.randn(2, 4, 8, dtype=torch.bfloat16)
    prepared = copy.deepcopy(model)
    assert prepare_quantized(prepared, **only("full_precision")).cast
    assert torch.bfloat16 in {parameter.dtype for parameter in prepared.parameters() if parameter.ndim > 1}
    for training in (True, False):
        with torch.set_grad_enabled(training):
            expected, found = (each.train(training)(x).float() for each in (model, prepared))
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_each_input_and_what_cannot_be_done_is_reported() -> None:
    sides = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text, vision = {"vocab_size": 64, **sides}, {"image_size": 16, "patch_size": 8, **sides}
    both = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    report = prepare_quantized(both, **only("inputs_require_grad"))
    assert [name.rpartition(".")[2] for name in report.input_gradients] == ["token_embedding", "patch_embedding"]
    assert (report.notes, report.checkpointing) == ((), False)
    convolutions = transformers.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2)
    unable: Any = LLAMA.build()
    unable.supports_gradient_checkpointing = False
    for model, step, note in (
        (transformers.ConvNextModel(convolutions), "inputs_require_grad", "no embedding was found: for reentrant chec"),
        (unable, "checkpointing", "checkpointing stays off: LlamaForCausalLM has no method for it"),
    ):
        with untouched(model):
            report = prepare_quantized(model, **only(step))
        assert report.notes[0].startswith(note)
        assert (report.input_gradients, report.checkpointing) == ((), False)

"""Whole transformers models whose layers bitsandbytes quantized: the laws of dense ones hold."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.errors import MergeError
from randlora.layers.update import Quantized
from randlora.targets.walk import Census
from tests.kit import fill, same_bits
from tests.models import RealModel, logits, outputs
from tests.prepared import checkpoint_activations
from tests.quantized import (
    FP4,
    MODELS,
    NF4,
    Codes,
    every_codes,
    every_model,
    half_precision_model,
    needs_repacking,
    quantized_layers,
    quantized_model,
)

LLAMA = MODELS[0]
R = 16


def adapted(kind: RealModel, codes: Codes, **options: Any) -> nn.Module:
    """Quantize a model and give it an adapter that has learned something."""
    model: nn.Module = quantized_model(kind, codes)
    randlora.inject(model, **{"r": R, "targets": "all-linear", **options})
    fill(model)
    return model


def distance(found: Tensor, expected: Tensor) -> float:
    """Measure the largest difference as a share of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def state_bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def assert_same_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = state_bits(model)
    assert found.keys() == expected.keys()
    assert [name for name in found if not same_bits(found[name], expected[name])] == []


def loss(model: nn.Module, kind: RealModel) -> Tensor:
    inputs = kind.inputs()
    torch.manual_seed(1)  # of dropout
    rows = logits(model(**inputs)).flatten(0, -2)
    return nn.functional.cross_entropy(rows, torch.arange(len(rows)) % rows.shape[-1])


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {fqn: parameter for fqn, parameter in model.named_parameters() if ".randlora_" in fqn}


@every_codes
@every_model
def test_the_presets_choose_the_layers_that_they_choose_of_the_dense_model(kind: RealModel, codes: Codes) -> None:
    dense, model = kind.build(), quantized_model(kind, codes)
    assert {type(layer).__name__ for layer in quantized_layers(model).values()} == {codes.kind}
    for targets in (None, "all-linear", kind.targets):
        found, expected = (randlora.plan(each, R, targets=targets) for each in (model, dense))
        assert (found.targets, found.rule, found.skipped) == (expected.targets, expected.rule, expected.skipped)
        assert (found.rows, found.specs) == (expected.rows, expected.specs)


def test_layers_are_known_by_their_type_and_not_by_what_the_model_says_of_itself() -> None:
    model = nn.Sequential(*quantized_layers(quantized_model(LLAMA, NF4)).values())
    assert not any(hasattr(module, "is_loaded_in_4bit") for module in model.modules())
    assert len(randlora.inject(model, R, targets="all-linear").targets) == len(model)


@pytest.mark.parametrize("is_training", [False, True], ids=["evaluation", "training"])
@every_codes
@every_model
def test_a_fresh_adapter_changes_no_bit_of_the_output(kind: RealModel, codes: Codes, is_training: bool) -> None:
    model = quantized_model(kind, codes).train(is_training)
    before = loss(model, kind)
    randlora.inject(model, R, targets="all-linear")
    assert same_bits(loss(model, kind), before)


@every_codes
@every_model
def test_training_lowers_the_loss_and_moves_the_adapter_alone(kind: RealModel, codes: Codes) -> None:
    model = quantized_model(kind, codes).train()
    before = state_bits(model)
    report = randlora.inject(model, R, targets="all-linear")
    fresh = {fqn: parameter.detach().clone() for fqn, parameter in adapter_parameters(model).items()}
    optimizer = torch.optim.AdamW(randlora.trainable_parameters(model), lr=3e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        value = loss(model, kind)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.95 * losses[0]
    unmoved = [fqn for fqn, parameter in adapter_parameters(model).items() if same_bits(parameter, fresh[fqn])]
    assert unmoved == []
    assert len(fresh) == 2 * len(report.targets)
    randlora.eject(model)
    assert_same_state(model, before)


@every_codes
@every_model
def test_gradients_pass_through_every_quantized_layer_to_the_first(kind: RealModel, codes: Codes) -> None:
    model = quantized_model(kind, codes).train()
    first = randlora.plan(model, R, targets="all-linear").targets[0]
    randlora.inject(model, R, targets=lambda fqn, _: fqn == first)
    fill(model)
    loss(model, kind).backward()
    for parameter in randlora.trainable_parameters(model):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("is_reentrant", [False, True], ids=["not reentrant", "reentrant"])
@every_codes
@every_model
def test_checkpointing_gives_the_same_gradients(kind: RealModel, codes: Codes, is_reentrant: bool) -> None:
    model: Any = adapted(kind, codes).train()
    loss(model, kind).backward()
    expected = [parameter.grad for parameter in randlora.trainable_parameters(model)]
    model.zero_grad()
    checkpoint_activations(model, is_reentrant=is_reentrant)
    model.enable_input_require_grads()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    loss(model, kind).backward()
    for parameter, gradient in zip(randlora.trainable_parameters(model), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=3e-6)


@every_codes
@every_model
def test_a_second_adapter_of_another_kind_stands_beside_the_first(kind: RealModel, codes: Codes) -> None:
    model = adapted(kind, codes)
    first = outputs(model, kind.inputs())
    types = {fqn: type(module) for fqn, module in model.named_modules()}
    plain_names = quantized_model(kind, codes).state_dict().keys()
    options: dict[str, Any] = {"basis": "block", "seed": 7, "name": "b"}
    randlora.inject(model, R // 2, targets="all-linear", **options)
    fill(model, "b", seed=1)
    assert {fqn: type(module) for fqn, module in model.named_modules()} == types
    assert {name for name in model.state_dict() if "randlora_" not in name} == plain_names
    assert same_bits(outputs(model, kind.inputs()), first)
    alone = quantized_model(kind, codes)
    randlora.inject(alone, R // 2, targets="all-linear", **options)
    fill(alone, "b", seed=1)
    randlora.activate(model, "b")
    assert same_bits(outputs(model, kind.inputs()), outputs(alone, kind.inputs()))
    randlora.remove(model, "b")
    randlora.activate(model, "default")
    assert same_bits(outputs(model, kind.inputs()), first)


@every_codes
@every_model
def test_switched_off_and_taken_off_the_model_is_as_it_was(kind: RealModel, codes: Codes) -> None:
    model = quantized_model(kind, codes)
    plain, state, modules = outputs(model, kind.inputs()), state_bits(model), dict(model.named_modules())
    classes = {fqn: type(module) for fqn, module in modules.items()}
    randlora.inject(model, R, targets="all-linear")
    fill(model)
    assert all(model.get_submodule(fqn) is module for fqn, module in modules.items())
    assert all(isinstance(model.get_submodule(fqn), kind_of) for fqn, kind_of in classes.items())
    assert not torch.equal(outputs(model, kind.inputs()), plain)
    with randlora.disabled(model):
        assert same_bits(outputs(model, kind.inputs()), plain)
    randlora.eject(model)
    assert {fqn: id(module) for fqn, module in model.named_modules()} == {fqn: id(m) for fqn, m in modules.items()}
    assert {fqn: type(module) for fqn, module in model.named_modules()} == classes
    assert_same_state(model, state)
    assert same_bits(outputs(model, kind.inputs()), plain)


def pickled(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def saved_whole(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copied: nn.Module = torch.load(file, weights_only=False)
    return copied


def moved(model: nn.Module) -> nn.Module:
    return nn.Module.to(model, "cpu")  # transformers' own refuses to move 8 bits


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_whole, moved], ids=lambda call: call.__name__)
@every_codes
@every_model
def test_a_copy_computes_the_same(kind: RealModel, codes: Codes, copied: Callable[[nn.Module], nn.Module]) -> None:
    model = adapted(kind, codes).train()
    expected = loss(model, kind)
    twin = copied(model)
    assert same_bits(loss(twin, kind), expected)
    loss(twin, kind).backward()
    assert all(parameter.grad is not None for parameter in randlora.trainable_parameters(twin))
    assert same_bits(outputs(twin.eval(), kind.inputs()), outputs(model.eval(), kind.inputs()))
    randlora.merge(twin, quantized="dequantize")
    assert distance(outputs(twin, kind.inputs()), outputs(model, kind.inputs())) < codes.tolerance


@every_codes
@every_model
def test_merging_into_plain_layers_loses_nothing(kind: RealModel, codes: Codes) -> None:
    model = adapted(kind, codes)
    with_adapter = outputs(model, kind.inputs())
    layers = {site.fqn: site.owner for site in Census.of(model).adapted}
    report = randlora.merge(model, quantized="dequantize")
    assert all(model.get_submodule(fqn) is layer for fqn, layer in layers.items())
    assert {type(layer) for layer in layers.values()} == {nn.Linear}
    assert report.rounding == {}
    assert distance(outputs(model, kind.inputs()), with_adapter) < codes.tolerance


@every_codes
@every_model
def test_merging_into_codes_leaves_layers_of_the_same_kind_within_a_step(kind: RealModel, codes: Codes) -> None:
    model = adapted(kind, codes)
    layers = {site.fqn: cast("nn.Linear", site.owner) for site in Census.of(model).adapted}
    twin = copy.deepcopy(model)
    randlora.merge(twin, quantized="dequantize")
    report = randlora.merge(model)
    assert report.rounding.keys() == layers.keys()
    for fqn, layer in layers.items():
        assert model.get_submodule(fqn) is layer
        assert report.rounding[fqn].largest <= report.rounding[fqn].step
        rows = torch.eye(layer.in_features)
        written = model.get_submodule(fqn)(rows) - twin.get_submodule(fqn)(rows)
        assert written.abs().max() <= 1.01 * report.rounding[fqn].step
    assert model.state_dict().keys() == quantized_model(kind, codes).state_dict().keys()


@pytest.mark.parametrize("quantized", ["requantize", "dequantize"])
@every_codes
@every_model
def test_merging_for_a_while_gives_every_bit_back(kind: RealModel, codes: Codes, quantized: Quantized) -> None:
    model = adapted(kind, codes)
    state, with_adapter = state_bits(model), outputs(model, kind.inputs())
    with randlora.merged(model, quantized=quantized):
        assert not torch.equal(outputs(model, kind.inputs()), with_adapter)
        assert_same_state(model, state)
    assert_same_state(model, state)
    assert same_bits(outputs(model, kind.inputs()), with_adapter)


@every_codes
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind is not LLAMA], ids=lambda kind: kind.name)
def test_a_bias_trained_beside_the_adapter_outlives_both_ways_of_merging(kind: RealModel, codes: Codes) -> None:
    fqn = next(iter(quantized_layers(quantized_model(kind, codes))))
    model = adapted(kind, codes, train_also=[f"{fqn}.bias"])
    with_adapter = outputs(model, kind.inputs())
    bias = model.get_parameter(f"{fqn}.bias").detach().clone()
    with randlora.merged(model, quantized="dequantize"):
        assert distance(outputs(model, kind.inputs()), with_adapter) < codes.tolerance
    assert same_bits(outputs(model, kind.inputs()), with_adapter)
    twin = copy.deepcopy(model)
    randlora.merge(model)
    randlora.merge(twin, quantized="dequantize")
    for each in (model, twin):
        assert same_bits(each.get_parameter(f"{fqn}.bias"), bias)
    assert distance(outputs(twin, kind.inputs()), with_adapter) < codes.tolerance


def codes_and_scales(model: nn.Module) -> list[Tensor]:
    """Copy what 4-bit layers hold; a state dict would turn back what was repacked."""
    weights = [layer.get_parameter("weight") for layer in quantized_layers(model).values()]
    return [tensor.clone() for weight in weights for tensor in (weight.data, weight.quant_state.absmax)]


@needs_repacking
@pytest.mark.parametrize("quantized", ["requantize", "dequantize"])
@pytest.mark.parametrize("codes", [NF4, FP4], ids=lambda codes: codes.name)
def test_what_bitsandbytes_repacked_is_put_in_order_merged_and_given_back(codes: Codes, quantized: Quantized) -> None:
    model = quantized_model(LLAMA, codes, repacks=True)
    plain = outputs(model, LLAMA.inputs())
    assert all(layer.weight.quant_state.packing_format_for_cpu for layer in quantized_layers(model).values())
    randlora.inject(model, R, targets="all-linear")
    assert not any(
        layer.weight.quant_state.packing_format_for_cpu
        for layer in quantized_layers(model).values()
        if hasattr(layer, "randlora")
    )
    assert distance(outputs(model, LLAMA.inputs()), plain) < 0.02  # it multiplied in bfloat16
    fill(model)
    held, with_adapter = codes_and_scales(model), outputs(model, LLAMA.inputs())
    assert distance(with_adapter, outputs(adapted(LLAMA, codes), LLAMA.inputs())) < 0.02
    with randlora.merged(model, quantized=quantized):
        merged = outputs(model, LLAMA.inputs())
    if quantized == "dequantize":
        assert distance(merged, with_adapter) < codes.tolerance
    assert all(map(same_bits, codes_and_scales(model), held))
    assert same_bits(outputs(model, LLAMA.inputs()), with_adapter)


@pytest.mark.parametrize("is_merged", [False, True], ids=["adapted", "merged"])
@every_codes
def test_what_transformers_dequantized_under_the_adapters_is_neither_merged_nor_saved(
    codes: Codes, is_merged: bool, tmp_path: Path
) -> None:
    """It puts other modules in the place of the adapted ones."""
    model: Any = adapted(LLAMA, codes)
    if is_merged:
        randlora.merge(model, reversible=True)
    model.dequantize()
    said = r"q_proj no longer has adapter 'default': the module was replaced by another"
    with pytest.raises(randlora.errors.RandLoRAError, match=said):
        randlora.save(model, tmp_path / "adapter")
    if not is_merged:
        with pytest.raises(MergeError, match=said):
            randlora.merge(model)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("options", [{"bits": 8}, {}, {"bnb_4bit_compute_dtype": torch.float32}], ids=str)
@pytest.mark.parametrize("is_prepared", [True, False])
def test_a_model_that_never_ran_computes_after_it_is_dequantized(
    options: dict[str, Any], is_prepared: bool, tmp_path: Path
) -> None:
    """Loaded in bfloat16; a plain layer does not cast what it is given."""
    kind = LLAMA
    model: Any = half_precision_model(kind, tmp_path, **options)
    if is_prepared:
        randlora.prepare_quantized(model)
    randlora.inject(model, r=8, targets="all-linear")
    fill(model)
    report = randlora.merge(model, quantized="dequantize")
    assert "config still says that it is quantized" in str(report)
    with torch.no_grad():
        assert model(**kind.inputs()).logits.isfinite().all()
    assert quantized_layers(model) == {}


def test_only_a_model_left_without_codes_is_told_of_its_config() -> None:
    model = quantized_model(LLAMA, NF4)
    randlora.inject(model, r=8)
    fill(model)
    with randlora.merged(model, quantized="dequantize") as report:
        assert report.notes == ()
    assert randlora.merge(model).notes == ()

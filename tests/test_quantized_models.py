"""Whole transformers models whose layers bitsandbytes quantized: the life of an adapter, and its files and PEFT's."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, RandLoraConfig, get_peft_model
from torch import Tensor, nn

import randlora
from tests import peer
from tests.kit import all_bits, fill, same_bits
from tests.models import RealModel, logits, outputs
from tests.peer import ALPHA, R, assert_same_effect, peft_draw
from tests.quantized import FP4, INT8, MODELS, NF4, Codes, half_precision_model, quantized_layers, quantized_model

pytestmark = peer.THEIR_WARNINGS

LLAMA, GPT2, BERT, _ = MODELS
CASES = [(LLAMA, NF4), (GPT2, FP4), (BERT, INT8)]
every_case = pytest.mark.parametrize(
    ("kind", "codes"),
    [pytest.param(*case, marks=[pytest.mark.medium] * (case[0] is BERT)) for case in CASES],
    ids=lambda value: value.name,
)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def state_bits(model: nn.Module) -> dict[str, Any]:
    return all_bits({name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)})


def loss(model: nn.Module, kind: RealModel) -> Tensor:
    torch.manual_seed(1)  # of dropout
    rows = logits(model(**kind.inputs())).flatten(0, -2)
    return nn.functional.cross_entropy(rows, torch.arange(len(rows)) % rows.shape[-1])


@every_case
def test_an_adapter_is_planned_as_for_the_dense_model_added_trained_switched_off_merged_and_ejected(
    kind: RealModel, codes: Codes
) -> None:
    dense, model = kind.build(), quantized_model(kind, codes)
    assert {type(layer).__name__ for layer in quantized_layers(model).values()} == {codes.kind}
    for targets in (None, "all-linear", kind.targets):
        found, expected = (randlora.plan(each, R, targets=targets) for each in (model, dense))
        assert (found.targets, found.rule, found.skipped) == (expected.targets, expected.rule, expected.skipped)
        assert (found.rows, found.specs) == (expected.rows, expected.specs)
    state, plain, modules = state_bits(model), outputs(model, kind.inputs()), dict(model.named_modules())
    classes = {fqn: type(module) for fqn, module in modules.items()}
    before = loss(model.train(), kind)
    report = randlora.inject(model, R, targets="all-linear")
    assert same_bits(loss(model, kind), before)
    fresh = [parameter.detach().clone() for parameter in randlora.trainable_parameters(model)]
    optimizer = torch.optim.AdamW(randlora.trainable_parameters(model), lr=3e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        value = loss(model, kind)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.95 * losses[0]
    trained = [*randlora.trainable_parameters(model)]
    assert len(trained) == 2 * len(report.targets)
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in trained)
    assert not any(map(same_bits, trained, fresh))
    assert not torch.equal(outputs(model.eval(), kind.inputs()), plain)
    with randlora.disabled(model):
        assert same_bits(outputs(model, kind.inputs()), plain)
    wanted, twin = outputs(model, kind.inputs()), copy.deepcopy(model)
    with randlora.merged(model) as merged:
        assert merged.rounding.keys() == {*report.targets}
        assert not merged.notes
        assert distance(outputs(model, kind.inputs()), wanted) < 0.5
    assert same_bits(outputs(model, kind.inputs()), wanted)
    randlora.merge(twin, quantized="dequantize")
    assert {type(twin.get_submodule(fqn)) for fqn in report.targets} == {nn.Linear}
    assert distance(outputs(twin, kind.inputs()), wanted) < codes.tolerance
    randlora.eject(model)
    assert {fqn: type(module) for fqn, module in model.named_modules()} == classes
    assert all(model.get_submodule(fqn) is module for fqn, module in modules.items())
    assert state_bits(model) == state
    assert same_bits(outputs(model, kind.inputs()), plain)


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
    assert "config still says that it is quantized" in str(randlora.merge(model, quantized="dequantize"))
    assert outputs(model, LLAMA.inputs()).isfinite().all()
    assert quantized_layers(model) == {}


@every_case
def test_an_adapter_fits_the_model_and_what_bitsandbytes_and_transformers_made_of_it(
    kind: RealModel, codes: Codes, tmp_path: Path
) -> None:
    for trained, name in ((quantized_model(kind, codes), "codes"), (kind.build(), "dense")):
        randlora.inject(trained, R, targets=kind.targets)
        fill(trained)
        randlora.save(trained, tmp_path / name)
        for other in (quantized_model(kind, codes), kind.build()):
            randlora.load(other, tmp_path / name)
            (adapter,), (found,) = randlora.adapters(trained), randlora.adapters(other)
            assert adapter.targets == found.targets
            for fqn in adapter.targets:
                assert same_bits(randlora.delta_weight(trained, fqn), randlora.delta_weight(other, fqn))
            if type(trained.get_submodule(adapter.targets[0])) is type(other.get_submodule(adapter.targets[0])):
                assert same_bits(outputs(other, kind.inputs()), outputs(trained, kind.inputs()))
    if kind is not GPT2:  # of which transformers leaves nn.Linear where its own code reads the files of Conv1D
        model, plain = quantized_model(kind, codes), quantized_model(kind, codes).dequantize()
        for each in (model, plain):
            randlora.load(each, tmp_path / "codes")
        randlora.merge(plain)
        plain.save_pretrained(tmp_path / "merged")
        again = type(plain).from_pretrained(tmp_path / "merged").eval()
        assert distance(outputs(again, kind.inputs()), outputs(model, kind.inputs())) < codes.tolerance


@every_case
def test_an_adapter_of_codes_computes_the_same_in_peft_and_pefts_here(
    kind: RealModel, codes: Codes, tmp_path: Path
) -> None:
    config = RandLoraConfig(r=R, randlora_alpha=ALPHA, target_modules=list(kind.targets))
    theirs = get_peft_model(quantized_model(kind, codes), config).eval()
    fill(theirs).save_pretrained(tmp_path / "theirs")
    ours = quantized_model(kind, codes)
    randlora.load(ours, tmp_path / "theirs")
    assert_same_effect(ours, theirs, kind)
    ours = quantized_model(kind, codes)
    randlora.inject(ours, R, alpha=ALPHA, targets=kind.targets, stream=peft_draw("dense"))
    randlora.save(fill(ours), tmp_path / "ours", bases="stored" if codes is NF4 else "seed")
    theirs = PeftModel.from_pretrained(quantized_model(kind, codes), tmp_path / "ours").eval()
    assert_same_effect(ours, theirs, kind)

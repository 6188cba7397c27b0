"""One adapter fits a model and what bitsandbytes made of it: files go both ways, and to PEFT and back."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel, RandLoraConfig, get_peft_model
from torch import nn

import randlora
from tests import peer
from tests.kit import fill, same_bits
from tests.models import RealModel, outputs
from tests.peer import ALPHA, R, assert_same_effect, peft_draw
from tests.quantized import MODELS, Codes, every_codes, every_model, quantized_model

pytestmark = peer.THEIR_WARNINGS


def trained_on(model: nn.Module, kind: RealModel) -> nn.Module:
    randlora.inject(model, R, targets=kind.targets)
    fill(model)
    return model


def assert_same_updates(first: nn.Module, second: nn.Module) -> None:
    (adapter,), (other,) = randlora.adapters(first), randlora.adapters(second)
    assert adapter.targets == other.targets
    for fqn in adapter.targets:
        assert same_bits(randlora.delta_weight(first, fqn), randlora.delta_weight(second, fqn))


@every_codes
@every_model
def test_an_adapter_saved_beside_codes_loads_beside_them_again(kind: RealModel, codes: Codes, tmp_path: Path) -> None:
    model = trained_on(quantized_model(kind, codes), kind)
    randlora.save(model, tmp_path)
    again = quantized_model(kind, codes)
    randlora.load(again, tmp_path)
    assert same_bits(outputs(again, kind.inputs()), outputs(model, kind.inputs()))


@every_codes
@every_model
def test_an_adapter_trained_on_codes_is_the_same_on_the_dense_model(
    kind: RealModel, codes: Codes, tmp_path: Path
) -> None:
    model, dense = trained_on(quantized_model(kind, codes), kind), kind.build()
    randlora.save(model, tmp_path)
    randlora.load(dense, tmp_path)
    assert_same_updates(model, dense)


@every_codes
@every_model
def test_an_adapter_trained_on_the_dense_model_is_the_same_on_codes(
    kind: RealModel, codes: Codes, tmp_path: Path
) -> None:
    dense, model = trained_on(kind.build(), kind), quantized_model(kind, codes)
    randlora.save(dense, tmp_path)
    randlora.load(model, tmp_path)
    assert_same_updates(dense, model)
    plain = outputs(quantized_model(kind, codes), kind.inputs())
    assert not torch.allclose(outputs(model, kind.inputs()), plain)


def in_peft(kind: RealModel, codes: Codes) -> PeftModel:
    """Build PEFT's quantized model with a trained-looking adapter."""
    config = RandLoraConfig(r=R, randlora_alpha=ALPHA, target_modules=list(kind.targets))
    model = get_peft_model(quantized_model(kind, codes), config).eval()
    fill(model)
    return model


@every_codes
@every_model
def test_pefts_adapter_of_codes_computes_the_same_here(kind: RealModel, codes: Codes, tmp_path: Path) -> None:
    theirs, ours = in_peft(kind, codes), quantized_model(kind, codes)
    theirs.save_pretrained(tmp_path)
    randlora.load(ours, tmp_path)
    assert_same_effect(ours, theirs, kind)


@pytest.mark.parametrize("bases", ["seed", "stored"])
@every_codes
@every_model
def test_our_adapter_of_codes_computes_the_same_in_peft(
    kind: RealModel, codes: Codes, bases: Literal["seed", "stored"], tmp_path: Path
) -> None:
    ours = quantized_model(kind, codes)
    randlora.inject(ours, R, alpha=ALPHA, targets=kind.targets, stream=peft_draw("dense"))
    fill(ours)
    randlora.save(ours, tmp_path, bases=bases)
    theirs = PeftModel.from_pretrained(quantized_model(kind, codes), tmp_path).eval()
    assert_same_effect(ours, theirs, kind)


@every_codes
@every_model
def test_an_adapter_of_codes_merged_into_the_dense_model_is_saved_as_any_model(
    kind: RealModel, codes: Codes, tmp_path: Path
) -> None:
    randlora.save(trained_on(quantized_model(kind, codes), kind), tmp_path / "adapter")
    dense: Any = kind.build()
    randlora.load(dense, tmp_path / "adapter")
    expected = outputs(dense, kind.inputs())
    randlora.merge(dense)
    dense.save_pretrained(tmp_path / "merged")
    again = type(dense).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(outputs(again, kind.inputs()), expected, rtol=1e-4, atol=1e-4)


@every_codes
@pytest.mark.parametrize(
    # of a GPT-2, transformers leaves nn.Linear where its own code reads the files of Conv1D, which are the other way
    "kind",
    [kind for kind in MODELS if kind.name != "gpt2"],
    ids=lambda kind: kind.name,
)
def test_a_model_that_transformers_dequantized_takes_the_adapter_and_is_saved(
    kind: RealModel, codes: Codes, tmp_path: Path
) -> None:
    model = trained_on(quantized_model(kind, codes), kind)
    randlora.save(model, tmp_path / "adapter")
    plain = quantized_model(kind, codes).dequantize()
    randlora.load(plain, tmp_path / "adapter")
    randlora.merge(plain)
    plain.save_pretrained(tmp_path / "merged")
    again = type(plain).from_pretrained(tmp_path / "merged").eval()
    expected = outputs(model, kind.inputs())
    assert (outputs(again, kind.inputs()) - expected).abs().max() < codes.tolerance * expected.abs().max()

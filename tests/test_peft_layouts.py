"""The directories and fields that PEFT 0.21.2 writes, and what it makes of fields in ours that it does not know."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file

import randlora
from randlora.config import BasisKind
from tests.checkpoint_files import edit_fields, edit_tensors, read_fields, read_tensors, refused
from tests.kit import fill
from tests.models import BERT, GPT2, LLAMA, VIT, RealModel, every_transformers_model, outputs
from tests.peer import (
    PREFIX,
    THEIR_WARNINGS,
    assert_same_effect,
    every_peft_kind,
    in_ours,
    in_peft,
    in_peft_bit_for_bit,
    our_model,
    peft_config,
    peft_model,
    their_values,
)

pytestmark = THEIR_WARNINGS

ADAPTER_NAMES = ("french", "two words", "größe", "a/b", "model", "layers", "q_proj", "randlora_A", "base_layer")
"""Names that are none of the files' business, some of which stand in the keys of the tensors too."""


@pytest.mark.parametrize("adapter", ADAPTER_NAMES)
def test_an_adapter_of_any_name_lies_in_a_directory_of_that_name(adapter: str, tmp_path: Path) -> None:
    theirs = peft_model(LLAMA, adapter=adapter)
    theirs.save_pretrained(tmp_path)
    assert_same_effect(in_ours(LLAMA, tmp_path / adapter), theirs, LLAMA)


def test_the_directory_around_adapters_is_no_adapter_and_the_error_names_them(tmp_path: Path) -> None:
    theirs = peft_model(LLAMA, adapter="french")
    theirs.add_adapter("dutch", peft_config(LLAMA))
    theirs.save_pretrained(tmp_path)
    refused(LLAMA.build(), tmp_path, "there are some inside it: dutch, french")


def test_layers_that_peft_adapted_without_a_model_of_its_own_load(tmp_path: Path) -> None:
    """As transformers and diffusers do with PEFT: each layer has its copy of the bases, and none is at the top."""
    theirs = inject_adapter_in_model(peft_config(LLAMA), LLAMA.build()).eval()
    fill(theirs)
    state = {f"{PREFIX}{key}": value.clone() for key, value in get_peft_model_state_dict(theirs).items()}
    assert "base_model.randlora_A" not in state
    peft_config(LLAMA).save_pretrained(tmp_path)
    save_file(state, tmp_path / "adapter_model.safetensors")
    found, expected = (outputs(model, LLAMA.inputs()) for model in (in_ours(LLAMA, tmp_path), theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fact", ["value", "dtype", "shape"])
@pytest.mark.parametrize("part", ["randlora_A", "randlora_B"])
@every_transformers_model
def test_a_copy_that_disagrees_in_anything_is_refused(kind: RealModel, part: str, fact: str, tmp_path: Path) -> None:
    peft_model(kind).save_pretrained(tmp_path)
    copies = [key for key in read_tensors(tmp_path)[0] if key.endswith(part)]
    changed = read_tensors(tmp_path)[0][copies[-1]].clone()
    if fact == "value":
        changed.view(-1)[-1] += 2**-10
    else:
        changed = changed.double() if fact == "dtype" else changed.flatten(end_dim=1)
    edit_tensors(tmp_path, {copies[-1]: changed})
    refused(kind.build(), tmp_path, f"copies of base_model.{part} that differ, {copies[0]} and {copies[-1]}")


LAYERS: tuple[tuple[RealModel, dict[str, Any], tuple[str, ...]], ...] = (
    (LLAMA, {"layers_to_transform": [1]}, ("model.layers.1.",)),
    (LLAMA, {"layers_to_transform": 0, "layers_pattern": "layers"}, ("model.layers.0.",)),
    (LLAMA, {"layers_to_transform": [0, 1], "layers_pattern": ["layers"]}, ("model.layers.0.", "model.layers.1.")),
    (GPT2, {"layers_to_transform": [0], "layers_pattern": ["h"]}, ("transformer.h.0.",)),
    (BERT, {"layers_to_transform": [1], "layers_pattern": "layer"}, ("bert.encoder.layer.1.",)),
    (VIT, {"layers_to_transform": 1, "layers_pattern": "layers"}, ("vit.layers.1.",)),
)


@pytest.mark.parametrize(("kind", "options", "prefixes"), LAYERS, ids=[f"{kind.name}-{o}" for kind, o, _ in LAYERS])
def test_layers_that_peft_chose_by_number_come_and_go(
    kind: RealModel, options: dict[str, Any], prefixes: tuple[str, ...], tmp_path: Path
) -> None:
    theirs = peft_model(kind, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = in_ours(kind, tmp_path / "theirs")
    targets = randlora.adapters(ours)[0].targets
    assert {fqn for fqn, _, _ in their_values(theirs)} == set(targets)
    assert {prefix for prefix in prefixes for fqn in targets if fqn.startswith(prefix)} == set(prefixes)
    assert all(fqn.startswith(prefixes) for fqn in targets)
    assert_same_effect(ours, theirs, kind)
    randlora.save(ours, tmp_path / "ours")
    assert in_peft_bit_for_bit(in_peft(kind, tmp_path / "ours")) == in_peft_bit_for_bit(theirs)
    assert {name: read_fields(tmp_path / "ours")[name] for name in options} == options


@every_peft_kind
def test_an_adapter_that_began_at_random_comes_and_goes(basis: BasisKind, tmp_path: Path) -> None:
    """``init_weights=False``: not trained, and yet it changes the model."""
    theirs = get_peft_model(LLAMA.build(), peft_config(LLAMA, basis, init_weights=False)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = in_ours(LLAMA, tmp_path / "theirs")
    assert_same_effect(ours, theirs, LLAMA)
    randlora.save(ours, tmp_path / "ours")
    assert read_fields(tmp_path / "ours")["init_weights"] is False
    assert in_peft_bit_for_bit(in_peft(LLAMA, tmp_path / "ours")) == in_peft_bit_for_bit(theirs)


def test_peft_names_fields_that_it_does_not_know_and_passes_over_them(tmp_path: Path) -> None:
    theirs = peft_model(LLAMA)
    theirs.save_pretrained(tmp_path / "theirs")
    edit_fields(tmp_path / "theirs", {"use_quantum": True})
    randlora.save(in_ours(LLAMA, tmp_path / "theirs"), tmp_path / "ours")
    assert read_fields(tmp_path / "ours")["use_quantum"] is True
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \[.*'use_quantum'\] for class RandLoraConfig"):
        back = in_peft(LLAMA, tmp_path / "ours")
    assert in_peft_bit_for_bit(back) == in_peft_bit_for_bit(theirs)


@pytest.mark.parametrize("basis", ["dense", "block"])
def test_peft_warns_of_a_stream_that_it_would_draw_otherwise(basis: BasisKind, tmp_path: Path) -> None:
    ours = our_model(LLAMA, basis, stream="portable")
    report = randlora.save(ours, tmp_path, bases="seed")
    assert report.notes == ("PEFT cannot draw stream='portable': save with bases='stored' to load there",)
    with pytest.warns(
        UserWarning, match=r"Unexpected keyword arguments \['randlora_stream'\] for class RandLoraConfig"
    ):
        theirs = in_peft(LLAMA, tmp_path)
    with pytest.raises(AssertionError):
        assert_same_effect(ours, theirs, LLAMA)


@pytest.mark.filterwarnings("error:Unexpected keyword arguments")
@pytest.mark.parametrize("bases", ["seed", "stored"])
@every_transformers_model
def test_peft_knows_every_field_of_a_file_that_it_can_load(kind: RealModel, bases: Any, tmp_path: Path) -> None:
    randlora.save(our_model(kind), tmp_path, bases=bases)
    in_peft(kind, tmp_path)

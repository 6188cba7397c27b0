"""How names in files become names in models."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from randlora.files.model_directory import ModelDirectory, read_model_directory
from randlora.files.names import Naming, namings


def directory(path: Path, names: list[str], **config: object) -> ModelDirectory:
    """Write a checkpoint of small tensors and read its headers."""
    save_file({name: torch.zeros(1) for name in names}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return read_model_directory(path)


@pytest.mark.parametrize(
    ("naming", "name", "expected"),
    [
        (Naming(), "h.0.weight", "h.0.weight"),
        (Naming(added="transformer."), "h.0.weight", "transformer.h.0.weight"),
        (Naming(dropped="bert."), "bert.pooler.weight", "pooler.weight"),
        (Naming(dropped="bert."), "cls.bert.weight", "cls.bert.weight"),
        (Naming(renames=((r"^a\.", "b."), ("b", "c"))), "a.weight", "c.weight"),
    ],
)
def test_a_naming_renames_drops_and_adds(naming: Naming, name: str, expected: str) -> None:
    assert naming.fqn(name) == expected


@pytest.mark.parametrize(
    ("architectures", "names", "first"),
    [
        (["GPT2LMHeadModel"], ["transformer.h.0.weight"], "transformer.h.0.weight"),
        (["GPT2LMHeadModel"], ["h.0.weight"], "transformer.h.0.weight"),
        (["GPT2ForSequenceClassification"], ["h.0.weight"], "transformer.h.0.weight"),
        (["GPT2Model"], ["transformer.h.0.weight"], "h.0.weight"),
        (["GPT2Model"], ["h.0.weight"], "h.0.weight"),
        (None, ["h.0.weight"], "h.0.weight"),
    ],
)
def test_the_first_naming_is_that_of_the_class_which_the_config_names(
    architectures: list[str] | None, names: list[str], first: str, tmp_path: Path
) -> None:
    model = directory(tmp_path, names, model_type="gpt2", architectures=architectures)
    found = [naming.fqn(names[0]) for naming in namings(model)]
    assert found[0] == first
    assert set(found) == {"h.0.weight", "transformer.h.0.weight"}


def test_a_type_that_is_not_known_keeps_its_names(tmp_path: Path) -> None:
    model = directory(tmp_path, ["x.weight"], model_type="own", architectures=["OwnForCausalLM"])
    assert {naming.fqn("x.weight") for naming in namings(model)} == {"x.weight"}


def test_the_names_that_norms_had_in_the_first_berts_are_read(tmp_path: Path) -> None:
    model = directory(tmp_path, ["bert.LayerNorm.gamma"], model_type="bert", architectures=["BertForMaskedLM"])
    naming = next(namings(model))
    assert naming.fqn("bert.LayerNorm.gamma") == "bert.LayerNorm.weight"
    assert naming.fqn("bert.LayerNorm.beta") == "bert.LayerNorm.bias"
    assert naming.fqn("bert.gamma") == "bert.gamma"


def test_old_and_new_names_of_a_vit_are_both_tried(tmp_path: Path) -> None:
    name = "vit.encoder.layer.11.attention.attention.query.weight"
    model = directory(tmp_path, [name], model_type="vit", architectures=["ViTForImageClassification"])
    found = [naming.fqn(name) for naming in namings(model)]
    assert found[0] == "vit.layers.11.attention.q_proj.weight"
    assert name in found

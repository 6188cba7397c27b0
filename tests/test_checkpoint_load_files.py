"""What `load` takes from a file: names as they stand, PEFT's layouts as ours, tensors into memory of its own."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from tests.checkpoint_files import (
    LINEAR,
    Case,
    Twice,
    basis_of,
    edit_fields,
    edit_tensors,
    peft_directory,
    read_fields,
    read_tensors,
    refused,
    trained,
)
from tests.kit import adapter_values, all_bits, bits


class Swapped(nn.Module):
    """`Twice` with its two names in the other order."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(6, 6)
        self.first = self.again
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.again(torch.tanh(self.first(x))))
        return output


def test_a_shared_layer_is_found_by_whichever_of_its_names_the_file_holds(tmp_path: Path) -> None:
    case, swapped = Case("twice", Twice, {"targets": "all-linear"}), Case("swapped", Swapped)
    model, other = trained(case), swapped.build()
    randlora.save(model, tmp_path / "one")
    randlora.load(other, tmp_path / "one")
    assert other.get_submodule("first") is other.get_submodule("again")
    assert torch.equal(swapped.output(other), case.output(model))
    randlora.save(other, tmp_path / "two")
    twin = case.build()
    randlora.load(twin, tmp_path / "two")
    assert torch.equal(case.output(twin), case.output(model))


# What a file may not do


@pytest.mark.parametrize("pattern", ["(a+)+$", "(", ".*", "nothing"])
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "peft"])
def test_target_modules_of_a_file_is_never_run(
    pattern: str, ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "a" * 60 + "b"
    model, twin = nn.ModuleDict({name: nn.Linear(6, 4)}), nn.ModuleDict({name: nn.Linear(6, 4)})
    randlora.inject(model, r=2)
    randlora.save(model, tmp_path, bases="seed" if ours else "stored")
    if not ours:
        edit_tensors(tmp_path, {})
    edit_fields(tmp_path, {"target_modules": pattern})
    seen: list[object] = []

    def watch(function: str) -> None:
        run = getattr(re, function)

        def watched(given: object, *args: Any) -> object:
            seen.append(given)
            return run("" if given == pattern else given, *args)

        monkeypatch.setattr(re, function, watched)

    for function in ("compile", "fullmatch", "match", "search", "findall", "finditer", "sub"):
        watch(function)
    randlora.load(twin, tmp_path)
    monkeypatch.undo()
    assert pattern not in seen
    assert randlora.adapters(twin)[0].targets == (name,)
    randlora.save(twin, tmp_path)
    assert read_fields(tmp_path)["target_modules"] == [name]


def test_a_name_in_a_file_that_looks_like_a_regex_matches_nothing_but_itself(tmp_path: Path) -> None:
    randlora.save(trained(LINEAR), tmp_path, bases="stored")
    tensors, _ = read_tensors(tmp_path)
    renamed = {key.replace("model.0.", "model..*."): tensor for key, tensor in tensors.items()}
    edit_tensors(tmp_path, renamed, drop=[key for key in tensors if key not in renamed])
    refused(LINEAR.build(), tmp_path, "the model has no layer .*")


# PEFT's layouts


def test_a_peft_file_means_what_ours_does(tmp_path: Path) -> None:
    model, twin = trained(LINEAR, alpha=7.0), LINEAR.build()
    randlora.load(twin, peft_directory(tmp_path, alpha=7.0))
    assert all_bits(adapter_values(twin)) == all_bits(adapter_values(model))
    assert basis_of(twin).spec == basis_of(model).spec
    assert basis_of(twin).stored is None, "the key brings the bases back"
    assert torch.equal(LINEAR.output(twin), LINEAR.output(model))


@pytest.mark.parametrize(
    ("copies", "drop"),
    [
        ((), ("base_model.randlora_A", "base_model.randlora_B")),
        (("base_model.model.0", "base_model.model.2"), ()),
        (("base_model.model.0", "base_model.model.2"), ("base_model.randlora_A", "base_model.randlora_B")),
        (("base_model.model.2",), ("base_model.randlora_A", "base_model.randlora_B")),
    ],
    ids=["no-bases", "top-and-per-layer", "per-layer", "one-layer"],
)
def test_every_layout_of_pefts_bases_reads_the_same(
    copies: tuple[str, ...], drop: tuple[str, ...], tmp_path: Path
) -> None:
    directory = peft_directory(tmp_path)
    tensors, _ = read_tensors(directory)
    repeated = {
        f"{prefix}.{part}": tensors[f"base_model.{part}"] for prefix in copies for part in ("randlora_A", "randlora_B")
    }
    edit_tensors(directory, repeated, drop=drop)
    model, twin = trained(LINEAR), LINEAR.build()
    randlora.load(twin, directory)
    assert torch.equal(LINEAR.output(twin), LINEAR.output(model))


def test_bases_of_a_peft_file_win_over_its_key(tmp_path: Path) -> None:
    directory = peft_directory(tmp_path)
    edit_fields(directory, {"projection_prng_key": 12345})
    model, twin = trained(LINEAR), LINEAR.build()
    randlora.load(twin, directory)
    assert basis_of(twin).stored is not None
    assert torch.equal(LINEAR.output(twin), LINEAR.output(model))


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"sparse": False, "very_sparse": False}, "dense"),
        ({"sparse": True, "very_sparse": False}, "sparse"),
        ({"sparse": False, "very_sparse": True}, "very_sparse"),
        ({"sparse": True, "very_sparse": True}, "very_sparse"),
    ],
    ids=["neither", "sparse", "very_sparse", "both"],
)
def test_pefts_two_booleans_are_read_as_one_kind(fields: dict[str, bool], kind: str, tmp_path: Path) -> None:
    directory = peft_directory(tmp_path, r=8)
    edit_tensors(directory, {}, drop=("base_model.randlora_A", "base_model.randlora_B"))
    edit_fields(directory, fields)
    model = LINEAR.build()
    randlora.load(model, directory)
    assert basis_of(model).spec.kind == kind


def test_parameters_that_peft_trained_beside_an_adapter_are_read_inside_adapted_layers_too(tmp_path: Path) -> None:
    directory = peft_directory(tmp_path)
    edit_tensors(directory, {"base_model.model.0.base_layer.bias": torch.arange(4.0)})
    model = LINEAR.build()
    randlora.load(model, directory)
    assert bits(model.get_parameter("0.bias")) == bits(torch.arange(4.0))
    assert randlora.adapters(model)[0].train_also == ("0.bias",)


def test_a_negative_key_of_pefts_is_read_as_torch_takes_it(tmp_path: Path) -> None:
    directory = peft_directory(tmp_path)
    edit_tensors(directory, {}, drop=("base_model.randlora_A", "base_model.randlora_B"))
    edit_fields(directory, {"projection_prng_key": -1})
    model, twin = LINEAR.build(), trained(LINEAR, seed=2**64 - 1)
    randlora.load(model, directory)
    assert torch.equal(LINEAR.output(model), LINEAR.output(twin))


def test_what_is_loaded_lies_in_memory_of_its_own(tmp_path: Path) -> None:
    """Tensors straight from a file are mapped and need not be aligned, which changes the last bits of a product."""
    model, twin = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1)), nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1))
    randlora.inject(model, r=2, targets=["0"], train_also=["1"], stream="portable")
    randlora.save(model, tmp_path)
    randlora.load(twin, tmp_path, trainable=True)
    assert all(parameter.data_ptr() % 64 == 0 for parameter in randlora.trainable_parameters(twin))

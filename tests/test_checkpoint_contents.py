"""What `load` takes from files: PEFT's layouts as ours, names as they stand; what cannot be an adapter's is refused."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.errors import CheckpointError
from tests.checkpoint_files import (
    GAMMA,
    LAMBDA,
    LINEAR,
    PREFIX,
    Case,
    Headed,
    Twice,
    basis_of,
    edit_fields,
    edit_tensors,
    peft_directory,
    read_fields,
    read_tensors,
    refused,
    reseal,
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
        (None, "dense"),
    ],
    ids=["neither", "sparse", "very_sparse", "both", "missing"],
)
def test_pefts_two_booleans_are_read_as_one_kind(fields: dict[str, bool] | None, kind: str, tmp_path: Path) -> None:
    directory = peft_directory(tmp_path, r=8)
    edit_tensors(directory, {}, drop=("base_model.randlora_A", "base_model.randlora_B"))
    edit_fields(directory, fields or {}, drop=() if fields else ["sparse", "very_sparse"])
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


BASIS_A, BASIS_B = "base_model.randlora_A", "base_model.randlora_B"


def nan_at(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, float("nan")) for key in (LAMBDA, GAMMA, f"{PREFIX}norm.bias", BASIS_A, BASIS_B)),
        (LAMBDA, float("inf")),
        (GAMMA, -float("inf")),
    ],
)
def test_values_that_are_not_finite_are_refused_by_name(key: str, value: float, tmp_path: Path) -> None:
    case = Case("body", Headed, {"targets": ["0"], "train_also": ["norm.bias"]})
    key = key.replace(f"{PREFIX}0", f"{PREFIX}body.0")
    directory = peft_directory(tmp_path, case)
    edit_tensors(directory, {key: nan_at(read_tensors(directory)[0][key], value)})
    name = key.removeprefix(PREFIX).removeprefix("base_model.")
    refused(case.build(), directory, f"{name} holds NaN or infinite values")


def test_values_that_are_not_finite_are_refused_though_the_seal_is_whole(tmp_path: Path) -> None:
    randlora.save(trained(LINEAR), tmp_path)
    reseal(tmp_path, {GAMMA: nan_at(read_tensors(tmp_path)[0][GAMMA], float("nan"))})
    refused(LINEAR.build(), tmp_path, "0.randlora_gamma holds NaN or infinite values")


@pytest.mark.parametrize(
    ("key", "dtype"),
    [
        *((key, torch.int64) for key in (LAMBDA, GAMMA, BASIS_A, BASIS_B)),
        *((LAMBDA, dtype) for dtype in (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)),
    ],
    ids=str,
)
def test_tensors_of_another_dtype_are_refused_by_name(key: str, dtype: torch.dtype, tmp_path: Path) -> None:
    directory = peft_directory(tmp_path)
    edit_tensors(directory, {key: torch.ones(read_tensors(directory)[0][key].shape).to(dtype)})
    name = key.removeprefix(PREFIX).removeprefix("base_model.")
    refused(LINEAR.build(), directory, f"{name} holds {dtype}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_tensors_of_another_floating_dtype_are_read_and_never_narrowed(dtype: torch.dtype, tmp_path: Path) -> None:
    directory = peft_directory(tmp_path)
    written = read_tensors(directory)[0][LAMBDA].to(dtype)  # in memory of its own: the file is about to change
    edit_tensors(directory, {LAMBDA: written})
    model = LINEAR.build()
    randlora.load(model, directory)
    wide = torch.promote_types(dtype, torch.float32)
    assert bits(adapter_values(model)["0.randlora_lambda"]) == bits(written.to(wide))


Edit = tuple[Mapping[str, Tensor], tuple[str, ...], str]

WRONG_TENSORS: dict[str, Edit] = {
    "lambda-without-gamma": ({}, (GAMMA,), "0 has one of randlora_lambda and randlora_gamma: expected both"),
    "gamma-without-lambda": ({}, (LAMBDA,), "0 has one of randlora_lambda and randlora_gamma: expected both"),
    "A-without-B": ({}, (BASIS_B,), "the file holds one of the two bases: expected both or none"),
    "B-without-A": ({}, (BASIS_A,), "the file holds one of the two bases: expected both or none"),
    "nothing": (
        {f"{PREFIX}0.bias": torch.ones(4)},
        (LAMBDA, GAMMA, LAMBDA.replace("0", "2"), GAMMA.replace("0", "2")),
        "the file holds no randlora_lambda and randlora_gamma",
    ),
    "stray-name": ({"optimizer.step": torch.ones(1)}, (), "'optimizer.step' is not the name of an adapter's tensor"),
    "no-prefix": (
        {"0.randlora_lambda": torch.ones(2, 2)},
        (),
        "'0.randlora_lambda' is not the name of",
    ),
    "unknown-parameter": ({f"{PREFIX}1.weight": torch.ones(4)}, (), "the model has no parameter 1.weight"),
    "adapter-name-in-key": (
        {f"{LAMBDA}.default": torch.ones(2, 2)},
        (),
        "the model has no parameter 0.randlora_lambda.default",
    ),
    "lambda-of-other-rank": ({LAMBDA: torch.ones(3, 2)}, (), "randlora_lambda (3, 2)"),
    "lambda-of-other-length": ({LAMBDA: torch.ones(2, 3)}, (), "randlora_lambda (2, 3)"),
    "lambda-transposed": ({LAMBDA: torch.ones(2)}, (), "randlora_lambda (2,)"),
    "lambda-scalar": ({LAMBDA: torch.tensor(1.0)}, (), "randlora_lambda ()"),
    "gamma-scalar": ({GAMMA: torch.tensor(1.0)}, (), "randlora_gamma ()"),
    "gamma-of-three-dims": ({GAMMA: torch.ones(2, 4, 1)}, (), "randlora_gamma (2, 4, 1)"),
    "gamma-narrower": (
        {GAMMA: torch.ones(2, 3)},
        (),
        "0 is 4 x 6 here, the adapter was trained on a smaller side of 3",
    ),
    "empty": (
        {LAMBDA: torch.ones(2, 0), GAMMA: torch.ones(0, 0)},
        (),
        "0 has randlora_lambda (2, 0) and randlora_gamma (0, 0): expected (2, num_bases)",
    ),
    "A-scalar": ({BASIS_A: torch.tensor(1.0)}, (), "the bases have shapes () and"),
    "B-scalar": ({BASIS_B: torch.tensor(1.0)}, (), "and (), which do not fit r=2"),
    "A-flat": ({BASIS_A: torch.ones(2, 5)}, (), "the bases have shapes (2, 5)"),
    "A-of-other-rank": ({BASIS_A: torch.ones(3, 1, 5)}, (), "the bases have shapes (3, 1, 5)"),
    "B-of-other-rank": ({BASIS_B: torch.ones(6, 3, 3)}, (), "and (6, 3, 3), which do not fit r=2"),
    "B-of-other-length": ({BASIS_B: torch.ones(6, 2, 2)}, (), "and (6, 2, 2), which do not fit r=2"),
    "B-too-short": ({BASIS_B: torch.ones(5, 3, 2)}, (), "0 is 4 x 6, larger than the bases in the file"),
    "A-and-B-too-narrow": (
        {BASIS_A: torch.ones(2, 1, 3), BASIS_B: torch.ones(6, 2, 2)},
        (),
        "0 is 4 x 6, larger than the bases in the file",
    ),
    "two-tensors-of-one-name": (
        {f"{PREFIX}0.bias": torch.ones(4), f"{PREFIX}0.base_layer.bias": torch.zeros(4)},
        (),
        "expected the parameters trained with it (0.bias), got",
    ),
    "copies-of-A-that-differ": (
        {f"{PREFIX}0.randlora_A": torch.ones(2, 1, 5)},
        (),
        "holds copies of base_model.randlora_A that differ",
    ),
    "copies-of-B-of-other-shapes": (
        {f"{PREFIX}2.randlora_B": torch.ones(6, 3, 3)},
        (),
        "holds copies of base_model.randlora_B that differ",
    ),
}


@pytest.mark.parametrize(("changes", "drop", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_tensors_that_are_no_adapter_are_refused(
    changes: Mapping[str, Tensor], drop: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    directory = peft_directory(tmp_path)
    edit_tensors(directory, changes, drop=drop)
    refused(LINEAR.build(), directory, message)


@pytest.mark.parametrize(
    ("changes", "drop", "message"),
    [
        ({}, ("r",), "the adapter's JSON lacks r"),
        ({}, ("r", "randlora_alpha", "projection_prng_key"), "lacks r, randlora_alpha, projection_prng_key"),
        ({"r": 0}, (), "r must be a positive integer"),
        ({"r": "2"}, (), "r must be an integer, got '2'"),
        ({"r": True}, (), "r must be an integer, got True"),
        ({"r": 3}, (), "expected (3, num_bases)"),
        ({"randlora_alpha": 10**400}, (), "an integer of 401 digits, which is too large"),
        ({"randlora_alpha": float("nan")}, (), "it has NaN, which is not JSON"),
        ({"randlora_alpha": "640"}, (), "alpha must be a finite number"),
        ({"randlora_dropout": 1.0}, (), "dropout must be a number in [0, 1)"),
        ({"projection_prng_key": 0.5}, (), "projection_prng_key must be an integer, got 0.5"),
        ({"projection_prng_key": "%2000000000d"}, (), "projection_prng_key must be an integer, got '%2000000000d'"),
        ({"projection_prng_key": None}, (), "projection_prng_key must be an integer, got None"),
        ({"projection_prng_key": [1]}, (), "projection_prng_key must be an integer, got [1]"),
    ],
    ids=str,
)
def test_options_of_a_peft_file_that_cannot_work_are_refused(
    changes: dict[str, Any], drop: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    directory = peft_directory(tmp_path)
    edit_fields(directory, changes, drop=drop)
    refused(LINEAR.build(), directory, message)


def test_all_problems_of_a_file_are_named_at_once(tmp_path: Path) -> None:
    directory = peft_directory(tmp_path)
    edit_tensors(directory, {LAMBDA: torch.full((2, 2), float("nan")), GAMMA: torch.ones(2, 4, dtype=torch.int64)})
    with pytest.raises(CheckpointError, match="2 problems") as caught:
        randlora.load(LINEAR.build(), directory)
    assert "0.randlora_lambda holds NaN" in str(caught.value)
    assert "0.randlora_gamma holds torch.int64" in str(caught.value)

"""What `load` takes from files: PEFT's layouts as ours, names as they stand; what cannot be an adapter's is refused."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from tests.checkpoint_files import (
    BASIS_A,
    BASIS_B,
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


class Swapped(Twice):
    """`Twice` with its two names in the other order."""

    def __init__(self) -> None:
        super().__init__()
        del self.first
        self.first = self.again


def test_a_shared_layer_is_found_by_whichever_of_its_names_the_file_holds(tmp_path: Path) -> None:
    case, swapped = Case("twice", Twice, {"targets": "all-linear"}), Case("swapped", Swapped)
    model, other, twin = trained(case), swapped.build(), case.build()
    randlora.save(model, tmp_path / "one")
    randlora.load(other, tmp_path / "one")
    assert other.get_submodule("first") is other.get_submodule("again")
    assert torch.equal(swapped.output(other), case.output(model))
    randlora.save(other, tmp_path / "two")
    randlora.load(twin, tmp_path / "two")
    assert torch.equal(case.output(twin), case.output(model))


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


@pytest.mark.parametrize("alpha", [7.0, 7, 0.1, 1e15])
def test_a_peft_file_means_what_ours_does(alpha: float, tmp_path: Path) -> None:
    model, twin = trained(LINEAR, alpha=alpha), LINEAR.build()
    randlora.load(twin, peft_directory(tmp_path, alpha=alpha))
    assert all_bits(adapter_values(twin)) == all_bits(adapter_values(model))
    assert basis_of(twin).spec == basis_of(model).spec
    assert basis_of(twin).stored is None, "the key brings the bases back"
    assert torch.equal(LINEAR.output(twin), LINEAR.output(model))
    written = read_fields(tmp_path)["randlora_alpha"]
    assert (written, type(written)) == (alpha, int if alpha == int(alpha) else float)


LAYOUTS: dict[str, tuple[str, bool, int]] = {
    "no-bases": ("", False, 0),
    "top-and-per-layer": ("0 2", True, 0),
    "per-layer": ("0 2", False, 0),
    "one-layer": ("2", False, 0),
    "of-another-key": ("", True, 9),
}


@pytest.mark.parametrize(("copies", "is_at_the_top", "key"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_of_pefts_bases_reads_the_same(copies: str, is_at_the_top: bool, key: int, tmp_path: Path) -> None:
    """Bases in the file win over its key."""
    directory = peft_directory(tmp_path)
    bases = {BASIS_A: read_tensors(directory)[0][BASIS_A], BASIS_B: read_tensors(directory)[0][BASIS_B]}
    repeated = {
        part.replace("base_model", f"{PREFIX}{fqn}"): value for fqn in copies.split() for part, value in bases.items()
    }
    edit_tensors(directory, repeated, drop=() if is_at_the_top else [*bases])
    edit_fields(directory, {"projection_prng_key": key})
    model, twin = trained(LINEAR), LINEAR.build()
    randlora.load(twin, directory)
    assert (basis_of(twin).stored is not None) == bool(key)
    assert torch.equal(LINEAR.output(twin), LINEAR.output(model))


@pytest.mark.parametrize(
    ("flags", "kind"),
    [((0, 0), "dense"), ((1, 0), "sparse"), ((0, 1), "very_sparse"), ((1, 1), "very_sparse"), ((), "dense")],
)
def test_pefts_two_booleans_are_read_as_one_kind(flags: tuple[int, ...], kind: str, tmp_path: Path) -> None:
    edit_tensors(peft_directory(tmp_path, r=8), {}, drop=(BASIS_A, BASIS_B))
    names = ("sparse", "very_sparse")
    edit_fields(tmp_path, dict(zip(names, map(bool, flags), strict=False)), drop=() if flags else names)
    model = LINEAR.build()
    randlora.load(model, tmp_path)
    assert basis_of(model).spec.kind == kind


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_tensors_of_another_floating_dtype_are_read_and_never_narrowed(dtype: torch.dtype, tmp_path: Path) -> None:
    directory = peft_directory(tmp_path)
    written = read_tensors(directory)[0][LAMBDA].to(dtype)  # in memory of its own: the file is about to change
    edit_tensors(directory, {LAMBDA: written})
    model = LINEAR.build()
    randlora.load(model, directory)
    wide = torch.promote_types(dtype, torch.float32)
    assert bits(adapter_values(model)["0.randlora_lambda"]) == bits(written.to(wide))


# What is refused


def nan_at(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


def test_values_that_are_not_finite_are_refused_though_the_seal_is_whole(tmp_path: Path) -> None:
    """And by name in files of PEFT, which have no seal."""
    case = Case("body", Headed, {"targets": ["0"], "train_also": ["norm.bias"]})
    lam, gamma, bias = (f"{PREFIX}{name}" for name in ("body.0.randlora_lambda", "body.0.randlora_gamma", "norm.bias"))
    wrong = [*((key, float("nan")) for key in (lam, gamma, bias, BASIS_A, BASIS_B)), (lam, 1e999), (gamma, -1e999)]
    for key, value in wrong:
        directory = peft_directory(tmp_path, case)
        edit_tensors(directory, {key: nan_at(read_tensors(directory)[0][key], value)})
        name = key.removeprefix(PREFIX).removeprefix("base_model.")
        refused(case.build(), directory, f"{name} holds NaN or infinite values")
    randlora.save(trained(LINEAR), tmp_path)
    reseal(tmp_path, {GAMMA: nan_at(read_tensors(tmp_path)[0][GAMMA], float("nan"))})
    refused(LINEAR.build(), tmp_path, "0.randlora_gamma holds NaN or infinite values")


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


ONE_OF = "0 has one of randlora_lambda and randlora_gamma: expected both"
ALONE = "the file holds one of the two bases: expected both or none"
LARGER = "0 is 4 x 6, larger than the bases in the file"
WRONG_TENSORS: dict[str, tuple[Mapping[str, Tensor], tuple[str, ...], str]] = {
    "lambda-without-gamma": ({}, (GAMMA,), ONE_OF),
    "gamma-without-lambda": ({}, (LAMBDA,), ONE_OF),
    "A-without-B": ({}, (BASIS_B,), ALONE),
    "B-without-A": ({}, (BASIS_A,), ALONE),
    "nothing": (
        {f"{PREFIX}0.bias": ones(4)},
        (LAMBDA, GAMMA, LAMBDA.replace("0", "2"), GAMMA.replace("0", "2")),
        "the file holds no randlora_lambda and randlora_gamma",
    ),
    "stray-name": ({"optimizer.step": ones(1)}, (), "'optimizer.step' is not the name of an adapter's tensor"),
    "no-prefix": ({"0.randlora_lambda": ones(2, 2)}, (), "'0.randlora_lambda' is not the name of"),
    "adapter-name": ({f"{LAMBDA}.default": ones(2, 2)}, (), "the model has no parameter 0.randlora_lambda.default"),
    "lambda-of-other-rank": ({LAMBDA: ones(3, 2)}, (), "randlora_lambda (3, 2)"),
    "lambda-of-other-length": ({LAMBDA: ones(2, 3)}, (), "randlora_lambda (2, 3)"),
    "lambda-scalar": ({LAMBDA: torch.tensor(1.0)}, (), "randlora_lambda ()"),
    "gamma-of-three-dims": ({GAMMA: ones(2, 4, 1)}, (), "randlora_gamma (2, 4, 1)"),
    "one-basis-more": ({LAMBDA: ones(2, 3), GAMMA: ones(3, 4)}, (), "randlora_gamma (3, 4)"),
    "stacks-of-stacks": ({LAMBDA: ones(1, 1, 2, 2), GAMMA: ones(1, 1, 2, 4)}, (), "randlora_lambda (1, 1, 2, 2)"),
    "gamma-narrower": ({GAMMA: ones(2, 3)}, (), "0 is 4 x 6 here, the adapter was trained on a smaller side of 3"),
    "empty": (
        {LAMBDA: ones(2, 0), GAMMA: ones(0, 0)},
        (),
        "0 has randlora_lambda (2, 0) and randlora_gamma (0, 0): expected (2, num_bases)",
    ),
    "A-scalar": ({BASIS_A: torch.tensor(1.0)}, (), "the bases have shapes () and"),
    "A-flat": ({BASIS_A: ones(2, 5)}, (), "the bases have shapes (2, 5)"),
    "A-of-other-rank": ({BASIS_A: ones(3, 1, 5)}, (), "the bases have shapes (3, 1, 5)"),
    "B-of-other-rank": ({BASIS_B: ones(6, 3, 3)}, (), "and (6, 3, 3), which do not fit r=2"),
    "B-of-other-length": ({BASIS_B: ones(6, 2, 2)}, (), "and (6, 2, 2), which do not fit r=2"),
    "B-too-short": ({BASIS_B: ones(5, 3, 2)}, (), LARGER),
    "A-and-B-too-narrow": ({BASIS_A: ones(2, 1, 3), BASIS_B: ones(6, 2, 2)}, (), LARGER),
    "two-tensors-of-one-name": (
        {f"{PREFIX}0.bias": ones(4), f"{PREFIX}0.base_layer.bias": torch.zeros(4)},
        (),
        "expected the parameters trained with it (0.bias), got",
    ),
    "copies-that-differ": ({f"{PREFIX}0.randlora_A": ones(2, 1, 5)}, (), "copies of base_model.randlora_A that differ"),
    "float8": ({LAMBDA: ones(2, 2).to(torch.float8_e4m3fn)}, (), "0.randlora_lambda holds torch.float8_e4m3fn"),
    "bool": ({BASIS_B: ones(6, 3, 2).bool()}, (), "randlora_B holds torch.bool"),
    "two-at-once": (
        {LAMBDA: ones(2, 2) / 0, GAMMA: ones(2, 4).long()},
        (),
        "2 problems:\n  - 0.randlora_lambda holds NaN",
    ),
}


@pytest.mark.parametrize(("changes", "drop", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_tensors_that_are_no_adapter_are_refused(
    changes: Mapping[str, Tensor], drop: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    edit_tensors(peft_directory(tmp_path), changes, drop=drop)
    refused(LINEAR.build(), tmp_path, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"r": None, "randlora_alpha": None, "projection_prng_key": None},
            "lacks r, randlora_alpha, projection_prng_key",
        ),
        ({"r": 0}, "r must be a positive integer"),
        ({"r": True}, "r must be an integer, got True"),
        ({"r": 3}, "expected (3, num_bases)"),
        ({"randlora_alpha": 10**400}, "an integer of 401 digits, which is too large"),
        ({"randlora_alpha": float("nan")}, "it has NaN, which is not JSON"),
        ({"randlora_alpha": "640"}, "alpha must be a finite number"),
        ({"randlora_dropout": 1.0}, "dropout must be a number in [0, 1)"),
        ({"projection_prng_key": 0.5}, "projection_prng_key must be an integer, got 0.5"),
        ({"projection_prng_key": [1]}, "projection_prng_key must be an integer, got [1]"),
    ],
    ids=str,
)
def test_options_of_a_peft_file_that_cannot_work_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    edit_fields(peft_directory(tmp_path), changes, drop=[key for key, value in changes.items() if value is None])
    refused(LINEAR.build(), tmp_path, message)

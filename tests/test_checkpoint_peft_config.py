"""``adapter_config.json``: PEFT's fields, and names by which PEFT finds the same layers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora.checkpoint.peft_config import peft_kind, target_modules, whole_modules
from randlora.targets.walk import Census
from tests.checkpoint_files import (
    CASES,
    CONFIG_FILE,
    LINEAR,
    Case,
    Headed,
    edit_fields,
    peft_directory,
    read_fields,
    trained,
)


def saved_fields(directory: Path, case: Case = LINEAR, **options: Any) -> dict[str, Any]:
    """Save an adapter and read its JSON."""
    randlora.save(trained(case, **options), directory)
    return read_fields(directory)


def test_the_json_holds_the_fields_that_peft_writes(tmp_path: Path) -> None:
    assert saved_fields(tmp_path, r=4, seed=11) == {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "peft_type": "RANDLORA",
        "peft_version": "0.21.2",
        "projection_prng_key": 11,
        "r": 4,
        "randlora_alpha": 80,
        "randlora_dropout": 0.0,
        "revision": None,
        "save_projection": False,
        "sparse": False,
        "target_modules": ["0", "2"],
        "task_type": None,
        "very_sparse": False,
    }


def test_the_json_is_text_for_people_too(tmp_path: Path) -> None:
    saved_fields(tmp_path)
    text = (tmp_path / CONFIG_FILE).read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize(("bases", "stored"), [("seed", False), ("stored", True)])
def test_save_projection_says_whether_the_file_holds_the_bases(bases: Any, stored: bool, tmp_path: Path) -> None:
    randlora.save(trained(LINEAR), tmp_path, bases=bases)
    assert read_fields(tmp_path)["save_projection"] is stored


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({}, 40),
        ({"alpha": 7}, 7),
        ({"alpha": 7.0}, 7),
        ({"alpha": 0.1}, 0.1),
        ({"alpha": 1e15}, 10**15),
    ],
    ids=["default", "integer", "whole", "fraction", "large"],
)
def test_alpha_is_written_as_an_integer_where_it_is_one(options: Any, written: object, tmp_path: Path) -> None:
    fields = saved_fields(tmp_path, **options)
    assert fields["randlora_alpha"] == written
    assert type(fields["randlora_alpha"]) is type(written)
    model = LINEAR.build()
    randlora.load(model, tmp_path)
    assert randlora.adapters(model)[0].options["0"].alpha == written


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("dense", (False, False)),
        ("sparse", (True, False)),
        ("very_sparse", (False, True)),
        ("block", (False, False)),
    ],
)
def test_the_kind_is_written_as_pefts_two_booleans(kind: Any, flags: tuple[bool, bool], tmp_path: Path) -> None:
    fields = saved_fields(tmp_path, r=8, basis=kind)
    assert (fields["sparse"], fields["very_sparse"]) == flags


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True), (True, True), (None, None)], ids=str)
def test_pefts_two_booleans_are_one_kind(flags: tuple[bool | None, bool | None]) -> None:
    sparse, very_sparse = flags
    expected = "very_sparse" if very_sparse else "sparse" if sparse else "dense"
    assert peft_kind({"sparse": sparse, "very_sparse": very_sparse}) == expected


def test_a_file_without_the_two_booleans_is_dense() -> None:
    assert peft_kind({}) == "dense"


@pytest.mark.parametrize(("name", "expected"), [("Linear", False), ("Conv1D", True), ("mixed-sizes", False)], ids=str)
def test_fan_in_fan_out_means_that_every_target_stores_its_weight_transposed(
    name: str, expected: bool, tmp_path: Path
) -> None:
    (case,) = [case for case in CASES if case.name == name]
    assert saved_fields(tmp_path, case)["fan_in_fan_out"] is expected


class Named(nn.Module):
    """A model with transformers' note of where it came from."""

    def __init__(self, origin: str) -> None:
        super().__init__()
        self.config = type("Config", (), {"_name_or_path": origin})()
        self.layer = nn.Linear(6, 4)


@pytest.mark.parametrize(("origin", "written"), [("org/model", "org/model"), ("", None)], ids=["named", "unnamed"])
def test_the_base_models_name_is_written_where_it_is_known(origin: str, written: str | None, tmp_path: Path) -> None:
    case = Case("named", lambda: Named(origin))
    assert saved_fields(tmp_path, case)["base_model_name_or_path"] == written


FOREIGN = {
    "a_field_of_tomorrow": [1, {"x": None}],
    "auto_mapping": {"base_model_class": "Bert"},
    "base_model_name_or_path": "org/base",
    "bias": "lora_only",
    "init_weights": False,
    "layers_to_transform": [0],
    "revision": "main",
    "task_type": "SEQ_CLS",
}


def test_fields_that_mean_nothing_here_are_written_back(tmp_path: Path) -> None:
    directory = peft_directory(tmp_path / "peft")
    edit_fields(directory, FOREIGN)
    model, again = LINEAR.build(), LINEAR.build()
    report = randlora.load(model, directory)
    assert report.notes == ("fields kept but not understood: a_field_of_tomorrow",)
    randlora.save(model, tmp_path / "ours")
    randlora.load(again, tmp_path / "ours")
    randlora.save(again, tmp_path / "again")
    assert {name: read_fields(tmp_path / "ours")[name] for name in FOREIGN} == FOREIGN
    assert read_fields(tmp_path / "again") == read_fields(tmp_path / "ours")


def test_fields_of_the_arithmetic_are_written_anew(tmp_path: Path) -> None:
    directory = peft_directory(tmp_path, r=4)
    before = read_fields(directory)
    edit_fields(directory, {"target_modules": "nonsense", "inference_mode": False, "peft_version": "0.15.0"})
    model = LINEAR.build()
    randlora.load(model, directory)
    randlora.save(model, directory, bases="stored")
    assert read_fields(directory) == before


def found_by_peft(model: nn.Module, wanted: list[str] | str) -> set[str]:
    """Find modules by PEFT's rule: a regex over whole names, or names and what ends with a dot and the name."""
    names = [fqn for fqn, _ in model.named_modules() if fqn]
    if isinstance(wanted, str):
        return {fqn for fqn in names if re.fullmatch(wanted, fqn)}
    return {fqn for fqn in names if fqn in wanted or fqn.endswith(tuple(f".{entry}" for entry in wanted))}


paths = st.lists(st.sampled_from(["q", "v", "qv", "x+", "0", "(a)"]), min_size=1, max_size=3).map(tuple)


def tree(leaves: set[tuple[str, ...]]) -> tuple[nn.Module, list[str]]:
    """Build nested containers with linear layers at these paths, where no other path goes on."""
    root = nn.ModuleDict()
    for path in sorted(leaves):
        here = root
        for name in path[:-1]:
            if name not in here:
                here[name] = nn.ModuleDict()
            inner = here[name]
            if not isinstance(inner, nn.ModuleDict):
                break
            here = inner
        else:
            if path[-1] not in here:
                here[path[-1]] = nn.Linear(2, 2)
    return root, [fqn for fqn, module in root.named_modules() if isinstance(module, nn.Linear)]


@given(st.sets(paths, min_size=1, max_size=8), st.data())
def test_target_modules_make_peft_find_these_layers_and_no_others(
    leaves: set[tuple[str, ...]], data: st.DataObject
) -> None:
    model, linear = tree(leaves)
    chosen = data.draw(st.lists(st.sampled_from(linear), min_size=1, unique=True))
    assert found_by_peft(model, target_modules(Census.of(model), chosen)) == set(chosen)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (["a.q", "b.q"], ["q"]),
        (["a.q", "b.q", "a.v", "b.v"], ["q", "v"]),
        (["a.q"], r"a\.q"),
        (["a.q", "b.v"], r"a\.q|b\.v"),
    ],
    ids=["every-q", "all", "one-q", "one-of-each"],
)
def test_target_modules_are_short_names_where_those_are_enough(chosen: list[str], expected: object) -> None:
    model, _ = tree({("a", "q"), ("b", "q"), ("a", "v"), ("b", "v")})
    assert target_modules(Census.of(model), chosen) == expected


def test_target_modules_see_through_adapters() -> None:
    model, _ = tree({("a", "q"), ("b", "q")})
    plain = target_modules(Census.of(model), ["a.q", "b.q"])
    randlora.inject(model, r=1)
    assert target_modules(Census.of(model), ["a.q", "b.q"]) == plain == ["q"]


NESTED = nn.ModuleDict({
    "body": nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.LayerNorm(2)),
    "head": nn.ModuleDict({"dense": nn.Linear(2, 2), "out": nn.Linear(2, 2, bias=False)}),
})
PARAMETERS = [fqn for fqn, _ in NESTED.named_parameters()]


@given(st.sets(st.sampled_from(PARAMETERS)))
def test_whole_modules_are_the_outermost_ones_trained_entirely(trained_names: set[str]) -> None:
    whole = {
        prefix
        for prefix, module in NESTED.named_modules()
        if prefix
        and list(module.parameters())
        and all(f"{prefix}.{name}" in trained_names for name, _ in module.named_parameters())
    }
    outermost = {prefix for prefix in whole if not any(prefix.startswith(f"{other}.") for other in whole)}
    assert set(whole_modules(Census.of(NESTED), trained_names)) == outermost


@pytest.mark.parametrize(
    ("train_also", "expected"),
    [(None, None), (["head"], ["head"]), (["head", "norm"], ["norm", "head"]), (["norm.bias"], None)],
    ids=["none", "one", "two", "a-bias"],
)
def test_modules_to_save_are_what_was_trained_entirely(
    train_also: list[str] | None, expected: list[str] | None, tmp_path: Path
) -> None:
    case = Case("body", Headed, {"targets": ["0", "2"]})
    assert saved_fields(tmp_path, case, train_also=train_also)["modules_to_save"] == expected

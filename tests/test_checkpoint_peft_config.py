"""``adapter_config.json``: PEFT's fields, names by which PEFT finds the same layers, and names of base models."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import nn

import randlora
from randlora.checkpoint.peft_config import base_model_name, target_modules
from randlora.errors import CheckpointError
from randlora.targets.census import Census
from tests import models
from tests.checkpoint_files import (
    CASES,
    CONFIG_FILE,
    LINEAR,
    Case,
    edit_fields,
    peft_directory,
    read_fields,
    trained,
)
from tests.kit import untouched


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
    text = (tmp_path / CONFIG_FILE).read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize(("name", "expected"), [("Linear", False), ("Conv1D", True), ("mixed-sizes", False)], ids=str)
def test_fan_in_fan_out_means_that_every_target_stores_its_weight_transposed(
    name: str, expected: bool, tmp_path: Path
) -> None:
    (case,) = [case for case in CASES if case.name == name]
    assert saved_fields(tmp_path, case)["fan_in_fan_out"] is expected


FOREIGN: dict[str, Any] = {
    "a_field_of_tomorrow": [1, {"x": None}],
    "auto_mapping": {"base_model_class": "Bert"},
    "bias": "lora_only",
}
FOREIGN |= {"base_model_name_or_path": "org/base", "init_weights": False, "layers_to_transform": [0]}
FOREIGN |= {"revision": "main", "task_type": "SEQ_CLS"}


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


def test_target_modules_are_short_names_where_those_are_enough_for_peft_to_find_no_others() -> None:
    model = nn.ModuleDict({name: nn.ModuleDict({"q": nn.Linear(2, 2), "v": nn.Linear(2, 2)}) for name in "ab"})
    model["x+"] = nn.ModuleDict({"aq": nn.Linear(2, 2), "0": nn.Linear(2, 2)})
    expected: dict[str, object] = {
        "a.q b.q": ["q"],
        "a.q b.q a.v b.v": ["q", "v"],
        "a.q": r"a\.q",
        "a.q b.v": r"a\.q|b\.v",
        "x+.0 x+.aq": ["0", "aq"],
        "a.q x+.0": r"a\.q|x\+\.0",
    }
    assert {names: target_modules(Census.of(model), names.split()) for names in expected} == expected


def test_modules_to_save_are_the_outermost_ones_that_were_trained_entirely(tmp_path: Path) -> None:
    head = nn.ModuleDict({"dense": nn.Linear(2, 2), "out": nn.Linear(2, 2, bias=False)})
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "head": head})
    for also, expected in {
        None: None,
        "head|body.1": ["body.1", "head"],
        r"head.out|body.1.bias": ["head.out"],
        r"head.dense.bias": None,
        r"head.*|body.0.bias": ["head"],
    }.items():
        randlora.inject(model, r=2, targets=["body.0"], train_also=also)
        randlora.save(model, tmp_path)
        randlora.eject(model)
        assert read_fields(tmp_path)["modules_to_save"] == expected


FIELD = "base_model_name_or_path"


class Named(nn.Module):
    """A model with transformers' note of where it came from."""

    def __init__(self, origin: str | None) -> None:
        super().__init__()
        self.config = type("Config", (), {"_name_or_path": origin})()
        self.layer = nn.Linear(6, 4)


def named(origin: str | None) -> Case:
    return Case("named", lambda: Named(origin))


def saved(directory: Path, origin: str | None) -> Path:
    randlora.save(trained(named(origin)), directory)
    return directory


SAME = [
    ("org/model", "org/model"),
    ("org/model", "Org/Model"),
    ("org/model", "/data/model"),
    ("org/model", "/data/model/"),
    ("org/model", "./model"),
    ("org/model", "model"),
    ("org/model", r"C:\data\model"),
    ("org/model", "/home/me/.cache/huggingface/hub/models--org--model/snapshots/0123456789"),
    ("gpt2", "/cache/models--gpt2/snapshots/0123456789/"),
    ("/data/model", "/mnt/model"),
]
OTHER = [
    ("org/model", "org/another"),
    ("org/model", "another/model"),
    ("org/model", "/data/another"),
    ("org/model", "/home/me/.cache/huggingface/hub/models--another--model/snapshots/0123456789"),
    ("/data/one", "/data/two"),
]


UNKNOWN = [(None, "org/model"), ("org/model", None), ("org/model", ""), (None, None)]


def test_a_load_into_the_same_model_or_one_of_no_name_says_nothing(tmp_path: Path) -> None:
    for one, other in (*SAME, *(pair[::-1] for pair in SAME), *UNKNOWN):
        assert randlora.load(named(other).build(), saved(tmp_path, one)).notes == (), (one, other)
    for written in ("", None):
        saved(tmp_path, "org/model")
        edit_fields(tmp_path, {FIELD: written})
        assert randlora.load(named("org/model").build(), tmp_path).notes == ()


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_a_load_into_another_model_warns_with_both_names_and_notes_it(one: str, other: str, tmp_path: Path) -> None:
    directory, model = saved(tmp_path, one), named(other).build()
    with warnings.catch_warnings(action="error"), untouched(model), pytest.raises(UserWarning, match="trained on"):
        randlora.load(model, directory)
    both = re.escape(f"trained on {one!r}, but this model is {other!r}")
    with pytest.warns(UserWarning, match=both) as caught:
        report = randlora.load(model, directory)
    (warning,) = caught
    assert report.notes == (str(warning.message),)
    assert warning.filename == __file__, "it points at the line that loads"


def test_the_name_written_is_the_models_unless_the_file_says_the_same() -> None:
    for own, written, name in (
        ("org/model", None, "org/model"),
        (None, "org/model", "org/model"),
        ("", "org/model", "org/model"),
        ("/data/model", "org/model", "org/model"),
        ("org/another", "org/model", "org/another"),
        (None, None, None),
        (None, "", None),
        (None, 7, None),
    ):
        assert base_model_name(Named(own), written) == name


def test_a_model_says_its_name_with_a_config_or_without(tmp_path: Path) -> None:
    models.llama().save_pretrained(tmp_path / "tiny-llama")  # type: ignore[operator]
    model = type(models.llama()).from_pretrained(tmp_path / "tiny-llama")  # type: ignore[attr-defined]
    randlora.inject(model, r=8)
    randlora.save(model, tmp_path / "adapter")
    assert read_fields(tmp_path / "adapter")[FIELD] == str(tmp_path / "tiny-llama")
    plain = trained(LINEAR)
    plain.name_or_path = "org/model"  # type: ignore[assignment]
    randlora.save(plain, tmp_path)
    assert read_fields(tmp_path)[FIELD] == "org/model"


def test_an_adapter_of_another_architecture_is_told_from_what_it_was_trained_on(tmp_path: Path) -> None:
    llama, gpt, fewer = models.LLAMA.build(), models.GPT2.build(), models.LLAMA.build()
    del fewer.model.layers[1]  # type: ignore[union-attr, operator]
    said = "fit the adapter, trained on LlamaForCausalLM, to this GPT2LMHeadModel, 4 problems:"
    randlora.inject(llama, r=4)
    with pytest.raises(CheckpointError, match=said):
        randlora.load(gpt, randlora.adapter_state(llama))
    for model, name in ((llama, "org/llama"), (gpt, "org/gpt"), (fewer, "org/llama")):
        model.config._name_or_path = name  # type: ignore[union-attr]
    randlora.save(llama, tmp_path / "adapter")
    gpt.save_pretrained(tmp_path / "gpt")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=r"on LlamaForCausalLM of org/llama, to this GPT2LMHeadModel of org/gpt"):
        randlora.load(gpt, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"trained on LlamaForCausalLM.*, to this GPT2LMHeadModel"):
        randlora.files.merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "gpt")
    with pytest.raises(CheckpointError, match="fit the adapter to this model, 2 problems:"):
        randlora.load(fewer, tmp_path / "adapter")


def test_saving_into_the_base_models_own_directory_warns(tmp_path: Path) -> None:
    base, apart = tmp_path / "base", tmp_path / "adapter"
    models.LLAMA.build().save_pretrained(base)  # type: ignore[operator]
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    randlora.inject(model, r=4)
    assert not [note for note in randlora.save(model, apart).notes if "base model" in note]
    expected = "contains the base model itself: .* save the adapter to a separate directory"
    with pytest.warns(UserWarning, match=expected) as caught:
        report = randlora.save(model, base)
    assert [warning.filename for warning in caught] == [__file__]
    assert str(caught[0].message) in report.notes

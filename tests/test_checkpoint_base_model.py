"""Base models' names: which are written, which are the same, and when a load says that they are not."""

import re
import warnings
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora.checkpoint.peft_config import base_model_name, is_same_model, repo_of
from randlora.errors import CheckpointError
from tests import models
from tests.checkpoint_files import Case, edit_fields, read_fields, trained
from tests.kit import fill, snapshot

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


@pytest.mark.parametrize(("one", "other"), SAME)
def test_names_that_may_mean_the_same_model_are_the_same(one: str, other: str) -> None:
    assert is_same_model(one, other)
    assert is_same_model(other, one)


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_names_that_mean_different_models_are_not(one: str, other: str) -> None:
    assert not is_same_model(one, other)
    assert not is_same_model(other, one)


@given(st.text(min_size=1), st.text(min_size=1))
def test_sameness_is_reflexive_and_symmetric(one: str, other: str) -> None:
    assert is_same_model(one, one)
    assert is_same_model(one, other) == is_same_model(other, one)


@pytest.mark.parametrize(("one", "other"), SAME)
def test_a_load_into_the_same_model_says_nothing(one: str, other: str, tmp_path: Path) -> None:
    assert randlora.load(named(other).build(), saved(tmp_path, one)).notes == ()


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_a_load_into_another_model_warns_with_both_names_and_notes_it(one: str, other: str, tmp_path: Path) -> None:
    directory, model = saved(tmp_path, one), named(other).build()
    both = re.escape(f"trained on {one!r}, and this model is {other!r}")
    with pytest.warns(UserWarning, match=both) as caught:
        report = randlora.load(model, directory)
    (warning,) = caught
    assert report.notes == (str(warning.message),)
    assert warning.filename == __file__, "it points at the line that loads"


@pytest.mark.parametrize(("one", "other"), [(None, "org/model"), ("org/model", None), ("org/model", ""), (None, None)])
def test_a_name_that_nobody_knows_is_no_mismatch(one: str | None, other: str | None, tmp_path: Path) -> None:
    assert randlora.load(named(other).build(), saved(tmp_path, one)).notes == ()


@pytest.mark.parametrize("written", ["", None], ids=str)
def test_a_field_without_a_name_is_no_mismatch(written: object, tmp_path: Path) -> None:
    directory = saved(tmp_path, "org/model")
    edit_fields(directory, {FIELD: written})
    assert randlora.load(named("org/model").build(), directory).notes == ()


def test_a_warning_that_is_an_error_leaves_the_model_alone(tmp_path: Path) -> None:
    directory, model = saved(tmp_path, "org/model"), named("org/another").build()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="trained on"):
            randlora.load(model, directory)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("own", "written", "name"),
    [
        ("org/model", None, "org/model"),
        (None, "org/model", "org/model"),
        ("", "org/model", "org/model"),
        ("/data/model", "org/model", "org/model"),
        ("org/another", "org/model", "org/another"),
        (None, None, None),
        (None, "", None),
        (None, 7, None),
    ],
    ids=["own", "file", "file-of-unnamed", "same", "other", "nobody", "empty", "no-name"],
)
def test_the_name_written_is_the_models_unless_the_file_says_the_same(
    own: str | None, written: object, name: str | None
) -> None:
    assert base_model_name(Named(own), written) == name


def test_an_adapter_of_pefts_without_a_name_gets_its_models(tmp_path: Path) -> None:
    directory, model = saved(tmp_path, "org/model"), named("org/model").build()
    edit_fields(directory, {FIELD: None})
    randlora.load(model, directory)
    randlora.save(model, directory)
    assert read_fields(directory)[FIELD] == "org/model"


def test_a_model_of_transformers_knows_where_it_was_loaded_from(tmp_path: Path) -> None:
    models.llama().save_pretrained(tmp_path / "tiny-llama")  # type: ignore[operator]
    model = type(models.llama()).from_pretrained(tmp_path / "tiny-llama")  # type: ignore[attr-defined]
    randlora.inject(model, r=8)
    randlora.save(fill(model, "default"), tmp_path / "adapter")
    assert read_fields(tmp_path / "adapter")[FIELD] == str(tmp_path / "tiny-llama")


def test_a_model_may_say_its_name_without_a_config(tmp_path: Path) -> None:
    model = trained(Case("plain", lambda: nn.Sequential(nn.Linear(6, 4))))
    model.name_or_path = "org/model"  # type: ignore[assignment]
    randlora.save(model, tmp_path)
    assert read_fields(tmp_path)[FIELD] == "org/model"


@pytest.mark.parametrize(
    ("name", "repo"),
    [
        ("org/model", "org/model"),
        ("/home/me/.cache/huggingface/hub/models--org--model/snapshots/0123", "org/model"),
        ("/data/model", None),
        ("here/model", None),
        ("model", None),
        (None, None),
    ],
)
def test_a_path_of_this_machine_is_no_repository(
    name: str | None, repo: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert repo_of(name) == repo


@pytest.mark.parametrize("is_named", [True, False])
def test_an_adapter_of_another_architecture_is_told_from_what_it_was_trained_on(
    tmp_path: Path, *, is_named: bool
) -> None:
    llama, gpt, fewer = models.LLAMA.build(), models.GPT2.build(), models.LLAMA.build()
    del fewer.model.layers[1]  # type: ignore[union-attr, operator]
    if is_named:
        llama.config._name_or_path, gpt.config._name_or_path = "org/llama", "org/gpt"  # type: ignore[union-attr]
        fewer.config._name_or_path = "org/llama"  # type: ignore[union-attr]
    theirs, ours = (" of org/llama", " of org/gpt") if is_named else ("", "")
    randlora.inject(llama, r=4)
    randlora.save(llama, tmp_path / "adapter")
    gpt.save_pretrained(tmp_path / "gpt")  # type: ignore[operator]
    said = f"fit the adapter, trained on LlamaForCausalLM{theirs}, to this GPT2LMHeadModel{ours}, 4 problems:"
    for source in (tmp_path / "adapter", randlora.adapter_state(llama)):
        with pytest.raises(CheckpointError, match=said):
            randlora.load(gpt, source)
    with pytest.raises(
        CheckpointError, match=r"fit the adapter, trained on LlamaForCausalLM.*, to this GPT2LMHeadModel"
    ):
        randlora.files.merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "gpt")
    with pytest.raises(CheckpointError, match="fit the adapter to this model, 2 problems:"):
        randlora.load(fewer, tmp_path / "adapter")


def test_saving_into_the_base_models_own_directory_warns(tmp_path: Path) -> None:
    base, apart = tmp_path / "base", tmp_path / "adapter"
    models.LLAMA.build().save_pretrained(base)  # type: ignore[operator]
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    randlora.inject(model, r=4)
    assert not [note for note in randlora.save(model, apart).notes if "base model" in note]
    with pytest.warns(UserWarning, match="has the base model itself: .* give the adapter a directory apart") as caught:
        report = randlora.save(model, base)
    assert [warning.filename for warning in caught] == [__file__]
    assert str(caught[0].message) in report.notes

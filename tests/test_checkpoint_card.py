"""What other programs read beside the tensors: the model card, PEFT's fields, and the names of base models in both."""

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import PeftModel
from torch import nn

import randlora
from randlora.checkpoint.peft_config import base_model_name, mismatch, target_modules
from randlora.checkpoint.save import task_of
from randlora.errors import CheckpointError, ConfigError
from randlora.targets.census import Census
from tests import models
from tests.checkpoint_files import (
    BASIS_B,
    CARD_FILE,
    CASES,
    CONFIG_FILE,
    HEADED,
    LINEAR,
    basis_of,
    edit_fields,
    edit_tensors,
    peft_directory,
    read_fields,
    trained,
)
from tests.kit import fill, untouched
from tests.peer import THEIR_WARNINGS, as_peft_draws, peft_draw

FIELD = "base_model_name_or_path"


class Named(nn.Module):
    """A model with transformers' note of where it came from."""

    def __init__(self, origin: str | None) -> None:
        super().__init__()
        self.config = type("Config", (), {"_name_or_path": origin})()
        self.layer = nn.Linear(6, 4)


def card_of(directory: Path) -> str:
    return (directory / CARD_FILE).read_text(encoding="utf-8")


def rows(directory: Path) -> dict[str, str]:
    """Read the table of a directory's card."""
    return dict(re.findall(r"^\| ([^|-][^|]*) \| (.*) \|$", card_of(directory), re.MULTILINE))


def test_the_card_says_what_the_report_of_inject_says_whatever_else_the_model_carries(tmp_path: Path) -> None:
    model, foreign = HEADED.build(), LINEAR.build()
    report = randlora.inject(model, r=2, alpha=7.5, seed=11, basis="block", blocks=(2, 2), **HEADED.options)
    notes = randlora.save(fill(model), tmp_path).notes
    assert rows(tmp_path) == {
        "r": "2",
        "alpha": "7.5",
        "bases": "block",
        "blocks": "(2, 2)",
        "stream of the bases": "portable",
        "seed of the bases": "11",
        "SHA-256 of the bases": f"`{basis_of(model).digest(9, 7)}`",
        "adapted layers": "2, called `0`, `2`",
        "trained parameters": f"{report.trainable_parameters} of {report.total_parameters} ({report.share:.2%})",
        "trained with the adapter": ", ".join(f"`{fqn}`" for fqn in report.train_also),
    }
    assert len(report.train_also) == 3
    alone = card_of(tmp_path)
    assert f"PEFT 0.21.2 does not load these files:\n\n- {notes[0]}\n" in alone
    randlora.inject(model, r=4, name="two")
    with randlora.merged(model):
        randlora.save(model, tmp_path, name="default")
    assert card_of(tmp_path) == alone
    edit_tensors(peft_directory(tmp_path / "peft"), {BASIS_B: torch.randn(6, 3, 2)})
    randlora.load(foreign, tmp_path / "peft")
    randlora.save(foreign, tmp_path / "ours", bases="stored")
    assert rows(tmp_path / "ours")["seed of the bases"] == "none reproduces them: they are in the file"
    assert "PeftModel" in card_of(tmp_path / "ours")


def test_the_hubs_own_library_reads_the_front_matter_which_has_no_path_of_this_machine(tmp_path: Path) -> None:
    model: Any = models.llama()
    randlora.inject(model, r=8)
    cached = "/home/me/.cache/huggingface/hub/models--org--tiny-llama/snapshots/0123"
    names = dict.fromkeys(["org/tiny: llama\"'", "model", str(tmp_path / "base")])
    for name, base in {**names, "org/tiny-llama": "org/tiny-llama", cached: "org/tiny-llama"}.items():
        model.config._name_or_path = name
        twin = models.llama()
        randlora.save(model, tmp_path / "one")
        randlora.load(twin, tmp_path / "one")
        randlora.save(twin, tmp_path / "two")
        for directory in (tmp_path / "one", tmp_path / "two"):
            data = ModelCard.load(directory / CARD_FILE).data
            assert (data.base_model, data.library_name, data.tags) == (base, "randlora", ["randlora"])
            assert str(tmp_path) not in card_of(directory)
    assert (data.to_dict()["base_model_relation"], data.pipeline_tag) == ("adapter", "text-generation")
    assert "# RandLoRA adapter of org/tiny-llama\n" in card_of(directory)
    bart = type("BartForConditionalGeneration", (nn.Module,), {"__module__": "transformers.models.bart"})()
    built = [models.gpt2(), models.bert(), models.vit(), LINEAR.build(), bart]  # the last may translate or summarize
    assert [*map(task_of, built)] == ["text-generation", "text-classification", "image-classification", None, None]


def test_results_are_a_table_until_a_save_without_them_which_says_so(tmp_path: Path) -> None:
    model = trained(LINEAR)
    before = randlora.save(model, tmp_path).notes
    results: Any = {"accuracy": 0.81, "loss |a|": 2, "F1": "0.79 ±\n0.01", "R": np.float32(0.3)}
    assert randlora.save(model, tmp_path, results=results).notes == before
    table = ["| metric | value |", "|---|---|", "| accuracy | 0.81 |", r"| loss \|a\| | 2 |", "| F1 | 0.79 ± 0.01 |"]
    assert "\n".join(["## Results", "", *table, "| R | 0.3 |", ""]) in card_of(tmp_path)
    (note,) = set(randlora.save(model, tmp_path).notes).difference(before)
    assert note.endswith("pass results= to save for this one")
    assert "Results" not in card_of(tmp_path)
    assert randlora.save(model, tmp_path).notes == before
    with pytest.raises(ConfigError, match=r"results\['accuracy'\] must be a finite number"):
        randlora.save(model, tmp_path, results={"accuracy": float("nan")})
    (tmp_path / CARD_FILE).write_text("# Mine\n")
    assert "not a generated model card" in randlora.save(model, tmp_path, results={"accuracy": 0.81}).notes[-1]
    assert card_of(tmp_path) == "# Mine\n"


@as_peft_draws
@pytest.mark.filterwarnings(*(mark.args[0] for mark in THEIR_WARNINGS))
@pytest.mark.parametrize("options", [{}, {"basis": "sparse"}], ids=str)
def test_the_cards_snippets_load_the_adapter(options: dict[str, Any], tmp_path: Path) -> None:
    model = models.llama()
    randlora.inject(model, r=8, stream=peft_draw(options.get("basis", "dense")), **options)
    randlora.save(fill(model), tmp_path)
    expected = models.outputs(model, models.tokens())
    snippets = re.findall(r"^```python\n(.*?)^```$", card_of(tmp_path), re.MULTILINE | re.DOTALL)
    spaces: list[dict[str, Any]] = [{"model": models.llama()} for _ in snippets]
    for snippet, space in zip(snippets, spaces, strict=True):
        exec(snippet.replace("path/to/this/directory", str(tmp_path)), space)
    ours, theirs = (space["model"].eval() for space in spaces)
    assert isinstance(theirs, PeftModel)
    assert torch.equal(models.outputs(ours, models.tokens()), expected)
    torch.testing.assert_close(models.outputs(theirs, models.tokens()), expected, rtol=1e-4, atol=1e-4)


def test_a_card_that_somebody_wrote_is_left_alone(tmp_path: Path) -> None:
    """As is what is no file, and a card of ours once its mark is gone."""
    for r in (2, 3):
        randlora.save(trained(LINEAR, r=r), tmp_path)
        assert rows(tmp_path)["r"] == str(r)
    claimed = re.sub(r"<!-- Written by randlora.*\n", "", card_of(tmp_path))
    for text in ("# Mine\n", "", "caf\N{LATIN SMALL LETTER E WITH ACUTE}", claimed):
        (tmp_path / CARD_FILE).write_bytes(text.encode("latin-1"))
        report = randlora.save(trained(LINEAR, r=4), tmp_path)
        assert (tmp_path / CARD_FILE).read_bytes() == text.encode("latin-1")
        assert report.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir() if path.name != CARD_FILE)
    (tmp_path / "directory" / CARD_FILE).mkdir(parents=True)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / CARD_FILE).symlink_to("nowhere")
    for name in ("directory", "link"):
        randlora.save(trained(LINEAR), tmp_path / name)
    assert list((tmp_path / "directory" / CARD_FILE).iterdir()) == []
    assert os.readlink(tmp_path / "link" / CARD_FILE) == "nowhere"  # noqa: PTH115


# Fields


def test_the_json_is_sorted_and_says_that_weights_are_transposed_where_all_are(tmp_path: Path) -> None:
    for case in CASES:
        randlora.save(trained(case), tmp_path)
        assert read_fields(tmp_path)["fan_in_fan_out"] is (case.name == "Conv1D")
    text = (tmp_path / CONFIG_FILE).read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


FOREIGN: dict[str, Any] = {"a_field_of_tomorrow": [1, {"x": None}], "auto_mapping": {"base_model_class": "Bert"}}
FOREIGN |= {"bias": "lora_only", "init_weights": False, "layers_to_transform": [0], "revision": "main"}
FOREIGN |= {"task_type": "SEQ_CLS", FIELD: "org/base"}


def test_fields_that_mean_nothing_here_are_written_back_and_those_of_the_arithmetic_anew(tmp_path: Path) -> None:
    directory = peft_directory(tmp_path / "peft", r=4)
    before = read_fields(directory)
    edit_fields(directory, {**FOREIGN, "target_modules": "nonsense", "inference_mode": False, "peft_version": "0.15.0"})
    model, again = LINEAR.build(), LINEAR.build()
    report = randlora.load(model, directory)
    assert report.notes == ("fields kept but not understood: a_field_of_tomorrow",)
    randlora.save(model, tmp_path / "ours", bases="stored")
    randlora.load(again, tmp_path / "ours")
    randlora.save(again, tmp_path / "again", bases="stored")
    assert read_fields(tmp_path / "again") == read_fields(tmp_path / "ours") == {**before, **FOREIGN}


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


# The base model

CACHED = "/home/me/.cache/huggingface/hub/models--{}--model/snapshots/0123456789"
SAME = [
    "Org/Model",
    "/data/model",
    "/data/model/",
    "./model",
    "model",
    r"C:\data\model",
    "",
    None,
    CACHED.format("org"),
]
OTHER = ["org/another", "another/model", "/data/another", CACHED.format("another")]


def test_a_load_into_another_model_warns_with_both_names_and_notes_it(tmp_path: Path) -> None:
    pairs = [("org/model", name) for name in SAME] + [(None, None), ("/data/model", "/mnt/model")]
    pairs += [("gpt2", "/cache/models--gpt2/snapshots/0123456789/")]
    for one, other in pairs:
        assert (mismatch(Named(one), other), mismatch(Named(other), one)) == (None, None), (one, other)
    randlora.inject(adapted := Named("org/model"), r=2)
    randlora.save(adapted, tmp_path)
    assert randlora.load(Named("/data/model"), tmp_path).notes == ()
    for other in OTHER:
        model = Named(other)
        with warnings.catch_warnings(action="error"), untouched(model), pytest.raises(UserWarning, match="trained on"):
            randlora.load(model, tmp_path)
        both = re.escape(f"trained on 'org/model', but this model is {other!r}")
        with pytest.warns(UserWarning, match=both) as caught:
            report = randlora.load(model, tmp_path)
        (warning,) = caught
        assert report.notes == (str(warning.message),)
        assert warning.filename == __file__, "it points at the line that loads"


def test_the_name_written_is_the_models_unless_the_file_says_the_same(tmp_path: Path) -> None:
    names: tuple[tuple[str | None, ...], ...] = (("org/model", None), ("org/another", "org/model"))
    assert [base_model_name(Named(own), written) for own, written in names] == ["org/model", "org/another"]
    assert {base_model_name(Named(own), "org/model") for own in (None, "", "/data/model")} == {"org/model"}
    assert {base_model_name(Named(None), written) for written in ("", 7)} == {None}
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
    assert read_fields(apart)[FIELD] == str(base)
    expected = "contains the base model itself: .* save the adapter to a separate directory"
    with pytest.warns(UserWarning, match=expected) as caught:
        report = randlora.save(model, base)
    assert [warning.filename for warning in caught] == [__file__]
    assert str(caught[0].message) in report.notes

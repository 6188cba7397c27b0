"""The model card: what it says, that the Hub and PEFT can use it, and that nobody's own text is lost to it."""

import os
import re
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
from randlora.errors import ConfigError
from tests import models
from tests.checkpoint_files import (
    CARD_FILE,
    HEADED,
    LINEAR,
    Case,
    Headed,
    basis_of,
    edit_tensors,
    peft_directory,
    trained,
)
from tests.peer import THEIR_WARNINGS, as_peft_draws, peft_draw


def card_of(directory: Path) -> str:
    return (directory / CARD_FILE).read_text(encoding="utf-8")


def rows(card: str) -> dict[str, str]:
    """Read the card's table."""
    return dict(re.findall(r"^\| ([^|-][^|]*) \| (.*) \|$", card, re.MULTILINE))


def code(card: str) -> list[str]:
    """Find the card's snippets."""
    return re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)


def test_the_card_says_what_the_report_of_inject_says(tmp_path: Path) -> None:
    model = HEADED.build()
    report = randlora.inject(model, r=2, alpha=7.5, seed=11, basis="block", blocks=(2, 2), **HEADED.options)
    randlora.save(model, tmp_path)
    trained_beside = ", ".join(f"`{fqn}`" for fqn in report.train_also)
    assert rows(card_of(tmp_path)) == {
        "r": "2",
        "alpha": "7.5",
        "bases": "block",
        "blocks": "(2, 2)",
        "stream of the bases": "portable",
        "seed of the bases": "11",
        "SHA-256 of the bases": f"`{basis_of(model).digest(9, 7)}`",
        "adapted layers": "2, called `0`, `2`",
        "trained parameters": f"{report.trainable_parameters} of {report.total_parameters} ({report.share:.2%})",
        "trained with the adapter": trained_beside,
    }
    assert trained_beside.count("`") == 6


def test_the_cards_figures_are_the_same_whatever_else_the_model_carries(tmp_path: Path) -> None:
    model = trained(HEADED, name="one")
    randlora.save(model, tmp_path / "alone")
    randlora.inject(model, r=4, name="two")
    with randlora.merged(model):
        randlora.save(model, tmp_path / "beside", name="one")
    assert card_of(tmp_path / "beside") == card_of(tmp_path / "alone")


def test_the_hubs_own_library_reads_the_front_matter(tmp_path: Path) -> None:
    model = models.llama()
    model.config._name_or_path = "org/tiny: llama\"'"  # type: ignore[union-attr]
    randlora.inject(model, r=8)
    randlora.save(model, tmp_path / "odd")
    model.config._name_or_path = "org/tiny-llama"  # type: ignore[union-attr]
    randlora.save(model, tmp_path / "plain")
    data = ModelCard.load(tmp_path / "plain" / CARD_FILE).data
    assert (data.base_model, data.library_name, data.tags) == ("org/tiny-llama", "randlora", ["randlora"])
    assert data.pipeline_tag == "text-generation"
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert "# RandLoRA adapter of org/tiny-llama\n" in card_of(tmp_path / "plain")
    assert ModelCard.load(tmp_path / "odd" / CARD_FILE).data.base_model is None


TASKS: dict[str, tuple[Any, str | None]] = {
    "a decoder": (models.llama, "text-generation"),
    "one with an older name": (models.gpt2, "text-generation"),
    "a classifier of texts": (models.bert, "text-classification"),
    "a classifier of images": (models.vit, "image-classification"),
    "an encoder alone": (lambda: models.bert().bert, None),
    "a model of no library": (LINEAR.build, None),
    "one of tables": (lambda: _tiny("Tapas", "TapasForQuestionAnswering"), None),
    "one of which the class does not tell": (lambda: _tiny("Flaubert", "FlaubertWithLMHeadModel"), None),
    "one of documents": (lambda: _tiny("LayoutLM", "LayoutLMForQuestionAnswering"), None),
    "one of audio": (lambda: _tiny("MusicgenDecoder", "MusicgenForCausalLM"), None),
    "one that may translate or summarize": (lambda: _tiny("Bart", "BartForConditionalGeneration"), None),
}


def _tiny(config: str, name: str) -> nn.Module:
    sizes = {
        "hidden_size": 16,
        "d_model": 16,
        "emb_dim": 16,
        "n_layers": 1,
        "n_heads": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 20,
    }
    sizes |= {f"{side}_{key}": 2 for side in ("encoder", "decoder") for key in ("layers", "attention_heads")}
    made = getattr(transformers, f"{config}Config")(num_hidden_layers=1, pad_token_id=1, **sizes)
    model: nn.Module = getattr(transformers, name)(made)
    return model


@pytest.mark.parametrize(("build", "task"), TASKS.values(), ids=TASKS)
def test_the_hub_shows_the_task_where_the_models_class_tells_it(build: Any, task: str | None, tmp_path: Path) -> None:
    model = build()
    randlora.inject(model, r=2, targets="all-linear")
    randlora.save(model, tmp_path)
    assert ModelCard.load(tmp_path / CARD_FILE).data.pipeline_tag == task


def test_results_are_a_table_until_a_save_without_them_which_says_so(tmp_path: Path) -> None:
    model = trained(LINEAR)
    before = randlora.save(model, tmp_path).notes
    found = randlora.save(
        model,
        tmp_path,
        results={"accuracy": 0.81, "loss |a|": 2, "F1": "0.79 ±\n0.01", "R": np.float32(0.3)},  # type: ignore[dict-item]
    )
    rows = ["| metric | value |", "|---|---|", "| accuracy | 0.81 |", r"| loss \|a\| | 2 |", "| F1 | 0.79 ± 0.01 |"]
    table = "\n".join(["## Results", "", *rows, "| R | 0.3 |", ""])
    assert table in card_of(tmp_path)
    assert found.notes == before
    (note,) = set(randlora.save(model, tmp_path).notes).difference(before)
    assert note.endswith("pass results= to save for this one")
    assert "Results" not in card_of(tmp_path)
    assert randlora.save(model, tmp_path).notes == before


def test_results_that_cannot_be_written_are_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"results\['accuracy'\] must be a finite number"):
        randlora.save(trained(LINEAR), tmp_path, results={"accuracy": float("nan")})
    (tmp_path / CARD_FILE).write_text("# Mine\n")
    report = randlora.save(trained(LINEAR), tmp_path, results={"accuracy": 0.81})
    assert "not a generated model card" in report.notes[-1]
    assert card_of(tmp_path) == "# Mine\n"


def test_a_path_of_this_machine_is_not_in_the_card(tmp_path: Path) -> None:
    model = models.llama()
    model.config._name_or_path = str(tmp_path / "base")  # type: ignore[union-attr]
    randlora.inject(model, r=8)
    randlora.save(model, tmp_path / "one")
    twin = models.llama()
    randlora.load(twin, tmp_path / "one")
    randlora.save(twin, tmp_path / "two")
    for directory in ("one", "two"):
        assert str(tmp_path) not in card_of(tmp_path / directory)
        assert "base_model" not in card_of(tmp_path / directory)


THEIRS: dict[str, dict[str, Any]] = {"torch": {}, "sparse": {"basis": "sparse"}}


@as_peft_draws
@pytest.mark.parametrize("options", THEIRS.values(), ids=THEIRS)
def test_the_cards_snippets_load_the_adapter(options: dict[str, Any], tmp_path: Path) -> None:
    trained_model = models.llama()
    randlora.inject(trained_model, r=8, stream=peft_draw(options.get("basis", "dense")), **options)
    for parameter in randlora.trainable_parameters(trained_model):
        torch.nn.init.normal_(parameter, std=0.05)
    randlora.save(trained_model, tmp_path)
    expected = models.outputs(trained_model, models.tokens())
    ours, theirs = code(card_of(tmp_path))
    found = {}
    for name, snippet in {"ours": ours, "theirs": theirs}.items():
        space: dict[str, Any] = {"model": models.llama()}
        exec(snippet.replace("path/to/this/directory", str(tmp_path)), space)
        found[name] = models.outputs(space["model"].eval(), models.tokens())
    assert isinstance(space["model"], PeftModel)
    assert torch.equal(found["ours"], expected)
    torch.testing.assert_close(found["theirs"], expected, rtol=1e-4, atol=1e-4)


test_the_cards_snippets_load_the_adapter.pytestmark += THEIR_WARNINGS


def test_a_card_shows_no_way_into_peft_where_there_is_none(tmp_path: Path) -> None:
    report = randlora.save(trained(LINEAR, stream="portable"), tmp_path)
    card = card_of(tmp_path)
    assert "PeftModel" not in card
    assert all(f"- {note}\n" in card for note in report.notes)
    assert len(report.notes) == 1
    randlora.save(trained(LINEAR, stream="portable"), tmp_path, bases="stored")
    assert "PeftModel" in card_of(tmp_path)


def test_bases_of_no_seed_are_not_said_to_have_one(tmp_path: Path) -> None:
    directory = peft_directory(tmp_path / "peft")
    edit_tensors(directory, {"base_model.randlora_B": torch.randn(6, 3, 2)})
    model = LINEAR.build()
    randlora.load(model, directory)
    randlora.save(model, tmp_path / "ours", bases="stored")
    assert rows(card_of(tmp_path / "ours"))["seed of the bases"] == "none reproduces them: they are in the file"


@pytest.mark.parametrize("text", ["# Mine\n", "", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"])
def test_a_card_that_somebody_wrote_is_left_alone(text: str, tmp_path: Path) -> None:
    (tmp_path / CARD_FILE).write_bytes(text.encode("latin-1"))
    report = randlora.save(trained(LINEAR), tmp_path)
    assert (tmp_path / CARD_FILE).read_bytes() == text.encode("latin-1")
    assert report.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir() if path.name != CARD_FILE)


def test_a_card_of_ours_is_written_anew_until_somebody_claims_it(tmp_path: Path) -> None:
    randlora.save(trained(LINEAR, r=2), tmp_path)
    randlora.save(trained(LINEAR, r=3), tmp_path)
    assert rows(card_of(tmp_path))["r"] == "3"
    claimed = re.sub(r"<!-- Written by randlora.*\n", "", card_of(tmp_path))
    (tmp_path / CARD_FILE).write_text(claimed, encoding="utf-8")
    randlora.save(trained(LINEAR, r=4), tmp_path)
    assert card_of(tmp_path) == claimed


def test_a_directory_or_a_dangling_link_in_the_cards_place_is_left_alone(tmp_path: Path) -> None:
    for name in ("directory", "link"):
        (tmp_path / name).mkdir()
    (tmp_path / "directory" / CARD_FILE).mkdir()
    (tmp_path / "link" / CARD_FILE).symlink_to("nowhere")
    for name in ("directory", "link"):
        randlora.save(trained(LINEAR), tmp_path / name)
    assert list((tmp_path / "directory" / CARD_FILE).iterdir()) == []
    assert os.readlink(tmp_path / "link" / CARD_FILE) == "nowhere"  # noqa: PTH115


def test_a_failed_save_leaves_the_old_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    randlora.save(trained(LINEAR), tmp_path)
    before = card_of(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError("the disk refuses")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="the disk refuses"):
        randlora.save(trained(Case("body", Headed, {"targets": ["0"]})), tmp_path)
    assert card_of(tmp_path) == before

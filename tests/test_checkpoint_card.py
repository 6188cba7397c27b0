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
from tests.checkpoint_files import BASIS_B, CARD_FILE, HEADED, LINEAR, basis_of, edit_tensors, peft_directory, trained
from tests.kit import fill
from tests.peer import THEIR_WARNINGS, as_peft_draws, peft_draw


def card_of(directory: Path) -> str:
    return (directory / CARD_FILE).read_text(encoding="utf-8")


def rows(directory: Path) -> dict[str, str]:
    """Read the table of a directory's card."""
    return dict(re.findall(r"^\| ([^|-][^|]*) \| (.*) \|$", card_of(directory), re.MULTILINE))


def test_the_card_says_what_the_report_of_inject_says_whatever_else_the_model_carries(tmp_path: Path) -> None:
    model = HEADED.build()
    report = randlora.inject(model, r=2, alpha=7.5, seed=11, basis="block", blocks=(2, 2), **HEADED.options)
    randlora.save(model, tmp_path)
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
    randlora.inject(model, r=4, name="two")
    with randlora.merged(model):
        randlora.save(model, tmp_path, name="default")
    assert card_of(tmp_path) == alone
    edit_tensors(peft_directory(tmp_path / "peft"), {BASIS_B: torch.randn(6, 3, 2)})
    foreign = LINEAR.build()
    randlora.load(foreign, tmp_path / "peft")
    randlora.save(foreign, tmp_path / "ours", bases="stored")
    assert rows(tmp_path / "ours")["seed of the bases"] == "none reproduces them: they are in the file"


def test_the_hubs_own_library_reads_the_front_matter(tmp_path: Path) -> None:
    model = models.llama()
    randlora.inject(model, r=8)
    cached = "/home/me/.cache/huggingface/hub/models--org--tiny-llama/snapshots/0123"
    names = {"org/tiny: llama\"'": None, "model": None, "org/tiny-llama": "org/tiny-llama", cached: "org/tiny-llama"}
    for name, base in names.items():
        model.config._name_or_path = name  # type: ignore[union-attr]
        randlora.save(model, tmp_path)
        data = ModelCard.load(tmp_path / CARD_FILE).data
        assert (data.base_model, data.library_name, data.tags) == (base, "randlora", ["randlora"])
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert "# RandLoRA adapter of org/tiny-llama\n" in card_of(tmp_path)


def bart() -> nn.Module:
    sides = {f"{side}_{key}": 2 for side in ("encoder", "decoder") for key in ("layers", "attention_heads")}
    config = transformers.BartConfig(d_model=16, vocab_size=20, **sides)
    model: nn.Module = transformers.BartForConditionalGeneration(config)
    return model


TASKS: dict[str, tuple[Any, str | None]] = {
    "a decoder": (models.llama, "text-generation"),
    "one with an older name": (models.gpt2, "text-generation"),
    "a classifier of texts": (models.bert, "text-classification"),
    "a classifier of images": (models.vit, "image-classification"),
    "a model of no library": (LINEAR.build, None),
    "one that may translate or summarize": (bart, None),
}


@pytest.mark.parametrize(("build", "task"), TASKS.values(), ids=TASKS)
def test_the_hub_shows_the_task_where_the_models_class_tells_it(build: Any, task: str | None, tmp_path: Path) -> None:
    model = build()
    randlora.inject(model, r=2, targets="all-linear")
    randlora.save(model, tmp_path)
    assert ModelCard.load(tmp_path / CARD_FILE).data.pipeline_tag == task


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


def test_a_path_of_this_machine_is_not_in_the_card(tmp_path: Path) -> None:
    model, twin = models.llama(), models.llama()
    model.config._name_or_path = str(tmp_path / "base")  # type: ignore[union-attr]
    randlora.inject(model, r=8)
    randlora.save(model, tmp_path / "one")
    randlora.load(twin, tmp_path / "one")
    randlora.save(twin, tmp_path / "two")
    for directory in ("one", "two"):
        assert str(tmp_path) not in card_of(tmp_path / directory)
        assert "base_model" not in card_of(tmp_path / directory)


@as_peft_draws
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


test_the_cards_snippets_load_the_adapter.pytestmark += THEIR_WARNINGS


def test_a_card_shows_no_way_into_peft_where_there_is_none(tmp_path: Path) -> None:
    report = randlora.save(trained(LINEAR, stream="portable"), tmp_path)
    assert "PeftModel" not in card_of(tmp_path)
    assert all(f"- {note}\n" in card_of(tmp_path) for note in report.notes)
    assert len(report.notes) == 1
    randlora.save(trained(LINEAR, stream="portable"), tmp_path, bases="stored")
    assert "PeftModel" in card_of(tmp_path)


def test_a_card_that_somebody_wrote_is_left_alone(tmp_path: Path) -> None:
    """As is what is no file, and a card of ours once its mark is gone."""
    for text in ("# Mine\n", "", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"):
        (tmp_path / CARD_FILE).write_bytes(text.encode("latin-1"))
        report = randlora.save(trained(LINEAR), tmp_path)
        assert (tmp_path / CARD_FILE).read_bytes() == text.encode("latin-1")
        assert report.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir() if path.name != CARD_FILE)
    (tmp_path / CARD_FILE).unlink()
    for r in (2, 3):
        randlora.save(trained(LINEAR, r=r), tmp_path)
        assert rows(tmp_path)["r"] == str(r)
    claimed = re.sub(r"<!-- Written by randlora.*\n", "", card_of(tmp_path))
    (tmp_path / CARD_FILE).write_text(claimed, encoding="utf-8")
    randlora.save(trained(LINEAR, r=4), tmp_path)
    assert card_of(tmp_path) == claimed
    (tmp_path / "directory" / CARD_FILE).mkdir(parents=True)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / CARD_FILE).symlink_to("nowhere")
    for name in ("directory", "link"):
        randlora.save(trained(LINEAR), tmp_path / name)
    assert list((tmp_path / "directory" / CARD_FILE).iterdir()) == []
    assert os.readlink(tmp_path / "link" / CARD_FILE) == "nowhere"  # noqa: PTH115

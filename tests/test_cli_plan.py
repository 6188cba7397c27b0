"""`randlora plan` prints what `randlora.files.plan` returns, with the options that it is given."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

import randlora
from randlora.__main__ import main
from randlora.cli.app import app
from randlora.cli.output import plain
from randlora.config import OPTIONS
from randlora.errors import on_command_line
from tests.model_directories import save_model
from tests.models import LLAMA


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(LLAMA, tmp_path)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], {"r": 32}),
        (["--r", "4", "--targets", "q_proj", "--targets", "up_proj"], {"r": 4, "targets": ["q_proj", "up_proj"]}),
        (
            ["--targets", "q_proj,up_proj", "--targets", "v_proj", "--train-also", "norm,embed_tokens"],
            {"targets": ["q_proj", "up_proj", "v_proj"], "train_also": ["norm", "embed_tokens"]},
        ),
        (["--targets", "all-linear", "--exclude", "mlp"], {"r": 32, "targets": "all-linear", "exclude": ["mlp"]}),
        (["--targets", r".*\.0\..*_proj"], {"r": 32, "targets": r".*\.0\..*_proj"}),
        (["--train-also", "norm", "--alpha", "3", "--seed", "7"], {"train_also": ["norm"], "alpha": 3.0, "seed": 7}),
        (
            ["--dropout", "0.5", "--init", "gamma", "--experts", "shared"],
            {"dropout": 0.5, "init": "gamma", "experts": "shared"},
        ),
        (["--r", "8", "--basis", "block", "--blocks", "4", "8"], {"r": 8, "basis": "block", "blocks": (4, 8)}),
        (
            ["--class", "AutoModelForSequenceClassification", "--num-labels", "3", "--train-also", "score"],
            {"model_class": "AutoModelForSequenceClassification", "num_labels": 3, "train_also": ["score"]},
        ),
        (["--basis", "sparse", "--stream", "portable"], {"basis": "sparse", "stream": "portable"}),
        (
            ["--r", "q_proj=16", "--r", ".*=8", "--alpha", "(?=model).*=2.5"],
            {"r": {"q_proj": 16, ".*": 8}, "alpha": {"(?=model).*": 2.5}},
        ),
    ],
    ids=["default", "names", "commas", "exclude", "regex", "beside", "start", "block", "class", "stream", "by-pattern"],
)
def test_the_options_are_those_of_the_library(
    words: list[str], options: dict[str, Any], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with on_command_line():
        expected = randlora.files.plan(model, **{"r": 32, **options})
        text = str(expected)
    assert main(["plan", str(model), *words]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{text}\n")
    assert "optimizer, 2 numbers for each" in shown.out
    assert main(["plan", str(model), *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in plain(expected)} == plain(expected)
    assert found["share"] == expected.share
    parts = ("weights", "parameters", "gradients", "optimizer", "bases")  # all that there is for one device
    assert found["training_memory"]["total"] == sum(found["training_memory"][part] for part in parts)


def test_every_option_of_an_adapter_is_one_of_the_command() -> None:
    group = typer.main.get_command(app)
    options = {parameter.name for parameter in group.commands["plan"].params}  # type: ignore[attr-defined]
    assert {*OPTIONS, "like_lora", "init"} <= options


def test_an_alpha_of_zero_is_not_taken_for_none(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), "--alpha", "0"]) == 2
    assert "alpha=0 must be positive" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--r", "16", "--r", "q_proj=8"], "--r must be NAME=VALUE each time, got 16, q_proj=8"),
        (["--r", "q_proj=8", "--r", "q_proj=4"], "--r is given twice for one name"),
        (["--r", "q_proj=2.5"], "--r must be a number or NAME=NUMBER, got '2.5'"),
        (["--alpha", "much"], "--alpha must be a number or NAME=NUMBER, got 'much'"),
        (["--tp-plan", "colwise"], "--tp-plan must be NAME=VALUE each time, got colwise"),
        (["--targets", "q_proj", "--targets", ".*v.*"], "--targets takes names or one regex, got q_proj, .*v.*"),
    ],
    ids=["mixed", "twice", "fraction", "word", "no-name", "regexes"],
)
def test_values_that_cannot_be_read(
    words: list[str], said: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(model), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_default_that_adapts_next_to_nothing_is_told_in_the_report(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("randlora.targets.left_out.LITTLE", 1.1)  # as if it were next to nothing
    with on_command_line(), pytest.warns(UserWarning, match="the default adapts only") as caught:
        report = randlora.files.plan(model)
    assert [warning.filename for warning in caught] == [__file__]
    assert main(["plan", str(model)]) == 0
    shown = capsys.readouterr()
    assert f"warning: {report.warning}" in " ".join(shown.out.split())
    assert "UserWarning" not in shown.err


def test_what_is_left_out_is_printed_and_in_the_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = randlora.files.plan(model)
    assert expected.left_out
    assert main(["plan", str(model)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    with on_command_line():
        assert all(str(group) in shown for group in expected.left_out)
    assert main(["plan", str(model), "--targets", "all", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    everything = randlora.files.plan(model, targets="all")
    assert found["left_out"] == plain(everything.left_out)
    assert found["rule"] == everything.rule


def test_the_setup_is_that_of_the_library(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--devices", "8", "--strategy", "tp", "--tokens", "100", "--dtype", "bfloat16", "--checkpointing"]
    words += ["--optimizer-states", "1", "--tp-plan", "*.q_proj=colwise", "--tp-plan", "*.v_proj=rowwise"]
    setup: dict[str, Any] = {"devices": 8, "strategy": "tp", "tokens": 100, "dtype": torch.bfloat16}
    setup["tp_plan"] = {"*.q_proj": "colwise", "*.v_proj": "rowwise"}
    with on_command_line():
        expected = randlora.files.training_memory(model, checkpointing=True, optimizer_states=1, **setup)
        text = str(expected)
    assert main(["plan", str(model), *words]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith(f"\n\n{text}\n")
    assert main(["plan", str(model), *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["training_memory"]
    assert found == plain(expected)
    assert found["total"] == expected.total

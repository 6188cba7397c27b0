"""`randlora plan` prints what `randlora.files.plan` returns, with the options that it is given."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import randlora
from randlora.__main__ import main
from randlora.cli.plan import plan
from randlora.cli.shared import in_options, plain
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
        (["--targets-regex", r".*\.0\..*_proj"], {"r": 32, "targets": r".*\.0\..*_proj"}),
        (["--train-also", "norm", "--alpha", "3", "--seed", "7"], {"train_also": ["norm"], "alpha": 3.0, "seed": 7}),
        (
            ["--dropout", "0.5", "--init", "gamma", "--experts", "shared"],
            {"dropout": 0.5, "init": "gamma", "experts": "shared"},
        ),
        (["--r", "8", "--basis", "block", "--blocks", "4", "8"], {"r": 8, "basis": "block", "blocks": (4, 8)}),
        (["--basis", "sparse", "--stream", "portable"], {"basis": "sparse", "stream": "portable"}),
        (
            ["--r", "q_proj=16", "--r", ".*=8", "--alpha", "(?=model).*=2.5"],
            {"r": {"q_proj": 16, ".*": 8}, "alpha": {"(?=model).*": 2.5}},
        ),
    ],
    ids=["default", "names", "commas", "exclude", "regex", "beside", "start", "block", "stream", "by-pattern"],
)
def test_the_options_are_those_of_the_library(
    words: list[str], options: dict[str, Any], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = randlora.files.plan(model, **{"r": 32, **options})
    assert main(["plan", str(model), *words]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{in_options(str(expected))}\n")
    assert "optimizer, 2 numbers for each" in shown.out
    assert main(["plan", str(model), *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in plain(expected)} == plain(expected)
    assert found["share"] == expected.share
    parts = ("weights", "parameters", "gradients", "optimizer", "bases")  # all that there is for one device
    assert found["training_memory"]["total"] == sum(found["training_memory"][part] for part in parts)


def test_every_option_of_an_adapter_is_one_of_the_command() -> None:
    others = {"model", "config", "name", "active", "trainable", "save_pretrained"}
    assert inspect.signature(randlora.inject).parameters.keys() - others <= inspect.signature(plan).parameters.keys()


def test_an_alpha_of_zero_is_not_taken_for_none(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), "--alpha", "0"]) == 1
    assert "alpha=0 must be positive" in capsys.readouterr().err.replace("--alpha 0", "alpha=0")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--r", "16", "--r", "q_proj=8"], "expected PATTERN=NUMBER each time"),
        (["--r", "q_proj=8", "--r", "q_proj=4"], "twice for one pattern"),
        (["--r", "q_proj=2.5"], "must be a number or PATTERN=NUMBER"),
        (["--alpha", "much"], "must be a number or PATTERN=NUMBER"),
    ],
    ids=["mixed", "twice", "fraction", "word"],
)
def test_numbers_by_pattern_that_cannot_be_read(
    words: list[str], said: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(model), *words]) == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_names_and_a_regex_together_cannot_be_read(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), "--targets", "q_proj", "--targets-regex", "x"]) == 2
    assert "not both" in capsys.readouterr().err


def test_a_name_that_is_not_there_is_answered_with_the_nearest(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), "--targets", "q_prj"]) == 1
    shown = capsys.readouterr()
    assert (shown.out, "q_proj" in shown.err) == ("", True)


def test_a_default_that_adapts_next_to_nothing_is_told_in_the_report(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("randlora.targets.left_out.LITTLE", 1.1)  # as if it were next to nothing
    with pytest.warns(UserWarning, match="the default adapts only") as caught:
        report = randlora.files.plan(model)
    assert [warning.filename for warning in caught] == [__file__]
    assert main(["plan", str(model)]) == 0
    shown = capsys.readouterr()
    assert f"warning: {in_options(report.warning)}" in " ".join(shown.out.split())
    assert "UserWarning" not in shown.err


def test_what_is_left_out_is_printed_and_in_the_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = randlora.files.plan(model)
    assert expected.left_out
    assert main(["plan", str(model)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(in_options(str(group)) in shown for group in expected.left_out)
    assert main(["plan", str(model), "--targets", "all", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    everything = randlora.files.plan(model, targets="all")
    assert found["left_out"] == plain(everything.left_out)
    assert found["rule"] == everything.rule


def test_the_setup_is_that_of_the_library(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--devices", "8", "--strategy", "tp", "--tokens", "100", "--dtype", "bfloat16", "--checkpointing"]
    words += ["--optimizer-states", "1"]
    setup: dict[str, Any] = {"devices": 8, "strategy": "tp", "tokens": 100, "dtype": torch.bfloat16}
    expected = randlora.files.training_memory(model, checkpointing=True, optimizer_states=1, **setup)
    assert main(["plan", str(model), *words]) == 0
    shown = capsys.readouterr().out
    assert shown.count(expected.title) == 1
    assert all(name in shown and size in shown for name, size in expected.lines)
    assert all(in_options(note) in shown for note in expected.notes)
    assert main(["plan", str(model), *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["training_memory"]
    assert found == {**plain(expected), "total": expected.total}


def test_a_number_that_is_too_small_is_an_error(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), "--devices", "0"]) == 1
    assert "devices must be at least 1, got 0" in capsys.readouterr().err

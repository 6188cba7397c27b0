"""Each command does what the verb of its name does, with the options that it is given, as text and as JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

import randlora
from randlora.cli.app import app, main, plain
from randlora.config import OPTIONS
from randlora.errors import on_command_line
from tests.checkpoint_files import edit_fields
from tests.directories import base_directory, our_directory, their_directory
from tests.model_directories import contents, save_adapter, save_model
from tests.models import LLAMA
from tests.peer import THEIR_WARNINGS

pytestmark = THEIR_WARNINGS


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """Run a command; return its exit code and what it printed on both streams."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


def run_json(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, Any]:
    code, out, err = run(capsys, *words, "--json")
    assert err == ""
    return code, json.loads(out)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(LLAMA, tmp_path)


PLANS: dict[str, dict[str, Any]] = {
    "": {"r": 32},
    "--r 4 --targets q_proj,up_proj --targets v_proj --train-also norm,embed_tokens": {
        "r": 4,
        "targets": ["q_proj", "up_proj", "v_proj"],
        "train_also": ["norm", "embed_tokens"],
    },
    "--targets all-linear --exclude mlp --alpha 3 --seed 7 --dropout 0.5 --init gamma --experts shared": {
        "r": 32,
        "targets": "all-linear",
        "exclude": ["mlp"],
        "alpha": 3.0,
        "seed": 7,
        "dropout": 0.5,
        "init": "gamma",
        "experts": "shared",
    },
    r"--targets .*\.0\..*_proj --r 8 --basis block --blocks 4 8": {
        "targets": r".*\.0\..*_proj",
        "r": 8,
        "basis": "block",
        "blocks": (4, 8),
    },
    "--class AutoModelForSequenceClassification --num-labels 3 --train-also score": {
        "r": 32,
        "model_class": "AutoModelForSequenceClassification",
        "num_labels": 3,
        "train_also": ["score"],
    },
    "--r q_proj=16 --r .*=8 --alpha (?=model).*=2.5 --basis sparse --stream portable": {
        "r": {"q_proj": 16, ".*": 8},
        "alpha": {"(?=model).*": 2.5},
        "basis": "sparse",
        "stream": "portable",
    },
}


@pytest.mark.parametrize(("words", "options"), PLANS.items(), ids=range(len(PLANS)))
def test_the_options_are_those_of_the_library(
    words: str, options: dict[str, Any], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with on_command_line():
        expected = randlora.files.plan(model, **options)
        text = str(expected)
    code, out, _ = run(capsys, "plan", model, *words.split())
    assert code == 0
    assert out.startswith(f"{text}\n")
    assert "optimizer, 2 numbers for each" in out
    _, found = run_json(capsys, "plan", model, *words.split())
    assert {name: found[name] for name in plain(expected)} == plain(expected)
    assert found["share"] == expected.share
    parts = ("weights", "parameters", "gradients", "optimizer", "bases")  # all that there is for one device
    assert found["training_memory"]["total"] == sum(found["training_memory"][part] for part in parts)


def test_every_option_of_an_adapter_is_one_of_the_command() -> None:
    group = typer.main.get_command(app)
    options = {parameter.name for parameter in group.commands["plan"].params}  # type: ignore[attr-defined]
    assert {*OPTIONS, "like_lora", "init"} <= options


def test_what_is_left_out_and_a_default_that_adapts_next_to_nothing_are_told(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = run_json(capsys, "plan", model, "--targets", "all")
    everything = randlora.files.plan(model, targets="all")
    assert (found["left_out"], found["rule"]) == (plain(everything.left_out), everything.rule)
    monkeypatch.setattr("randlora.targets.left_out.LITTLE", 1.1)  # as if it were next to nothing
    with on_command_line(), pytest.warns(UserWarning, match="the default adapts only") as caught:
        report = randlora.files.plan(model)
    assert [warning.filename for warning in caught] == [__file__]
    code, out, err = run(capsys, "plan", model)
    assert (code, "UserWarning" in err) == (0, False)
    shown = " ".join(out.split())
    assert f"warning: {report.warning}" in shown
    assert report.left_out
    with on_command_line():
        assert all(str(group) in shown for group in report.left_out)


def test_the_setup_is_that_of_the_library(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--devices", "8", "--strategy", "tp", "--tokens", "100", "--dtype", "bfloat16", "--checkpointing"]
    words += ["--optimizer-states", "1", "--tp-plan", "*.q_proj=colwise", "--tp-plan", "*.v_proj=rowwise"]
    setup: dict[str, Any] = {"devices": 8, "strategy": "tp", "tokens": 100, "dtype": torch.bfloat16}
    setup["tp_plan"] = {"*.q_proj": "colwise", "*.v_proj": "rowwise"}
    with on_command_line():
        expected = randlora.files.training_memory(model, checkpointing=True, optimizer_states=1, **setup)
        text = str(expected)
    assert run(capsys, "plan", model, *words)[1].endswith(f"\n\n{text}\n")
    assert run_json(capsys, "plan", model, *words)[1]["training_memory"] == plain(expected)


def test_merge_takes_adapters_with_their_scales_and_the_base_that_a_file_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(LLAMA, Path("base"), is_sharded=True)
    for number, name in enumerate(("one", "other")):
        save_adapter(LLAMA, Path(name), values=number)
    more = ["one", "other", "out", "--base", "base", "--scale", "0.5", "--scale", "-2", "--dtype", "bfloat16"]
    code, found = run_json(capsys, "merge", *more)
    expected = randlora.files.merge({"one": 0.5, "other": -2.0}, "sum", base="base", dtype=torch.bfloat16)
    before = contents(Path("out"))
    assert (code, found) == (0, {**plain(expected), "out": "out"})
    assert before == contents(Path("sum"))
    edit_fields(Path("one"), {"base_model_name_or_path": "base"})
    assert run(capsys, "merge", "one", "out")[0] == 1
    assert contents(Path("out")) == before
    code, out, _ = run(capsys, "merge", "one", "out", "--overwrite")
    report = randlora.files.merge("one", "expected")
    assert (code, out.replace("wrote out", "wrote expected")) == (0, f"{report}\n")
    assert contents(Path("out")) == contents(Path("expected"))


def test_inspect_and_verify_print_what_the_library_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = our_directory(LLAMA, tmp_path, "block")
    base, summary = base_directory(LLAMA, tmp_path), randlora.files.inspect(source)
    assert run(capsys, "inspect", source) == (0, f"{summary}\n", "")
    code, found = run_json(capsys, "inspect", source)
    assert (code, found["bases"][0]["spec"]["kind"]) == (0, "block")
    assert found["bases"][0]["digest"] == summary.bases[0].digest
    assert [layer["stable_rank"] for layer in found["layers"]] == [layer.stable_rank for layer in summary.layers]
    assert found["config"]["targets"] == [layer.fqn for layer in summary.layers]
    assert run(capsys, "verify", source, "--base", base) == (0, f"{randlora.files.verify(source, base)}\n", "")
    code, found = run_json(capsys, "verify", source)
    assert (code, found["passed"], [check["outcome"] for check in found["checks"]]) == (0, True, ["passed"] * 3)
    edit_fields(source, {"r": 7})
    code, out, err = run(capsys, "verify", source)
    assert (code, err) == (1, "")
    assert "failed: files" in out
    code, found = run_json(capsys, "verify", source)
    assert (code, found["passed"]) == (1, False)
    assert "the files come from different saves" in found["checks"][0]["words"]


def test_convert_takes_every_option_and_prints_its_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = their_directory(LLAMA, tmp_path)
    words: list[str | Path] = ["convert", source, tmp_path / "lora", "--to", "lora"]
    code, out, err = run(capsys, *words)
    assert (code, out) == (1, "")
    assert "give --base, the directory of its base model" in err
    words += ["--base", base_directory(LLAMA, tmp_path)]
    code, out, err = run(capsys, *words, "--rank", "4")
    assert (code, out) == (2, "")
    assert "with --rank 4, 8 of 8 layers have a relative error above --tolerance 0.05" in err
    more = ("--tolerance", "1", "--format", "diffusers", "--component", "unet", "--overwrite")
    code, found = run_json(capsys, *words, "--rank", "4", *more)
    assert (code, {layer["rank"] for layer in found["layers"]}) == (0, {4})
    assert 0 < found["relative_error"] < max(layer["relative_error"] for layer in found["layers"]) < 1
    assert "for 'unet' of a pipeline: --component names a different one of its models" in found["notes"]
    code, _, err = run(capsys, *words)
    assert code == 1
    assert "exists and is not empty: choose a different name, or give --overwrite" in err

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
from tests.models import BERT, LLAMA
from tests.peer import THEIR_WARNINGS, assert_same_effect, in_peft

pytestmark = THEIR_WARNINGS


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


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Begin a command line in a directory with a model and two adapters."""
    monkeypatch.chdir(tmp_path)
    save_model(LLAMA, Path("base"), is_sharded=True)
    for number, name in enumerate(("one", "other")):
        save_adapter(LLAMA, Path(name), values=number)
    return ["merge", "--base", "base"]


def test_one_adapter_is_merged(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "one", "out"]) == 0
    report = randlora.files.merge("one", "expected", base="base")
    assert contents(Path("out")) == contents(Path("expected"))
    assert capsys.readouterr().out.replace("wrote out", "wrote expected") == f"{report}\n"


def test_the_base_is_the_one_that_the_file_names_and_an_older_result_is_replaced(words: list[str]) -> None:
    edit_fields(Path("one"), {"base_model_name_or_path": "base"})
    assert main(["merge", "one", "out"]) == 0
    before = contents(Path("out"))
    assert main(["merge", "one", "out", "--scale", "2"]) == 1
    assert contents(Path("out")) == before
    assert main(["merge", "one", "out", "--scale", "2", "--overwrite"]) == 0
    assert contents(Path("out")) == contents(randlora.files.merge({"one": 2.0}, "expected").out)


def test_several_adapters_are_merged_with_their_scales(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    more = ["one", "other", "out", "--scale", "0.5", "--scale", "-2", "--dtype", "bfloat16", "--json"]
    assert main([*words, *more]) == 0
    report = randlora.files.merge({"one": 0.5, "other": -2.0}, "expected", base="base", dtype=torch.bfloat16)
    assert contents(Path("out")) == contents(Path("expected"))
    assert json.loads(capsys.readouterr().out) == {**plain(report), "out": "out"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["one", "other", "out", "--scale", "2"], "one --scale for each adapter"),
        (["one", "one", "out"], "an adapter is named twice"),
        (["one", "out", "--dtype", "int8"], "int8"),
        ([], "ADAPTER"),
    ],
    ids=["scales", "twice", "dtype", "none"],
)
def test_what_cannot_be_meant_is_refused(
    more: list[str], message: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *more]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in " ".join(shown.err.replace("│", " ").split())
    assert not Path("out").exists()


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """Run a command; return its exit code and what it printed on both streams."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def run_json(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, Any]:
    code, out, err = run(capsys, *words, "--json")
    assert err == ""
    return code, json.loads(out)


def test_inspect_prints_what_the_library_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = our_directory(LLAMA, tmp_path, "block")
    summary = randlora.files.inspect(source)
    assert run(capsys, "inspect", source) == (0, f"{summary}\n", "")
    code, found = run_json(capsys, "inspect", source)
    assert code == 0
    assert found["bases"][0]["spec"]["kind"] == "block"
    assert found["bases"][0]["digest"] == summary.bases[0].digest
    assert [layer["stable_rank"] for layer in found["layers"]] == [layer.stable_rank for layer in summary.layers]
    assert found["config"]["targets"] == [layer.fqn for layer in summary.layers]


def test_inspect_of_a_file_of_peft_takes_the_shapes_of_its_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = their_directory(BERT, tmp_path)
    base = base_directory(BERT, tmp_path)
    assert {layer["frobenius"] for layer in run_json(capsys, "inspect", source)[1]["layers"]} == {None}
    _, found = run_json(capsys, "inspect", source, "--base", base)
    assert min(layer["frobenius"] for layer in found["layers"]) > 0
    _, found = run_json(capsys, "inspect", source, "--base", base, "--no-norms")
    assert {layer["frobenius"] for layer in found["layers"]} == {None}


def test_verify_ends_with_0_where_all_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    base = base_directory(LLAMA, tmp_path)
    code, out, err = run(capsys, "verify", source, "--base", base)
    assert (code, err) == (0, "")
    assert out == f"{randlora.files.verify(source, base)}\n"
    code, found = run_json(capsys, "verify", source)
    assert (code, found["passed"]) == (0, True)
    assert [check["outcome"] for check in found["checks"]] == ["passed"] * 3


def test_verify_ends_with_1_where_a_check_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    edit_fields(source, {"r": 7})
    code, out, err = run(capsys, "verify", source)
    assert (code, err) == (1, "")
    assert "failed: files" in out
    code, found = run_json(capsys, "verify", source)
    assert (code, found["passed"]) == (1, False)
    assert "the files come from different saves" in found["checks"][0]["words"]


def test_convert_writes_what_peft_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, ours = our_directory(LLAMA, tmp_path, "block")
    code, out, err = run(capsys, "convert", source, tmp_path / "out", "--to", "peft")
    assert (code, err) == (0, "")
    assert out.startswith(f"wrote {tmp_path / 'out'} (peft)")
    assert_same_effect(ours, in_peft(LLAMA, tmp_path / "out"), LLAMA)


def test_convert_to_lora_prints_every_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    words = ("convert", source, tmp_path / "lora", "--to", "lora")
    code, out, err = run(capsys, *words, "--rank", "4")
    assert (code, out) == (2, "")
    assert "with --rank 4, 8 of 8 layers have a relative error above --tolerance 0.05" in err
    assert not (tmp_path / "lora").exists()
    code, found = run_json(capsys, *words, "--rank", "4", "--tolerance", "1.0")
    assert code == 0
    assert {layer["rank"] for layer in found["layers"]} == {4}
    assert 0 < found["relative_error"] < max(layer["relative_error"] for layer in found["layers"]) < 1
    code, _, err = run(capsys, *words, "--tolerance", "0.3")
    assert code == 1
    assert "exists and is not empty: choose a different name, or give --overwrite" in err
    code, out, _ = run(capsys, *words, "--tolerance", "0.3", "--overwrite")
    assert code == 0
    assert "rank_pattern" in out


def test_convert_writes_for_other_servers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    words = ("--to", "lora", "--tolerance", "0.3")
    code, out, _ = run(capsys, "convert", source, tmp_path / "one", *words, "--same-rank")
    assert code == 0
    assert "padded with zeros to rank" in out
    words = ("--to", "lora", "--rank", "32")
    more = ("--format", "diffusers", "--component", "unet")
    code, found = run_json(capsys, "convert", source, tmp_path / "pipe", *words, *more)
    assert (code, found["notes"]) == (0, ["for 'unet' of a pipeline: --component names a different one of its models"])
    assert (tmp_path / "pipe" / "pytorch_lora_weights.safetensors").exists()
    code, out, _ = run(capsys, "convert", source, tmp_path / "diff", "--to", "diff")
    assert code == 0
    assert "for 'diffusion_model'" in out


def test_convert_of_a_file_of_peft_takes_a_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = their_directory(LLAMA, tmp_path)
    words = ("convert", source, tmp_path / "native", "--to", "native")
    code, _, err = run(capsys, *words)
    assert code == 1
    assert "give --base, the directory of its base model" in err
    code, _, _ = run(capsys, *words, "--base", base_directory(LLAMA, tmp_path))
    assert code == 0
    assert randlora.files.verify(tmp_path / "native").passed

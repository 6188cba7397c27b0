"""The commands `inspect`, `verify` and `convert`: what they print, as text and as JSON, and their exit codes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import randlora
from randlora.checkpoint.tensors import TENSORS_FILE
from randlora.cli.app import main
from tests.checkpoint_files import edit_fields
from tests.directories import base_directory, our_directory, their_directory
from tests.further import further
from tests.model_directories import contents
from tests.models import BERT, LLAMA
from tests.peer import THEIR_WARNINGS, assert_same_effect, in_peft

pytestmark = THEIR_WARNINGS


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


def test_inspect_of_what_is_no_adapter_is_an_error_on_one_stream(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "inspect", tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith("error: cannot read")


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
    assert "the files are of two saves" in found["checks"][0]["words"]


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
    assert "exists and is not empty: choose another name, or give --overwrite" in err
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
    assert (code, found["notes"]) == (0, ["for 'unet' of a pipeline: --component names another of its models"])
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


@pytest.mark.parametrize(
    "words", [["convert", "a"], ["convert", "a", "b", "--to", "gguf"], ["verify"], ["inspect", "a", "--rank", "3"]]
)
def test_a_wrong_command_line_ends_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert err


@pytest.mark.parametrize("command", ["inspect", "verify", "convert"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert "Examples" in out
    assert f"randlora {command} my-adapter" in out


@pytest.mark.medium
def test_a_kill_in_the_middle_leaves_no_output_under_its_name(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    before = contents(source)
    script = f"""
import os, signal
from randlora.disk import replace
from randlora.__main__ import main
def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)
replace.flush = killed
main(["convert", {str(source)!r}, {str(tmp_path / "out")!r}, "--to", "native"])
"""
    result = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    assert result.returncode == -9
    assert [path for path in (tmp_path / "out").iterdir() if not path.name.startswith(".out.unfinished-")] == []
    assert contents(source) == before
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "native"]) == 0
    assert (tmp_path / "out" / TENSORS_FILE).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "out"]


@pytest.mark.medium
@pytest.mark.parametrize("to", ["native", further("peft"), further("lora")])
def test_a_disk_that_refuses_is_an_error_and_leaves_no_trace(to: str, tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    before = contents(tmp_path)
    script = f"""
import resource, signal, sys
from randlora.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
sys.exit(main(["convert", {str(source)!r}, {str(tmp_path / "out")!r}, "--to", {to!r}]))
"""
    result = subprocess.run([sys.executable, "-B", "-c", script], check=False, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert "File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists()

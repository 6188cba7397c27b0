"""The command line as a whole: where it prints what, exit codes, its extra, the demo, and pages that are true."""

import ast
import importlib
import json
import os
import pty
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

import randlora
from randlora.__main__ import main
from randlora.cli.app import app
from randlora.errors import how_to_install
from tests.further import further
from tests.model_directories import save_adapter, save_model
from tests.models import LLAMA
from tests.screens import PAGES, SCREEN, record

ROOT = Path(__file__).parent.parent
COMMANDS = sorted(str(command.name) for command in app.registered_commands)
MODULE = [sys.executable, "-m", "randlora"]

every_command = pytest.mark.parametrize("command", COMMANDS)


def process(words: list[str], directory: Path, **options: Any) -> subprocess.Popen[str]:
    """Start a process in a directory, with this package, and without transformers, which takes seconds to import."""
    (directory / "lacking").mkdir()
    (directory / "lacking" / "transformers.py").write_text("raise ImportError", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(directory / "lacking"), str(ROOT)])}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(words, cwd=directory, env=environment, text=True, **streams)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Put a model and an adapter of it into a directory."""
    save_model(LLAMA, tmp_path / "model")
    save_adapter(LLAMA, tmp_path / "adapter")
    return tmp_path


def test_the_module_runs_as_a_program(directory: Path) -> None:
    running = process([*MODULE, "--version"], directory)
    assert running.communicate() == (f"randlora {randlora.__version__}\n", "")
    assert running.returncode == 0


def test_the_script_is_the_same_program() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, _, name = scripts["randlora"].partition(":")
    assert getattr(importlib.import_module(module), name) is main


@pytest.mark.medium
@pytest.mark.parametrize("missing", ["typer", further("rich")])
def test_without_its_extra_it_says_how_to_install_it(missing: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from randlora.__main__ import main; sys.exit(main([]))"
    running = process([sys.executable, "-c", code], tmp_path)
    assert running.communicate() == ("", f"error: the command line needs {missing}: {how_to_install('cli')}\n")
    assert running.returncode == 1


def test_help_and_the_version_import_nothing_that_takes_long() -> None:
    code = """
import sys
from randlora.__main__ import main
assert [main(words) for words in (["--help"], ["plan", "--help"], ["--version"])] == [0, 0, 0]
print([*sys.modules], file=sys.stderr)
"""
    running = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert not {"torch", "numpy", "safetensors"} & set(ast.literal_eval(running.stderr))


def test_a_shell_can_complete_commands() -> None:
    environment = {**os.environ, "_RANDLORA_COMPLETE": "complete_bash", "COMP_WORDS": "randlora ver", "COMP_CWORD": "1"}
    code = "from randlora.__main__ import main; main()"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, env=environment, text=True, capture_output=True, check=True)
    assert done.stdout.split() == ["verify"]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr()
    assert all(re.search(rf"\b{command} ", shown.out) for command in COMMANDS)
    assert shown.err == ""


@every_command
def test_the_help_of_a_command_has_examples_and_says_more_than_its_first_line(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"Examples randlora {command} .* randlora {command} ", shown)
    assert "--json" in shown


@every_command
def test_a_command_line_that_cannot_be_read_ends_with_2(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--no-such-option"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "no-such-option" in shown.err


def test_a_users_error_is_one_message_on_stderr_and_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tmp_path), "--json"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {tmp_path} holds no weights")
    assert shown.err.count("\n") == 1  # though it is longer than a terminal is wide


def test_an_error_of_the_system_names_the_file(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = directory / "adapter" / "adapter_config.json" / "out"
    assert main(["merge", str(directory / "adapter"), str(place), "--base", str(directory / "model")]) == 1
    assert re.fullmatch(r"error: .*: .*adapter_config\.json.*\n", capsys.readouterr().err)


def test_a_bug_is_not_dressed_up_as_a_users_error(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setattr("randlora.files.base_fit.find_model", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["plan", str(directory / "model")])


@pytest.mark.medium
def test_a_reader_that_goes_away_is_no_error(directory: Path) -> None:
    running = process([*MODULE, "inspect", "adapter"], directory)
    assert running.stdout is not None
    running.stdout.close()
    assert running.stderr is not None
    assert running.stderr.read() == ""
    running.wait()
    running.stderr.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["plan", "model", "--basis", "dens"],
            "basis must be one of dense, sparse, very_sparse, block, got 'dens': did you mean",
        ),
        (
            ["plan", "model", "--strategy", "fsdp"],
            "got 'fsdp': did you mean 'fsdp2'?",
        ),
        (["plan", "model", "--dtype", "bfloat"], "got 'bfloat': did you mean 'bfloat16'?"),
        (["plan", "model", "--init", "lambd"], "got 'lambd': did you mean 'lambda'?"),
        (["plan", "model", "--r", "0"], "r must be a positive integer"),
        (["plan", "model", "--dropout", "1"], "dropout must be a number in [0, 1), got 1.0"),
        (["plan", "model", "--devices", "0"], "devices must be at least 1, got 0"),
        (["plan", "model", "--targets", "q_prj"], "the nearest names are q_proj"),
        (
            ["inspect", "adapter", "--stream", "torch2"],
            "stream must be one of torch, torch-2.11, portable or None, got",
        ),
        (
            ["convert", "adapter", "out", "--to", "nativ"],
            "got 'nativ': did you mean 'native'?",
        ),
        (["merge", "adapter", "out", "--base", "model", "--dtype", "int8"], "dtype must be one of float32, bfloat16,"),
    ],
)
def test_every_bad_value_ends_with_2_and_says_what_is_meant(
    words: list[str], said: str, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(directory)
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    assert not Path("out").exists()


WORDS = ["merge", "adapter", "out", "--base", "model", "--json"]


@pytest.mark.medium
def test_on_a_terminal_a_bar_shows_how_far_it_is_and_stdout_stays_clean(directory: Path) -> None:
    ours, theirs = pty.openpty()
    running = process([*MODULE, *WORDS], directory, stderr=theirs)
    os.close(theirs)
    seen = b""
    try:  # the terminal first: what it holds unread is little, and a command that draws more waits
        while block := os.read(ours, 1 << 16):
            seen += block
    except OSError:  # how a terminal ends on Linux
        pass
    os.close(ours)
    out, _ = running.communicate()
    assert running.returncode == 0
    assert json.loads(out)["shards"] == 1
    assert b"100%" in seen


def test_the_demo_learns_and_gives_the_same_outputs_after_saving_and_merging(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_rng_state()
    assert main(["demo", "--json", "--keep", str(tmp_path / "kept")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["after"] < found["before"] / 5
    assert (found["loads_equal"], found["passed"]) == (True, True)
    assert found["merged_apart"] < 1e-5
    assert randlora.files.verify(tmp_path / "kept").passed
    assert torch.equal(torch.get_rng_state(), before)


def test_the_demo_tells_of_every_step_and_replaces_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    shown = capsys.readouterr().out
    calls = ["inject", "save", "load", "merge", "files.verify"]
    assert [f"randlora.{call}(" in shown for call in calls] == [True] * len(calls)
    assert max(map(len, shown.splitlines())) <= 84
    assert main(["demo", "--keep", str(tmp_path)]) == 1


TEXT = "".join(page.read_text(encoding="utf-8") for page in PAGES)


def section(command: str) -> str:
    """Take the part of the pages about one command."""
    found = re.search(rf"^## {command}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no page has a section about {command}"
    return found[1]


@pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.13", reason="files name the version of torch, and were smaller by a byte"
)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_screens_are_what_the_commands_print(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert record(text, tmp_path) == text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_section_with_a_screen(command: str) -> None:
    assert SCREEN.search(section(command))

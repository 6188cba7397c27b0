"""The command line: each command does what the verb of its name does, prints it there, and ends with that code."""

import ast
import inspect
import io
import json
import os
import pkgutil
import pty
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.torch_version import TorchVersion

import randlora
from randlora import files
from randlora.__main__ import main
from randlora.bases.spec import BasisSpec
from randlora.cli import complain, plain, show, visible
from randlora.cli.app import COMMANDS
from randlora.cli.commands import callback, progress_bar
from randlora.config import OPTIONS
from randlora.errors import how_to_install, on_command_line
from randlora.files.inspect import Check, Verification
from randlora.files.model_directory import no_progress
from tests.checkpoint_files import edit_fields, peft_directory, read_tensors, write_tensors
from tests.model_directories import contents, save_adapter, save_model
from tests.models import LLAMA
from tests.screens import PAGE, SCREEN, record

ROOT = Path(__file__).parent.parent
MODULE = [sys.executable, "-m", "randlora"]
TEXT = PAGE.read_text(encoding="utf-8")
Run = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_model(LLAMA, tmp_path / "model")
    save_adapter(LLAMA, tmp_path / "adapter", basis="block")
    save_adapter(LLAMA, tmp_path / "other", values=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:

    def of(words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(words.split())
        return code, *capsys.readouterr()

    return of


LEFT_OUT: dict[str, Any] = {"targets": "all-linear", "exclude": ["mlp"], "experts": "shared"}
LIBRARY: dict[str, Callable[[], Any]] = {
    "inspect adapter": partial(files.inspect, "adapter"),
    "verify adapter --base model": partial(files.verify, "adapter", "model"),
    "merge adapter other out --base model --scale 0.5 --scale -2 --dtype bfloat16": partial(
        files.merge, {"adapter": 0.5, "other": -2.0}, "out", base="model", dtype=torch.bfloat16
    ),
    "convert adapter out --to lora --base model --rank 4 --tolerance 1 --format diffusers --component unet": partial(
        files.convert, "adapter", "out", "lora", base="model", rank=4, tolerance=1, format="diffusers", component="unet"
    ),
    "plan model --targets all --train-rows embed_tokens=1,2": partial(
        files.plan, "model", 32, targets="all", train_rows={"embed_tokens": [1, 2]}
    ),
    "plan model --r 4 --targets q_proj,up_proj --targets v_proj --train-also norm,embed_tokens": partial(
        files.plan, "model", 4, targets=["q_proj", "up_proj", "v_proj"], train_also=["norm", "embed_tokens"]
    ),
    "plan model --targets all-linear --exclude mlp --alpha 3 --seed 7 --dropout 0.5 --init gamma --experts shared": (
        partial(files.plan, "model", 32, alpha=3, seed=7, dropout=0.5, init="gamma", **LEFT_OUT)
    ),
    r"plan model --targets .*\.0\..*_proj --r 8 --basis block --blocks 4 8": partial(
        files.plan, "model", 8, targets=r".*\.0\..*_proj", basis="block", blocks=(4, 8)
    ),
    "plan model --r q_proj=16 --r .*=8 --alpha (?=model).*=2.5 --basis sparse --stream portable": partial(
        files.plan, "model", {"q_proj": 16, ".*": 8}, alpha={"(?=model).*": 2.5}, basis="sparse", stream="portable"
    ),
}


@pytest.mark.parametrize("words", LIBRARY, ids=range(len(LIBRARY)))
def test_a_command_does_and_prints_what_the_verb_of_its_name_does(words: str, directory: Path, run: Run) -> None:
    def written() -> dict[str, bytes]:
        found = contents(Path("out"))
        shutil.rmtree("out", ignore_errors=True)
        return found

    with on_command_line():
        expected = LIBRARY[words]()
        text = str(expected)
    own = written()
    code, out, err = run(words)
    assert (code, err, written()) == (0, "", own)
    assert out == f"{text}\n" or (words.startswith("plan") and out.startswith(f"{text}\n\nmemory for training"))
    code, out, err = run(f"{words} --json")
    assert (code, err, written()) == (0, "", own)
    found = json.loads(out)
    assert {name: found[name] for name in plain(expected)} == json.loads(json.dumps(plain(expected)))
    if memory := found.get("training_memory"):
        parts = ("weights", "parameters", "gradients", "optimizer", "bases")  # all that there is for one device
        assert memory["total"] == sum(memory[part] for part in parts)


@pytest.mark.usefixtures("directory")
def test_a_plan_takes_all_options_and_tells_what_is_left_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "plan model --devices 8 --strategy fsdp2 --tokens 100 --dtype bfloat16 --checkpointing"
    words += " --optimizer-states 1"
    setup: dict[str, Any] = {"devices": 8, "strategy": "fsdp2", "tokens": 100, "dtype": torch.bfloat16}
    setup |= {"checkpointing": True, "optimizer_states": 1}
    with on_command_line():
        expected = files.training_memory("model", **setup)
        text = str(expected)
    assert run(words)[1].endswith(f"\n\n{text}\n")
    assert json.loads(run(f"{words} --json")[1])["training_memory"] == plain(expected)
    assert {*OPTIONS, "like_lora", "init"} <= inspect.signature(callback("plan", *COMMANDS["plan"])).parameters.keys()
    monkeypatch.setattr("randlora.targets.left_out.LITTLE", 1.1)  # as if it were next to nothing
    with on_command_line(), pytest.warns(UserWarning, match="the default adapts only") as caught:
        report = files.plan("model")
    with on_command_line():
        groups = [str(group) for group in report.left_out]
    assert [warning.filename for warning in caught] == [__file__]
    code, out, err = run("plan model")
    assert (code, "UserWarning" in err, groups == []) == (0, False, False)
    shown = " ".join(out.split())
    assert all(each in shown for each in (f"warning: {report.warning}", *groups))


@pytest.mark.usefixtures("directory")
def test_an_error_is_one_message_and_a_bug_is_not_dressed_up_as_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(code: int, words: str, message: str) -> None:
        found, out, err = run(words)
        assert (found, out, err[:7], err.count("\n")) == (code, "", "error: ", 1)  # though it is wider than a terminal
        assert message in err

    failed(1, "merge adapter out", "--base")
    failed(1, "plan . --json", "holds no weights")
    failed(1, "merge adapter adapter/adapter_config.json/out --base model", "adapter_config.json")
    edit_fields(Path("adapter"), {"base_model_name_or_path": "model"})
    assert run("merge adapter out")[0] == 0
    before = contents(Path("out"))
    failed(1, "merge other out --base model", "exists and is not empty: choose a different name, or give --overwrite")
    assert contents(Path("out")) == before
    assert run("merge other out --base model --overwrite")[0] == 0
    assert contents(Path("out")) != before
    peft_directory(Path("theirs"))
    failed(1, "convert theirs lora --to lora", "give --base, the directory of its base model")
    message = "with --rank 4, 8 of 8 layers have a relative error above --tolerance 0.05"
    failed(2, "convert adapter lora --to lora --base model --rank 4", message)
    edit_fields(Path("adapter"), {"r": 7})
    code, out, err = run("verify adapter")
    assert (code, "failed: files" in out, err) == (1, True, "")
    code, out, _ = run("verify adapter --json")
    assert (code, json.loads(out)["passed"]) == (1, False)
    assert "the files come from different saves" in json.loads(out)["checks"][0]["words"]
    monkeypatch.setattr("randlora.files.adapter.find_model", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["plan", "model"])


@pytest.mark.medium
def test_a_bar_is_on_a_terminal_and_stdout_stays_clean(directory: Path, without_transformers: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    words = [*MODULE, "merge", "adapter", "out", "--base", "model", "--json"]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=theirs, env=without_transformers)
    os.close(theirs)
    seen = b""
    with suppress(OSError):  # how a terminal ends on Linux
        while block := os.read(ours, 1 << 16):  # first: what it holds unread is little, and a command that draws waits
            seen += block
    os.close(ours)
    out, _ = running.communicate()
    assert (running.returncode, json.loads(out)["shards"], b"100%" in seen) == (0, 1, True)
    reading, writing = os.pipe()
    os.close(reading)
    streams: dict[str, Any] = {"stdout": writing, "stderr": subprocess.PIPE}
    done = subprocess.run([*MODULE, "inspect", "adapter"], env=without_transformers, check=False, **streams)
    os.close(writing)
    assert done.stderr == b""


@pytest.mark.medium
def test_help_and_the_version_import_nothing_that_takes_long_and_a_missing_extra_is_named() -> None:
    code = """
import os, sys
from randlora.__main__ import main
assert [main(words) for words in (["--help"], ["--version"])] == [0, 0]
print([*sys.modules], file=sys.stderr)
os.environ |= {"_RANDLORA_COMPLETE": "complete_bash", "COMP_WORDS": "randlora ver", "COMP_CWORD": "1"}
main()
"""
    program = partial(subprocess.run, cwd=ROOT, text=True, capture_output=True, check=False)
    done = program([sys.executable, "-c", code])
    assert not {"torch", "numpy", "safetensors"} & set(ast.literal_eval(done.stderr))
    assert done.stdout.split()[-3:] == ["randlora", randlora.__version__, "verify"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert pkgutil.resolve_name(project["scripts"]["randlora"]) is main
    code = "import sys; sys.modules['typer'] = None; from randlora.__main__ import main; sys.exit(main([]))"
    done = program([sys.executable, "-c", code])
    expected = f"error: the command line needs typer: {how_to_install('cli')}\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


def test_every_command_is_in_the_help_and_on_the_page_and_takes_no_word_that_it_cannot_read(run: Run) -> None:
    code, shown, err = run("--help")
    assert (code, err) == (0, "")
    for command, (summary, *_) in COMMANDS.items():
        assert re.search(rf"\b{command} ", shown)
        first_line = str(getattr(files, command).__doc__).replace("Return", "Print").partition("\n")[0]
        assert (summary, summary.split()[-1] in shown) == (first_line, True)
        (section,) = re.findall(rf"^## {command}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
        assert SCREEN.search(section)
        code, out, _ = run(f"{command} --help")
        words = " ".join(out.split())
        assert code == 0
        assert re.search(rf"Examples randlora {command} .* randlora {command} ", words)
        assert "--json" in words
        code, out, err = run(f"{command} --no-such-option")
        assert (code, out, "no-such-option" in err) == (2, "", True)


UNREAD = {
    "plan model --basis dens": "--basis must be one of dense, sparse, very_sparse, block, got dens: did you mean",
    "plan model --dtype bfloat": "--dtype must be one of float32, bfloat16, float16, float64, got bfloat: did you mean",
    "plan model --seed x": ", got x",  # after typer's words, which versions of it choose otherwise
    "plan model --tokens 1.5": ", got 1.5",
    "plan model --blocks 2 x": ", got 2 x",
    "convert adapter out --to lora --rank x": ", got x",
    "merge adapter other out --base model --scale 1 --scale x": ", got 1 x",
    "plan model --alpha 0": "--alpha must be positive, got 0:",  # and is not taken for none
    "plan model --blocks 2 2": "--blocks needs --basis block, got dense",
    "plan model --like-lora 0": "--like-lora must be the rank of a LoRA, a positive integer, got 0",
    "plan model --targets query,v_proj": "--targets query matches no layer or weight that can be adapted; the model",
    "plan model --train-also hed": "--train-also hed matches no module or parameter;",
    "convert adapter out --to nativ": "--to must be one of peft, native, lora, got nativ: did you mean native?",
    "plan model --r 16 --r q_proj=8": "--r must be NAME=VALUE each time, got 16, q_proj=8",
    "plan model --r q_proj=8 --r q_proj=4": "--r is given twice for one name",
    "plan model --r q_proj=2.5": "--r must be a number or NAME=NUMBER, got 2.5",
    "plan model --targets q_proj --targets .*v.*": "--targets takes names or one regex, got q_proj, .*v.*",
    "merge adapter other out --base model --scale 2": "one --scale for each adapter",
    "merge adapter adapter out --base model": "an adapter is named twice",
    "merge adapter adapter out --base model --scale 1 --scale 2": "an adapter is given twice",
    "merge --base model": "Missing argument 'ADAPTERS'",
    "merge adapter --base model": "Missing argument 'OUT'. ╰",
    "convert": "Missing argument 'DIRECTORY'",
}


@pytest.mark.usefixtures("directory")
def test_every_bad_value_ends_with_2_and_says_what_is_meant(run: Run) -> None:
    for words, said in UNREAD.items():
        code, out, err = run(words)
        assert (code, out) == (2, ""), words
        assert said in " ".join(err.replace("│", " ").split())
    assert not Path("out").exists()


def test_a_wide_result_is_not_cut_in_a_pipe_and_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    name = "model." + "very_long_name." * 40 + "[bold]x[/bold]"
    show(name)
    complain("[red]no[/red]")
    with progress_bar() as progress:  # nobody is told how far it is where nobody looks
        assert progress is no_progress
    assert capsys.readouterr() == (f"{name}\n", "error: [red]no[/red]\n")
    found = {Path("ä"): (torch.bfloat16, {Path("a")}, 0.5, None)}  # of which JSON holds little
    assert json.loads(json.dumps(plain(found))) == {"ä": ["bfloat16", ["a"], 0.5, None]}
    assert plain(Verification(Path("a"), (Check("files", "passed", ""),)))["passed"] is True
    spec = plain(BasisSpec("dense", "torch", 0, 4, 8, 8))
    assert (spec["num_bases"], spec.keys() & {"family"}) == (2, set())


@given(st.text())
def test_what_a_terminal_would_not_print_is_written_out_and_nothing_else(text: str) -> None:
    shown = visible(text)
    assert all(each.isprintable() or each == "\n" for each in shown)
    assert not text.replace("\n", "").isprintable() or shown == text
    assert json.loads(visible(json.dumps([text], ensure_ascii=False))) == [text]


HOSTILE = {
    "commands": "evil\x1b[2J\x1b]0;title\x07\x9b31m\u202e",  # clear a terminal, name it, color it and turn it round
    "lines": "0\npassed: forged\nx",
    "problems": "0\n  - forged\nx",
}


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_names_in_a_file_give_a_terminal_no_commands_and_add_no_lines(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    peft_directory(tmp_path / "adapter")
    tensors, _ = read_tensors(tmp_path / "adapter")
    renamed = {each.replace(".0.", f".{name}."): tensor for each, tensor in tensors.items()}
    damaged = {each: tensor for each, tensor in renamed.items() if not each.endswith(f"{name}.randlora_gamma")}
    for held in (renamed, damaged):
        write_tensors(tmp_path / "adapter", held, {"format": "pt"})
        for place in (tmp_path / "adapter", tmp_path / name):  # and one that does not exist
            for words in (["inspect"], ["inspect", "--json"], ["verify"], ["verify", "--json"]):
                main([*words, str(place)])
                out, err = capfd.readouterr()
                assert out + err
                assert (out + err).replace("\n", "").isprintable()
                lines = (out + err).splitlines()
                assert not any(line.startswith(("passed: forged", "  - forged")) for line in lines)
                assert all(line.startswith("  - ") for line in err.splitlines()[1:]), "each is one of several problems"
                assert err[:7] in ("", "error: ")


def test_a_bar_shows_a_name_as_it_is_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar() as progress:
        progress(1, 2, "[/x]\nforged\x1b[2J")
    assert "[/x]\\nforged\\u001b[2J" in terminal.getvalue()


def test_what_an_encoding_lacks_is_written_out(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "latin-1", write_through=True))
    assert main(["verify", "adapter"]) == 0
    assert b"\\u039b and \\u0393 of 8 layers" in written.getvalue()


@pytest.mark.medium
@pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.13", reason="files name the version of torch, and were smaller by a byte"
)
def test_the_screens_are_what_the_commands_print(tmp_path: Path) -> None:
    assert record(TEXT, tmp_path) == TEXT

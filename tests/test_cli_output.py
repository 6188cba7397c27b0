"""How results look: tables that nobody cuts, and values that JSON can hold."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from randlora.bases.spec import BasisSpec
from randlora.cli.app import complain, main, plain, progress_bar, show, show_json, visible
from randlora.errors import on_command_line, spelled
from randlora.files.inspect import Check, Verification
from randlora.files.merge import FileMergeReport
from randlora.report import no_progress
from tests.checkpoint_files import peft_directory, read_tensors, write_tensors


def test_a_wide_result_is_not_cut_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    name = "model." + "very_long_name." * 40
    show(name)
    assert capsys.readouterr().out == f"{name}\n"


def test_brackets_in_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    show("[bold]x[/bold]")
    complain("[red]no[/red]")
    shown = capsys.readouterr()
    assert "[bold]x[/bold]" in shown.out
    assert shown.err == "error: [red]no[/red]\n"


@given(st.text())
def test_what_a_terminal_would_not_print_is_written_out_and_nothing_else(text: str) -> None:
    shown = visible(text)
    assert all(each.isprintable() or each == "\n" for each in shown)
    assert not text.replace("\n", "").isprintable() or shown == text
    assert json.loads(visible(json.dumps([text], ensure_ascii=False))) == [text]


@pytest.mark.parametrize(
    ("name", "value", "said", "shown"),
    [
        ("base", None, "base=", "--base"),
        ("rank", 4, "rank=4", "--rank 4"),
        ("tolerance", 0.05, "tolerance=0.05", "--tolerance 0.05"),
        ("same_rank", True, "same_rank=True", "--same-rank"),
        ("to", "lora", 'to="lora"', "--to lora"),
        ("train_also", ["a", "b"], 'train_also=["a", "b"]', "--train-also a,b"),
    ],
)
def test_messages_name_options_as_the_caller_gives_them(name: str, value: object, said: str, shown: str) -> None:
    with on_command_line():
        assert spelled(name, value) == shown
    assert spelled(name, value) == said


HOSTILE = "evil\x1b[2J\x1b]0;title\x07\x9b31m\u202e"
"""A name that clears a terminal, names its window, colors what follows and turns it round."""


@pytest.mark.parametrize("more", [[], ["--json"]])
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_names_in_a_file_give_a_terminal_no_commands(
    command: str, more: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    peft_directory(tmp_path / "adapter")
    tensors, _ = read_tensors(tmp_path / "adapter")
    renamed = {name.replace(".0.", f".{HOSTILE}."): tensor for name, tensor in tensors.items()}
    write_tensors(tmp_path / "adapter", renamed, {"format": "pt"})
    for directory in (tmp_path / "adapter", tmp_path / HOSTILE):  # and one that does not exist
        main([command, str(directory), *more])
        shown = capfd.readouterr()
        assert shown.out + shown.err
        assert (shown.out + shown.err).replace("\n", "").isprintable()


def test_names_in_a_file_add_no_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft_directory(tmp_path / "adapter")
    tensors, _ = read_tensors(tmp_path / "adapter")
    renamed = {name.replace(".0.", ".0\npassed: forged\nx."): tensor for name, tensor in tensors.items()}
    write_tensors(tmp_path / "adapter", renamed, {"format": "pt"})
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    del renamed[next(name for name in renamed if name.endswith("forged\nx.randlora_gamma"))]
    write_tensors(tmp_path / "adapter", renamed, {"format": "pt"})
    assert main(["verify", str(tmp_path / "adapter")]) == 1
    shown = capsys.readouterr().out
    assert shown.count("passed: forged") >= 2
    assert not any(line.startswith("passed: forged") for line in shown.splitlines())


def test_what_an_encoding_lacks_is_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft_directory(tmp_path / "adapter")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "latin-1", write_through=True))
    assert main(["verify", str(tmp_path / "adapter")]) == 0
    assert b"\\u039b and \\u0393 of 2 layers" in written.getvalue()


def test_what_json_cannot_hold_becomes_text(capsys: pytest.CaptureFixture[str]) -> None:
    report = FileMergeReport(Path("out"), {"ä": 0.5}, ("x",), (), 1, 10, torch.bfloat16, ())
    show_json(report)
    shown = json.loads(capsys.readouterr().out)
    assert shown == {
        "out": "out",
        "adapters": {"ä": 0.5},
        "merged": ["x"],
        "replaced": [],
        "added": [],
        "shards": 1,
        "nbytes": 10,
        "dtype": "bfloat16",
        "notes": [],
    }
    assert plain({1: {Path("a")}}) == {"1": ["a"]}


def test_numbers_that_are_properties_are_in_the_json() -> None:
    assert plain(Verification(Path("a"), (Check("files", "passed", ""),)))["passed"] is True
    spec = plain(BasisSpec("dense", "torch", 0, 4, 8, 8))
    assert (spec["num_bases"], spec.keys() & {"family"}) == (2, set())


def test_nobody_is_told_how_far_it_is_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as progress:
        assert progress is no_progress
        progress(1, 2, "x")
    assert capsys.readouterr().err == ""

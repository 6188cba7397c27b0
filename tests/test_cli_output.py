"""How results look: tables that nobody cuts, and values that JSON can hold."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from randlora.cli.app import main
from randlora.cli.shared import complain, in_options, plain, progress_bar, show_json, show_table, visible
from randlora.files.merge import FileMergeReport
from randlora.report import no_progress
from tests.checkpoint_files import peft_directory, read_tensors, write_tensors


def test_a_wide_table_is_not_cut_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    name = "model." + "very_long_name." * 40
    show_table(("layer", "norm", "count"), [(name, "0.25", 12345), ("short", "1", 2)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["layer", "norm", "count"], [name, "0.25", "12,345"], ["short", "1", "2"]]


def test_a_table_without_headings_has_no_empty_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    show_table((), [("a", "1 kB"), ("bcd", "20 kB")])
    assert capsys.readouterr().out.splitlines() == ["a     1 kB", "bcd  20 kB"]


def test_brackets_in_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(("name",), [("[bold]x[/bold]",)])
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
    ("said", "shown"),
    [
        ("give base=, the directory", "give --base, the directory"),
        ("with rank=4, above tolerance=0.05 (a)", "with --rank 4, above --tolerance 0.05 (a)"),
        ("same_rank=True pads, and rank=N cuts", "--same-rank pads, and --rank N cuts"),
        ("use to='lora' with format='peft'", "use --to lora with --format peft"),
        ('did you mean targets=["a", "b"]? or train_also="c.d"', "did you mean --targets a,b? or --train-also c.d"),
        (
            "merge(model, adapters=['a']) needs no base_revision=",
            "merge(model, adapters=['a']) needs no --base-revision",
        ),
        ("dense bases (stream=torch, seed=0, r=4, dims=8x8)", "dense bases (stream=torch, seed=0, r=4, dims=8x8)"),
        ("r=8, alpha=-16, dropout=0", "r=8, alpha=-16, dropout=0"),
    ],
)
def test_arguments_in_messages_are_shown_as_options(said: str, shown: str) -> None:
    assert in_options(said) == shown


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
        "dequantized": {},
        "base_nbytes": 0,
    }
    assert plain({1: {Path("a")}}) == {"1": ["a"]}


def test_nobody_is_told_how_far_it_is_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as progress:
        assert progress is no_progress
        progress(1, 2, "x")
    assert capsys.readouterr().err == ""

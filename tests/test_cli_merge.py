"""`randlora merge` does what `randlora.files.merge` does, with the options that it is given."""

import json
from pathlib import Path

import pytest
import torch

import randlora
from randlora.__main__ import main
from randlora.cli.output import plain
from tests.checkpoint_files import edit_fields
from tests.model_directories import contents, save_adapter, save_model
from tests.models import LLAMA


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

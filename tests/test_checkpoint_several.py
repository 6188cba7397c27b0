"""Several adapters in one directory, as PEFT lays them out: all of them or none, to disk and back."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import randlora
from randlora.disk import replace as replacing
from randlora.errors import AdapterError, CheckpointError
from tests.checkpoint_files import CARD_FILE, CONFIG_FILE, HEADED, LINEAR, TENSORS_FILE, trained
from tests.kit import adapter_values, all_bits, fill, untouched
from tests.laws import assert_close
from tests.model_directories import contents
from tests.peer import THEIR_WARNINGS

pytestmark = THEIR_WARNINGS

FILES = {CARD_FILE, CONFIG_FILE, TENSORS_FILE}
NAMES = ("b", "default", "a")


def model_of_three() -> nn.Module:
    """Make a model with three adapters, of which one trains parameters besides."""
    model = trained(HEADED)
    randlora.inject(model, r=3, targets=["0"], name="a", stream="portable")
    randlora.inject(model, r=2, targets=["2"], name="b", basis="block")
    return fill(fill(model, "a", seed=1), "b", seed=2)


def test_each_is_in_a_directory_of_its_name_and_default_in_the_root(tmp_path: Path) -> None:
    model = model_of_three()
    with untouched(model):
        reports = randlora.save_all(model, tmp_path / "all")
    places = {"default": tmp_path / "all", "a": tmp_path / "all" / "a", "b": tmp_path / "all" / "b"}
    assert {report.name: report.directory for report in reports} == places
    assert {*contents(tmp_path / "all")} == {*FILES, *(f"{name}/{file}" for name in "ab" for file in FILES)}
    for name, place in places.items():
        randlora.save(model, tmp_path / "one", name=name)
        for file in FILES:
            assert (tmp_path / "one" / file).read_bytes() == (place / file).read_bytes()
    twin = HEADED.build()
    loaded = randlora.load_all(twin, tmp_path / "all")
    assert [(report.name, report.is_active) for report in loaded] == [("default", True), ("a", False), ("b", False)]
    assert [each.is_active for each in randlora.adapters(twin)] == [True, False, False]
    for name in places:
        assert all_bits(adapter_values(twin, name)) == all_bits(adapter_values(model, name))


def test_some_are_saved_and_loaded_by_name(tmp_path: Path) -> None:
    model, twin = model_of_three(), HEADED.build()
    randlora.save_all(model, tmp_path, names=["b", "a"], bases="stored")
    assert {*contents(tmp_path)} == {f"{name}/{file}" for name in "ab" for file in FILES}
    randlora.load_all(twin, tmp_path, names=["a"], trainable=True)
    assert [(each.name, each.is_trainable) for each in randlora.adapters(twin)] == [("a", True)]
    randlora.load_all(twin, str(tmp_path), names=["b"])
    assert [each.name for each in randlora.adapters(twin)] == ["a", "b"]


@pytest.mark.parametrize("failing", [0, 4, 8])
def test_nothing_is_seen_if_the_disk_is_full(failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of a new directory nor of one that is replaced."""
    model, old = model_of_three(), tmp_path / "old"
    randlora.save_all(trained(LINEAR), old)
    randlora.save_all(trained(LINEAR, name="a"), old)
    before = contents(tmp_path)
    flush, flushed = replacing.flush, list[Path]()

    def fail(path: Path) -> None:
        if path.name in FILES:
            flushed.append(path)
            if len(flushed) > failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        flush(path)

    monkeypatch.setattr(replacing, "flush", fail)
    for out in (old, tmp_path / "new"):
        flushed.clear()
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            randlora.save_all(model, out, names=NAMES)
    assert contents(tmp_path) == before
    assert [*tmp_path.iterdir()] == [old]


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "unknown": (["a", "c"], AdapterError, "no adapter named 'c'"),
    "twice": (["a", "a"], CheckpointError, "'a' is named twice"),
    "none": ([], CheckpointError, "no adapter is named"),
    "text": ("a", Exception, "names must be"),
    "nan": (NAMES, CheckpointError, "holds NaN"),
}


@pytest.mark.parametrize(("names", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_nothing_is_written_unless_all_can_be(names: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    model = model_of_three()
    with torch.no_grad():
        [*adapter_values(model, "a").values()][-1].fill_(float("nan"))
    with pytest.raises(error, match=message):
        randlora.save_all(model, tmp_path / "out", names=names)
    assert not (tmp_path / "out").exists()


def test_a_name_that_no_directory_has_is_refused(tmp_path: Path) -> None:
    for name in ("a/b", "/"):
        with pytest.raises(CheckpointError, match="cannot be the name of a directory: rename the adapter"):
            randlora.save_all(trained(LINEAR, name=name), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "b").touch()
    with pytest.raises(CheckpointError, match=r"b' is a file or a broken link: expected the name of a directory"):
        randlora.save_all(model_of_three(), tmp_path)
    assert contents(tmp_path) == {"b": b""}


@pytest.mark.parametrize("is_adapted", [False, True])
@pytest.mark.parametrize("damage", ["cut", "another model's", "a name that is taken"])
def test_all_are_loaded_or_none(damage: str, is_adapted: bool, tmp_path: Path) -> None:
    randlora.save_all(model_of_three(), tmp_path)
    model = trained(HEADED, name="b" if damage == "a name that is taken" else "own") if is_adapted else HEADED.build()
    if damage == "cut":
        (tmp_path / "b" / TENSORS_FILE).write_bytes((tmp_path / "b" / TENSORS_FILE).read_bytes()[:-1])
    elif damage == "another model's":
        randlora.save(trained(LINEAR), tmp_path / "b")
    elif not is_adapted:
        (tmp_path / "b").rename(tmp_path / "default")
    message = f"{tmp_path / 'b'}|cannot load 'b': the model has an adapter of that name|two adapters named 'default'"
    with untouched(model), pytest.raises((CheckpointError, AdapterError), match=message):
        randlora.load_all(model, tmp_path)


def test_directories_without_adapters_are_refused(tmp_path: Path) -> None:
    model, place = HEADED.build(), tmp_path / "all"
    randlora.save_all(model_of_three(), place)
    with untouched(model):
        for options, message in (
            ({"source": place, "names": ["a", "c"]}, r"no adapter named 'c'; the nearest are"),
            ({"source": place / "a" / "b"}, f"cannot load '{place / 'a' / 'b'}': .* has no adapters"),
            ({"source": tmp_path / "none"}, f"cannot load '{tmp_path / 'none'}': .* has no adapters"),
            ({"source": place, "revision": "main"}, "a path has no revision, got 'main'"),
        ):
            with pytest.raises(CheckpointError, match=message):
                randlora.load_all(model, **options)
    for subfolder in ("a", "b"):
        randlora.load(model, place, subfolder=subfolder, name=subfolder)
    with untouched(model), pytest.raises(CheckpointError, match="a file has no subfolder, got 'a'"):
        randlora.load(model, place / TENSORS_FILE, subfolder="a", name="c")


def test_ours_are_loaded_by_peft(tmp_path: Path) -> None:
    ours = trained(LINEAR)
    randlora.inject(ours, r=2, name="other")
    fill(ours, "other", seed=3)
    randlora.save_all(ours, tmp_path, bases="stored")
    theirs = PeftModel.from_pretrained(LINEAR.build(), tmp_path)
    theirs.load_adapter(tmp_path / "other", "other")
    for name in ("default", "other"):
        theirs.set_adapter(name)
        randlora.activate(ours, name)
        assert_close(LINEAR.output(theirs), LINEAR.output(ours), torch.float32)

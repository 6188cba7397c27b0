"""Writing: all files or none, whenever it fails, and nothing temporary left behind."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import randlora
from randlora.checkpoint.write import write_together
from tests.checkpoint_files import (
    CARD_FILE,
    CONFIG_FILE,
    HEADED,
    TENSORS_FILE,
    adapter_values,
    all_bits,
    snapshot,
    trained,
)

OLD = {"one": b"old one", "two": b"old two"}


def contents(directory: Path) -> dict[str, bytes]:
    """Read every file, hidden ones included."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def writers(**texts: bytes) -> dict[str, Callable[[Path], object]]:
    """Write each of these texts whole."""

    def writer(text: bytes) -> Callable[[Path], object]:
        return lambda path: path.write_bytes(text)

    return {name: writer(text) for name, text in texts.items()}


def fail_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that one of its calls, counted from 1, raises."""
    calls = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            raise OSError("the disk refuses")
        return function(*args, **kwargs)

    return failing


STEPS = {
    "temporary-directory": ("tempfile.mkdtemp", 1),
    "touch-of-the-first": ("pathlib.Path.touch", 1),
    "touch-of-the-second": ("pathlib.Path.touch", 2),
    "chmod-of-the-second": ("pathlib.Path.chmod", 2),
    "fsync-of-the-first": ("os.fsync", 1),
    "fsync-of-the-second": ("os.fsync", 2),
    "rename-of-the-first": ("pathlib.Path.replace", 1),
    "rename-of-the-second": ("pathlib.Path.replace", 2),
}

every_step = pytest.mark.parametrize(("target", "call"), STEPS.values(), ids=STEPS)


def break_step(monkeypatch: pytest.MonkeyPatch, target: str, call: int) -> None:
    owner, _, name = target.rpartition(".")
    module: Any = {"tempfile": tempfile, "os": os, "pathlib.Path": Path}[owner]
    monkeypatch.setattr(module, name, fail_at(call, getattr(module, name)))


def test_files_are_written_and_nothing_else(tmp_path: Path) -> None:
    write_together(tmp_path / "a" / "b", writers(one=b"1", two=b"2"))
    assert contents(tmp_path / "a" / "b") == {"one": b"1", "two": b"2"}


def test_old_files_are_replaced_and_others_left_alone(tmp_path: Path) -> None:
    write_together(tmp_path, writers(**OLD, other=b"other"))
    write_together(tmp_path, writers(one=b"1", two=b"2"))
    assert contents(tmp_path) == {"one": b"1", "two": b"2", "other": b"other"}


def test_a_file_is_as_readable_as_any_new_one(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_together(tmp_path, writers(one=b"1"))
    finally:
        os.umask(before)
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o640
    assert os.umask(before) == before, "the umask is as it was"


@every_step
def test_a_failure_leaves_the_old_files_whole_and_nothing_temporary(
    target: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_together(tmp_path, writers(**OLD))
    break_step(monkeypatch, target, call)
    with pytest.raises(OSError, match="the disk refuses"):
        write_together(tmp_path, writers(one=b"1", two=b"2"))
    monkeypatch.undo()
    assert contents(tmp_path) == OLD


@every_step
def test_a_failure_leaves_an_empty_directory_empty(
    target: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_step(monkeypatch, target, call)
    with pytest.raises(OSError, match="the disk refuses"):
        write_together(tmp_path, writers(one=b"1", two=b"2"))
    monkeypatch.undo()
    assert contents(tmp_path) == {}


def test_a_failing_flush_of_the_directory_leaves_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_together(tmp_path, writers(**OLD))
    break_step(monkeypatch, "os.fsync", 3)
    with pytest.raises(OSError, match="the disk refuses"):
        write_together(tmp_path, writers(one=b"1", two=b"2"))
    monkeypatch.undo()
    assert contents(tmp_path) in (OLD, {"one": b"1", "two": b"2"})


@pytest.mark.parametrize("failing", ["one", "two"])
@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt], ids=lambda error: error.__name__)
def test_a_writer_that_fails_half_way_leaves_the_old_files_whole(
    failing: str, error: type[BaseException], tmp_path: Path
) -> None:
    def write_half(path: Path) -> None:
        path.write_bytes(b"hal")
        raise error("half-way")

    write_together(tmp_path, writers(**OLD))
    with pytest.raises(error, match="half-way"):
        write_together(tmp_path, {**writers(one=b"1", two=b"2"), failing: write_half})
    assert contents(tmp_path) == OLD


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_directory_in_the_way_of_a_file_leaves_the_rest_whole(name: str, tmp_path: Path) -> None:
    write_together(tmp_path, writers(**OLD))
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=name):
        write_together(tmp_path, writers(one=b"1", two=b"2"))
    (tmp_path / name).rmdir()
    assert contents(tmp_path) == {other: text for other, text in OLD.items() if other != name}


def test_the_old_files_come_back_where_the_file_system_has_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_together(tmp_path, writers(**OLD))
    monkeypatch.setattr(Path, "hardlink_to", fail_at(1, Path.hardlink_to))
    break_step(monkeypatch, "pathlib.Path.replace", 2)
    with pytest.raises(OSError, match="the disk refuses"):
        write_together(tmp_path, writers(one=b"1", two=b"2"))
    monkeypatch.undo()
    assert contents(tmp_path) == OLD


def test_every_file_is_flushed_before_the_first_is_renamed_and_the_directory_after_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        done.append("flush the directory" if os.path.isdir(f"/dev/fd/{descriptor}") else "flush a file")  # noqa: PTH112
        fsync(descriptor)

    def watched_replace(path: Path, target: Path) -> Path:
        done.append(f"rename {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    write_together(tmp_path, writers(one=b"1", two=b"2"))
    assert done == ["flush a file", "flush a file", "rename one", "rename two", "flush the directory"]


def test_a_directory_that_is_a_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"text")
    with pytest.raises(OSError, match="taken"):
        write_together(tmp_path / "taken", writers(one=b"1"))
    assert contents(tmp_path) == {"taken": b"text"}


@every_step
def test_a_save_that_fails_leaves_the_older_adapter_loadable_and_the_model_alone(
    target: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, model = trained(HEADED), trained(HEADED, r=4, seed=9)
    randlora.save(old, tmp_path)
    before = snapshot(model)
    break_step(monkeypatch, target, call)
    with pytest.raises(OSError, match="the disk refuses"):
        randlora.save(model, tmp_path)
    monkeypatch.undo()
    assert snapshot(model) == before
    assert sorted(contents(tmp_path)) == [CARD_FILE, CONFIG_FILE, TENSORS_FILE]
    twin = HEADED.build()
    randlora.load(twin, tmp_path)
    assert all_bits(adapter_values(twin)) == all_bits(adapter_values(old))

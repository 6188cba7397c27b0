"""Files and directories appear complete or not at all, whatever fails, and nothing temporary remains.

`test_save_faults` breaks every system call of a save: these are the cases beside it.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import randlora
from randlora.disk import replace
from randlora.disk.replace import Files, is_free, new_directory, scratch_for, write_files
from tests.checkpoint_files import CARD_FILE, CONFIG_FILE, HEADED, TENSORS_FILE, trained
from tests.further import further
from tests.kit import adapter_values, all_bits, snapshot

OLD = {"one": b"old one", "two": b"old two"}


def contents(directory: Path) -> dict[str, bytes]:
    """Read every file, hidden ones included."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def write(directory: Path, **texts: bytes | Callable[[Path], object]) -> int:
    """Write each of these texts whole, the second withdrawn, or have it written."""

    def writer(text: bytes) -> Callable[[Path], object]:
        return lambda path: path.write_bytes(text)

    writers = {name: writer(text) if isinstance(text, bytes) else text for name, text in texts.items()}
    (size,) = write_files(Files(directory, writers, withdrawn="two" if "two" in writers else None))
    return size


def fail_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that one of its calls, counted from 1, raises."""
    calls = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            raise OSError("the disk refuses")
        return function(*args, **kwargs)

    return failing


def test_files_are_written_and_nothing_else(tmp_path: Path) -> None:
    assert write(tmp_path / "a" / "b", one=b"1", two=b"22") == 3
    assert contents(tmp_path / "a" / "b") == {"one": b"1", "two": b"22"}


def test_old_files_are_replaced_and_others_left_alone(tmp_path: Path) -> None:
    write(tmp_path, **OLD, other=b"other")
    write(tmp_path, one=b"1", two=b"2")
    assert contents(tmp_path) == {"one": b"1", "two": b"2", "other": b"other"}


def test_a_file_is_as_readable_as_any_new_one(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path, one=b"1")
    finally:
        os.umask(before)
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o640
    assert os.umask(before) == before, "the umask is as it was"


def test_a_file_is_as_readable_as_the_one_that_it_replaces(tmp_path: Path) -> None:
    write(tmp_path, **OLD)
    (tmp_path / "one").chmod(0o600)
    write(tmp_path, one=b"1", two=b"2")
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o600, "what was private stays private"


@pytest.mark.parametrize(("failing", "error"), [("one", ValueError), ("two", KeyboardInterrupt)])
def test_a_writer_that_fails_half_way_leaves_the_old_files_whole(
    failing: str, error: type[BaseException], tmp_path: Path
) -> None:
    def write_half(path: Path) -> None:
        path.write_bytes(b"hal")
        raise error("half-way")

    texts: dict[str, bytes | Callable[[Path], object]] = {"one": b"1", "two": b"2", failing: write_half}
    write(tmp_path, **OLD)
    with pytest.raises(error, match="half-way"):
        write(tmp_path, **texts)
    assert contents(tmp_path) == OLD


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_directory_in_the_way_of_a_file_leaves_the_rest_whole(name: str, tmp_path: Path) -> None:
    write(tmp_path, **OLD)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=name):
        write(tmp_path, one=b"1", two=b"2")
    (tmp_path / name).rmdir()
    assert contents(tmp_path) == {other: text for other, text in OLD.items() if other != name}


def test_the_old_files_come_back_where_the_file_system_has_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, **OLD)
    monkeypatch.setattr(Path, "hardlink_to", fail_at(1, Path.hardlink_to))
    monkeypatch.setattr(Path, "replace", fail_at(2, Path.replace))
    with pytest.raises(OSError, match="the disk refuses"):
        write(tmp_path, one=b"1", two=b"2")
    monkeypatch.undo()
    assert contents(tmp_path) == OLD


def test_a_directory_that_is_a_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"text")
    with pytest.raises(OSError, match="taken"):
        write(tmp_path / "taken", one=b"1")
    assert contents(tmp_path) == {"taken": b"text"}


@pytest.mark.parametrize(
    ("target", "name", "call"),
    [(Path, "mkdir", 1), (os, "fsync", 2), (os, "fsync", 4), (Path, "replace", 1), (Path, "replace", 3)],
)
def test_a_save_that_fails_leaves_the_older_adapter_loadable_and_the_model_alone(
    target: Any, name: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, model = trained(HEADED), trained(HEADED, r=4, seed=9)
    randlora.save(old, tmp_path)
    before = snapshot(model)
    monkeypatch.setattr(target, name, fail_at(call, getattr(target, name)))
    with pytest.raises(OSError, match="the disk refuses"):
        randlora.save(model, tmp_path)
    monkeypatch.undo()
    assert snapshot(model) == before
    assert sorted(contents(tmp_path)) == [CARD_FILE, CONFIG_FILE, TENSORS_FILE]
    twin = HEADED.build()
    randlora.load(twin, tmp_path)
    assert all_bits(adapter_values(twin)) == all_bits(adapter_values(old))


# New directories


def test_a_new_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_directory(out) as new:
        (new / "file").write_text("x")
        assert not out.exists()
    assert contents(out) == {"file": b"x"}
    assert list(out.parent.iterdir()) == [out]


def test_a_new_directory_is_as_readable_as_any(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with new_directory(tmp_path / "out"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_all_of_a_new_directory_is_flushed_before_its_rename_and_the_parent_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    rename = Path.rename

    def watched_rename(path: Path, to: Path) -> Path:
        done.append(f"{path.name} to {to.name}")
        return rename(path, to)

    monkeypatch.setattr(replace, "flush", lambda path: done.append(path.name))
    monkeypatch.setattr(Path, "rename", watched_rename)
    with new_directory(tmp_path / "out") as new:
        (new / "folder").mkdir()
        (new / "folder" / "file").write_text("x")
    assert sorted(done[:2]) == ["file", "folder"]
    assert done[2:] == ["new", "new to out", tmp_path.name]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_block_that_raises(error: type[BaseException], tmp_path: Path) -> None:
    def fail() -> None:
        with new_directory(tmp_path / "deep" / "er" / "out") as new:
            (new / "file").write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_directory_whose_name_cannot_be_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", fail_at(2, os.fsync))
    with pytest.raises(OSError, match="the disk refuses"), new_directory(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_replaced_as_a_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with new_directory(out) as new:
        (new / "first").write_text("x")
    with new_directory(out, overwrite=True) as new:
        (new / "second").write_text("y")
    assert contents(out) == {"second": b"y"}
    monkeypatch.setattr(os, "fsync", fail_at(2, os.fsync))  # of what has both directories
    with pytest.raises(OSError, match="the disk refuses"), new_directory(out, overwrite=True):
        pass
    assert contents(out) == {"second": b"y"}
    assert list(tmp_path.iterdir()) == [out]


def test_a_directory_that_appeared_meanwhile_stays(tmp_path: Path) -> None:
    def appear() -> None:
        with new_directory(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "file").write_text("theirs")

    with pytest.raises(OSError, match="out"):
        appear()
    assert contents(tmp_path / "out") == {"file": b"theirs"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Several calls at once, and what a killed one left

KILLED = """
import os, signal, sys
from pathlib import Path
from randlora.disk.replace import Files, new_directory, write_files

def half(path):
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

out = Path(sys.argv[1])
if sys.argv[2] == "new":
    with new_directory(out) as new:
        half(new / "file")
else:
    write_files(Files(out, {"file": half}))
"""


@pytest.mark.medium
@pytest.mark.parametrize("through", [further("real"), "link"])
@pytest.mark.parametrize("kind", ["new", "files"])
def test_the_next_call_removes_what_a_killed_process_left(kind: str, through: str, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    out = tmp_path / through / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, out, kind], check=False)
    assert killed.returncode == -signal.SIGKILL
    place = out.parent if kind == "new" else out
    assert any(path.name.startswith(".out.unfinished-") for path in place.iterdir())
    if kind == "new":
        assert not out.exists()
        with new_directory(out) as new:
            (new / "file").write_text("x")
    else:
        assert is_free(out)
        write(out, file=b"x")
        assert not is_free(out)
    assert contents(out) == {"file": b"x"}
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["out"]


def test_two_calls_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    with scratch_for(tmp_path / "out", is_inside=False) as first:
        (first / "file").write_text("x")
        with (
            scratch_for(tmp_path / "out", is_inside=False) as second,
            scratch_for(tmp_path / "other", is_inside=False) as third,
        ):
            assert len({first, second, third}) == 3
            assert (first / "file").read_text() == "x"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # of Python 3.12, in a process with threads
def test_a_process_forked_while_a_lock_is_held_does_not_keep_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children: list[int] = []
    make = tempfile.mkdtemp

    def forking(*args: Any, **kwargs: Any) -> Any:
        if (child := os.fork()) == 0:
            time.sleep(30)
            os._exit(0)
        children.append(child)
        return make(*args, **kwargs)

    monkeypatch.setattr(tempfile, "mkdtemp", forking)
    monkeypatch.setattr(replace, "PATIENCE", 5.0)
    with scratch_for(tmp_path):
        pass
    monkeypatch.undo()
    with replace._locked(tmp_path, seconds=5.0) as is_locked:
        assert is_locked
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_threads_that_write_one_directory_leave_the_files_of_one_of_them(tmp_path: Path) -> None:
    """And none of them fails because another has created the directory, or withdrawn a file."""
    out = tmp_path / "out"
    texts = [bytes([number]) * 100 for number in range(8)]
    with ThreadPoolExecutor(len(texts)) as pool:
        sizes = pool.map(lambda text: [write(out, one=text, two=text) for _ in range(5)], texts)
        assert [*sizes] == [[200] * 5] * len(texts)
    assert contents(out)["one"] == contents(out)["two"]
    assert contents(out)["one"] in texts
    assert sorted(path.name for path in out.iterdir()) == ["one", "two"]


def test_a_call_waits_while_another_moves_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    move, second = Path.replace, threading.Thread(target=lambda: write(tmp_path, one=b"2", two=b"2"))

    def move_beside_another(path: Path, target: Path) -> Path:
        moved = move(path, target)
        if second.ident is None:
            second.start()
            second.join(0.2)
        return moved

    monkeypatch.setattr(Path, "replace", move_beside_another)
    write(tmp_path, one=b"1", two=b"1")
    second.join()
    assert contents(tmp_path) == {"one": b"2", "two": b"2"}


def test_what_another_process_is_removing_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, locked = tmp_path / f".{tmp_path.name}.unfinished-abcdefgh", replace._locked
    theirs.mkdir()

    @contextmanager
    def locked_too_late(directory: Path, *, seconds: float = 0) -> Iterator[bool]:
        with locked(directory, seconds=seconds) as is_locked:
            if directory == theirs:
                theirs.rmdir()
            yield is_locked

    monkeypatch.setattr(replace, "_locked", locked_too_late)
    write(tmp_path, one=b"1")
    assert contents(tmp_path) == {"one": b"1"}


def test_a_link_under_a_hidden_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("theirs")
    link = tmp_path / ".out.unfinished-a_link_1"
    link.symlink_to(tmp_path / "data")
    with new_directory(tmp_path / "out"):
        pass
    assert link.is_symlink()
    assert contents(tmp_path / "data") == {"file": b"theirs"}


@pytest.mark.parametrize("name", [".out.unfinished-mine", ".out.unfinished-chapter1", ".out.unfinished-chapter1.old"])
def test_a_directory_that_only_looks_like_a_leftover_stays(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, file=b"theirs")
    with new_directory(tmp_path / "out"):
        pass
    assert contents(tmp_path / name) == {"file": b"theirs"}


def test_names_with_the_signs_of_patterns_are_names(tmp_path: Path) -> None:
    for name in ("a[1]", "a1"):
        (tmp_path / f".{name}.unfinished-leftover").mkdir()
    with new_directory(tmp_path / "a[1]"):
        assert not (tmp_path / ".a[1].unfinished-leftover").exists()
    assert (tmp_path / ".a1.unfinished-leftover").exists()
    shutil.rmtree(tmp_path / ".a1.unfinished-leftover")

"""Files and directories appear complete or not at all, whatever fails, and nothing temporary remains.

`test_save_faults` breaks every system call of a save: these are the cases beside it.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
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
from tests.kit import adapter_values, all_bits, snapshot
from tests.model_directories import contents

OLD = {"one": b"old one", "two": b"old two"}


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


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """Set the umask, and check that it stays."""
    before = os.umask(mask)
    try:
        yield
    finally:
        assert os.umask(before) == mask


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_files_are_written_and_replaced_and_as_readable_as_any_or_as_those_before(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    with umask(0o027):
        assert write(place, one=b"1", two=b"22", other=b"other") == 8
    assert mode(place / "one") == 0o640
    (place / "one").chmod(0o600)
    write(place, one=b"11", two=b"2")
    assert mode(place / "one") == 0o600, "what was private stays private"
    assert contents(place) == {"one": b"11", "two": b"2", "other": b"other"}
    with pytest.raises(OSError, match="one"):
        write(place / "one", one=b"1")
    assert contents(tmp_path) == {"a/b/one": b"11", "a/b/two": b"2", "a/b/other": b"other"}


@pytest.mark.parametrize(("failing", "error"), [("one", ValueError), ("two", KeyboardInterrupt)])
def test_a_write_that_fails_half_way_leaves_the_old_files_whole(
    failing: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(path: Path) -> None:
        path.write_bytes(b"hal")
        raise error("half-way")

    write(tmp_path, **OLD)
    texts: dict[str, bytes | Callable[[Path], object]] = {"one": b"1", "two": b"2", failing: write_half}
    with pytest.raises(error, match="half-way"):
        write(tmp_path, **texts)
    assert contents(tmp_path) == OLD
    monkeypatch.setattr(Path, "hardlink_to", fail_at(1, Path.hardlink_to))  # as where the file system has no links
    monkeypatch.setattr(Path, "replace", fail_at(2, Path.replace))
    with pytest.raises(OSError, match="the disk refuses"):
        write(tmp_path, one=b"1", two=b"2")
    monkeypatch.undo()
    assert contents(tmp_path) == OLD
    (tmp_path / failing).unlink()
    (tmp_path / failing).mkdir()
    with pytest.raises(OSError, match=failing):
        write(tmp_path, one=b"1", two=b"2")
    assert contents(tmp_path) == {other: text for other, text in OLD.items() if other != failing}


@pytest.mark.parametrize(
    ("target", "name", "call"),
    [(Path, "mkdir", 1), (os, "fsync", 2), (os, "fsync", 4), (Path, "replace", 1), (Path, "replace", 3)],
)
def test_a_save_that_fails_leaves_the_older_adapter_loadable_and_the_model_alone(
    target: Any, name: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, model = trained(HEADED), trained(HEADED, r=4, seed=9)
    randlora.save(old, tmp_path)
    before, card = snapshot(model), contents(tmp_path)[CARD_FILE]
    monkeypatch.setattr(target, name, fail_at(call, getattr(target, name)))
    with pytest.raises(OSError, match="the disk refuses"):
        randlora.save(model, tmp_path)
    monkeypatch.undo()
    assert snapshot(model) == before
    assert sorted(contents(tmp_path)) == [CARD_FILE, CONFIG_FILE, TENSORS_FILE]
    assert contents(tmp_path)[CARD_FILE] == card
    twin = HEADED.build()
    randlora.load(twin, tmp_path)
    assert all_bits(adapter_values(twin)) == all_bits(adapter_values(old))


# New directories


def test_all_of_a_new_directory_is_flushed_before_it_appears_and_the_parent_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, done = tmp_path / "deep" / "out", list[tuple[str, bool]]()
    monkeypatch.setattr(replace, "flush", lambda path: done.append((path.name, out.exists())))
    with umask(0o027), new_directory(out) as new:
        (new / "folder").mkdir()
        (new / "folder" / "file").write_text("x")
    assert {("file", False), ("folder", False), ("new", False)} <= {*done}
    assert done[-1] == ("deep", True)
    assert (contents(out), mode(out)) == ({"folder/file": b"x"}, 0o750)
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_new_directory_that_fails(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        with new_directory(tmp_path / "deep" / "er" / "out") as new:
            (new / "file").write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    monkeypatch.setattr(os, "fsync", fail_at(2, os.fsync))
    with pytest.raises(OSError, match="the disk refuses"), new_directory(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_replaced_as_a_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    for name in ("first", "second"):
        with new_directory(out, overwrite=True) as new:
            (new / name).write_text("x")
        assert contents(out) == {name: b"x"}

    def appear() -> None:
        with new_directory(tmp_path / "other"):
            (tmp_path / "other").mkdir()
            (tmp_path / "other" / "file").write_text("theirs")

    with pytest.raises(OSError, match="other"):
        appear()
    monkeypatch.setattr(os, "fsync", fail_at(2, os.fsync))  # of what has both directories
    with pytest.raises(OSError, match="the disk refuses"), new_directory(out, overwrite=True):
        pass
    assert contents(tmp_path) == {"out/second": b"x", "other/file": b"theirs"}
    assert {*tmp_path.iterdir()} == {out, tmp_path / "other"}


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
@pytest.mark.parametrize("kind", ["new", "files"])
def test_the_next_call_removes_what_a_killed_process_left(kind: str, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    out = tmp_path / "link" / "out"
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


def test_a_link_under_a_hidden_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("theirs")
    link = tmp_path / ".out.unfinished-a_link_1"
    link.symlink_to(tmp_path / "data")
    with new_directory(tmp_path / "out"):
        pass
    assert link.is_symlink()
    assert contents(tmp_path / "data") == {"file": b"theirs"}


def test_a_directory_that_only_looks_like_a_leftover_stays(tmp_path: Path) -> None:
    for name in (".out.unfinished-mine", ".out.unfinished-chapter1", ".out.unfinished-chapter1.old"):
        write(tmp_path / name, file=b"theirs")
        with new_directory(tmp_path / "out", overwrite=True):
            pass
        assert contents(tmp_path / name) == {"file": b"theirs"}


def test_names_with_the_signs_of_patterns_are_names(tmp_path: Path) -> None:
    for name in ("a[1]", "a1"):
        (tmp_path / f".{name}.unfinished-leftover").mkdir()
    with new_directory(tmp_path / "a[1]"):
        assert not (tmp_path / ".a[1].unfinished-leftover").exists()
    assert (tmp_path / ".a1.unfinished-leftover").exists()
    shutil.rmtree(tmp_path / ".a1.unfinished-leftover")

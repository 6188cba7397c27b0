"""Files and directories appear complete or not at all, whatever fails, and nothing temporary remains."""

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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import randlora
from randlora.disk import replace
from randlora.disk.replace import new_directory, scratch_for, write_files
from tests.checkpoint_files import (
    CARD_FILE,
    CONFIG_FILE,
    HEADED,
    TENSORS_FILE,
    trained,
)
from tests.further import further
from tests.kit import adapter_values, all_bits, snapshot

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
    "fsync-after-the-first-rename": ("os.fsync", 3),
    "rename-of-the-first": ("pathlib.Path.replace", 1),
    "rename-of-the-second": ("pathlib.Path.replace", 2),
}

every_step = pytest.mark.parametrize(("target", "call"), STEPS.values(), ids=STEPS)


def break_step(monkeypatch: pytest.MonkeyPatch, target: str, call: int) -> None:
    owner, _, name = target.rpartition(".")
    module: Any = {"tempfile": tempfile, "os": os, "pathlib.Path": Path}[owner]
    monkeypatch.setattr(module, name, fail_at(call, getattr(module, name)))


def test_files_are_written_and_nothing_else(tmp_path: Path) -> None:
    write_files(tmp_path / "a" / "b", writers(one=b"1", two=b"2"))
    assert contents(tmp_path / "a" / "b") == {"one": b"1", "two": b"2"}


def test_old_files_are_replaced_and_others_left_alone(tmp_path: Path) -> None:
    write_files(tmp_path, writers(**OLD, other=b"other"))
    write_files(tmp_path, writers(one=b"1", two=b"2"))
    assert contents(tmp_path) == {"one": b"1", "two": b"2", "other": b"other"}


def test_a_file_is_as_readable_as_any_new_one(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_files(tmp_path, writers(one=b"1"))
    finally:
        os.umask(before)
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o640
    assert os.umask(before) == before, "the umask is as it was"


def test_a_file_is_as_readable_as_the_one_that_it_replaces(tmp_path: Path) -> None:
    write_files(tmp_path, writers(**OLD))
    (tmp_path / "one").chmod(0o600)
    write_files(tmp_path, writers(one=b"1", two=b"2"))
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o600, "what was private stays private"


@every_step
def test_a_failure_leaves_the_old_files_whole_and_nothing_temporary(
    target: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, writers(**OLD))
    break_step(monkeypatch, target, call)
    with pytest.raises(OSError, match="the disk refuses"):
        write_files(tmp_path, writers(one=b"1", two=b"2"))
    monkeypatch.undo()
    assert contents(tmp_path) == OLD


@every_step
def test_a_failure_leaves_an_empty_directory_empty(
    target: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_step(monkeypatch, target, call)
    with pytest.raises(OSError, match="the disk refuses"):
        write_files(tmp_path, writers(one=b"1", two=b"2"))
    monkeypatch.undo()
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("failing", ["one", "two"])
@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt], ids=lambda error: error.__name__)
def test_a_writer_that_fails_half_way_leaves_the_old_files_whole(
    failing: str, error: type[BaseException], tmp_path: Path
) -> None:
    def write_half(path: Path) -> None:
        path.write_bytes(b"hal")
        raise error("half-way")

    write_files(tmp_path, writers(**OLD))
    with pytest.raises(error, match="half-way"):
        write_files(tmp_path, {**writers(one=b"1", two=b"2"), failing: write_half})
    assert contents(tmp_path) == OLD


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_directory_in_the_way_of_a_file_leaves_the_rest_whole(name: str, tmp_path: Path) -> None:
    write_files(tmp_path, writers(**OLD))
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=name):
        write_files(tmp_path, writers(one=b"1", two=b"2"))
    (tmp_path / name).rmdir()
    assert contents(tmp_path) == {other: text for other, text in OLD.items() if other != name}


def test_the_old_files_come_back_where_the_file_system_has_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, writers(**OLD))
    monkeypatch.setattr(Path, "hardlink_to", fail_at(1, Path.hardlink_to))
    break_step(monkeypatch, "pathlib.Path.replace", 2)
    with pytest.raises(OSError, match="the disk refuses"):
        write_files(tmp_path, writers(one=b"1", two=b"2"))
    monkeypatch.undo()
    assert contents(tmp_path) == OLD


def test_every_file_is_flushed_before_the_first_is_renamed_and_the_directory_after_each(
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
    write_files(tmp_path, writers(one=b"1", two=b"2"))
    flushed = "flush the directory"
    assert done == ["flush a file", "flush a file", "rename one", flushed, "rename two", flushed]


def test_a_directory_that_is_a_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"text")
    with pytest.raises(OSError, match="taken"):
        write_files(tmp_path / "taken", writers(one=b"1"))
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


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_block_that_raises(error: type[BaseException], tmp_path: Path) -> None:
    def write() -> None:
        with new_directory(tmp_path / "deep" / "er" / "out") as new:
            (new / "file").write_text("x")
            raise error

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_appeared_meanwhile_stays(tmp_path: Path) -> None:
    def write() -> None:
        with new_directory(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "file").write_text("theirs")

    with pytest.raises(OSError, match="out"):
        write()
    assert contents(tmp_path / "out") == {"file": b"theirs"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from randlora.disk import replace
from randlora.disk.replace import new_directory, write_files

def half(path):
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

out = Path(sys.argv[1])
if sys.argv[2] == "new":
    with new_directory(out) as new:
        half(new / "file")
else:
    write_files(out, {"file": half})
"""


@pytest.mark.medium
@pytest.mark.parametrize("kind", [further("new"), "files"])
def test_the_next_call_removes_what_a_killed_process_left(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "files":
        write_files(out, writers(file=b"old"))
    killed = subprocess.run([sys.executable, "-c", KILLED, out, kind], check=False)
    assert killed.returncode == -signal.SIGKILL
    place = tmp_path if kind == "new" else out
    assert any(path.name.startswith(".out.unfinished-") for path in place.iterdir())
    assert not out.exists() if kind == "new" else (out / "file").read_bytes() == b"old"
    write_files(out, writers(file=b"x"))
    assert contents(out) == {"file": b"x"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_calls_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    with scratch_for(tmp_path / "out") as first:
        (first / "file").write_text("x")
        with scratch_for(tmp_path / "out") as second, scratch_for(tmp_path / "other") as third:
            assert len({first, second, third}) == 3
            assert (first / "file").read_text() == "x"
    assert list(tmp_path.iterdir()) == []


def test_calls_that_create_one_directory_at_once_all_succeed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    barrier = threading.Barrier(4)

    def together(text: bytes) -> Callable[[Path], object]:
        def write(path: Path) -> None:
            path.write_bytes(text)
            if not out.exists():
                with suppress(threading.BrokenBarrierError):
                    barrier.wait(timeout=1)

        return write

    failures: list[BaseException] = []

    def save(text: bytes) -> None:
        try:
            write_files(out, {"one": together(text), "two": together(text)})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(bytes([number]) * 100,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    found = contents(out)
    assert found["one"] == found["two"], "files of two calls were mixed"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_kill_left_is_removed_through_a_link_too(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "link" / "out", "new"], check=False)
    assert killed.returncode == -signal.SIGKILL
    write_files(tmp_path / "link" / "out", writers(file=b"x"))
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
    with scratch_for(tmp_path / "out"):
        pass
    monkeypatch.undo()
    with replace._locked(tmp_path, seconds=5.0) as is_locked:
        assert is_locked
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_threads_that_write_one_directory_leave_the_files_of_one_of_them(tmp_path: Path) -> None:
    """And none of them fails because another has withdrawn a file."""
    out = tmp_path / "out"
    out.mkdir()
    texts = [bytes([number]) * 100 for number in range(8)]

    def write(text: bytes) -> list[int]:
        return [write_files(out, writers(one=text, two=text), withdrawn=("two",)) for _ in range(5)]

    with ThreadPoolExecutor(len(texts)) as pool:
        assert [*pool.map(write, texts)] == [[200] * 5] * len(texts)
    assert contents(out)["one"] == contents(out)["two"]
    assert contents(out)["one"] in texts
    assert sorted(path.name for path in out.iterdir()) == ["one", "two"]


def test_the_size_is_of_what_was_written_whatever_another_process_withdraws_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_all = replace._replace

    def withdrawn_after(*args: Any) -> None:
        replace_all(*args)
        (tmp_path / "two").unlink()

    monkeypatch.setattr(replace, "_replace", withdrawn_after)
    assert write_files(tmp_path, writers(one=b"1", two=b"22"), withdrawn=("two",)) == 3


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
    write_files(tmp_path, writers(one=b"1"))
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
    write_files(tmp_path / name, writers(file=b"theirs"))
    write_files(tmp_path / "out", writers(file=b"ours"))
    write_files(tmp_path / "out", writers(file=b"ours again"))
    assert contents(tmp_path / name) == {"file": b"theirs"}


def test_names_with_the_signs_of_patterns_are_names(tmp_path: Path) -> None:
    for name in ("a[1]", "a1"):
        (tmp_path / f".{name}.unfinished-leftover").mkdir()
    with scratch_for(tmp_path / "a[1]"):
        assert not (tmp_path / ".a[1].unfinished-leftover").exists()
    assert (tmp_path / ".a1.unfinished-leftover").exists()
    shutil.rmtree(tmp_path / ".a1.unfinished-leftover")

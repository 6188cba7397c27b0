"""A directory appears complete or not at all."""

import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from randlora.errors import CheckpointError
from randlora.files.staging import staged


def test_what_was_written_appears_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged(out) as scratch:
        (scratch / "file").write_text("x")
        assert not out.exists()
        assert scratch.parent == out.parent  # so that one rename moves it
    assert (out / "file").read_text() == "x"
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_block_that_raises(error: type[BaseException], tmp_path: Path) -> None:
    def write() -> None:
        with staged(tmp_path / "deep" / "er" / "out") as scratch:
            (scratch / "file").write_text("x")
            raise error

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    stale = tmp_path / ".out.unfinished"
    stale.mkdir()
    (stale / "half").write_text("x")
    with staged(tmp_path / "out") as scratch:
        assert list(scratch.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_processes_do_not_write_one_directory(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as scratch:
        (scratch / "file").write_text("x")
        with (
            pytest.raises(CheckpointError, match="being written by another process"),
            staged(tmp_path / "out"),
        ):
            pass
        assert (scratch / "file").read_text() == "x"
    assert (tmp_path / "out" / "file").read_text() == "x"


def test_a_directory_that_another_process_replaced_before_it_was_locked_is_that_process_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock
    others: list[int] = []

    def overtaken(descriptor: int, operation: int) -> Any:
        if not others:
            shutil.rmtree(tmp_path / ".out.unfinished")
            (tmp_path / ".out.unfinished").mkdir()
            others.append(os.open(tmp_path / ".out.unfinished", os.O_RDONLY))
            lock(others[0], operation)
        return lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", overtaken)
    with pytest.raises(CheckpointError, match="being written by another process"), staged(tmp_path / "out"):
        pass
    assert (tmp_path / ".out.unfinished").is_dir()
    os.close(others[0])


def test_a_link_in_the_place_of_the_hidden_directory_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("theirs")
    (tmp_path / ".out.unfinished").symlink_to(tmp_path / "data")
    with pytest.raises(OSError, match="unfinished"), staged(tmp_path / "out"):
        pass
    assert (tmp_path / "data" / "file").read_text() == "theirs"


def test_a_directory_that_appeared_meanwhile_stays(tmp_path: Path) -> None:
    def write() -> None:
        with staged(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "file").write_text("theirs")

    with pytest.raises(OSError, match="out"):
        write()
    assert (tmp_path / "out" / "file").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

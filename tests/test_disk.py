"""Files appear whole or not at all, whatever fails at whatever call, and tensors in them as safetensors has them."""

import errno
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from random import random
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from randlora.disk import formats, replace
from randlora.disk.formats import Planned, bytes_of, open_shard, read_pieces, read_shard, read_tensor, write_tensor_file
from randlora.disk.replace import Files, is_free, new_directory, write_files
from randlora.errors import CheckpointError
from tests.further import further
from tests.kit import all_bits
from tests.model_directories import contents
from tests.torture.faults import ERRORS, Call, in_child
from tests.torture.replacing import SCENARIOS, Stage, after_a_fault

# of Python 3.12, in a process with threads
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

DTYPES = [*formats.TORCH_DTYPES.values()]
OLD, NEW = {"one": b"old one", "two": b"old two"}, {"one": b"new 1", "two": b"new 2"}


def writers(texts: Mapping[str, bytes]) -> dict[str, Callable[[Path], object]]:
    return {name: partial(Path.write_bytes, data=text) for name, text in texts.items()}


def write(directory: Path, texts: Mapping[str, bytes] = NEW) -> int:
    (size,) = write_files(Files(directory, writers(texts), withdrawn="two"))
    return size


def make(directory: Path, **options: Any) -> None:
    with new_directory(directory, **options) as new:
        (new / "folder").mkdir()
        for name, text in NEW.items():
            (new / "folder" / name).write_bytes(text)


def test_files_are_written_and_replaced_and_as_readable_as_any_or_as_those_before(tmp_path: Path) -> None:
    place, before = tmp_path / "a" / "b", os.umask(0o027)
    try:
        assert write(place, {**OLD, "other": b"other"}) == 19
        make(tmp_path / "c")
    finally:
        assert os.umask(before) == 0o027, "it is left as it was"
    assert [path.stat().st_mode & 0o777 for path in (place / "one", tmp_path / "c")] == [0o640, 0o750]
    (place / "one").chmod(0o600)
    write(place)
    assert (place / "one").stat().st_mode & 0o777 == 0o600, "what was private stays private"
    assert contents(place) == {**NEW, "other": b"other"}
    (tmp_path / "circle").symlink_to("circle")
    for wrong in ("a/b/one", "circle/out", "circle/../out", "a/missing/../out"):
        with pytest.raises(OSError, match=wrong.split("/")[-2 if ".." not in wrong else -3]):
            write(tmp_path / wrong)
    assert len(contents(tmp_path)) == 5
    (tmp_path / "dangling").symlink_to("a/gone")
    write(tmp_path / "dangling" / "new")
    assert contents(tmp_path / "a" / "gone" / "new") == NEW


FOLDER = {f"folder/{name}": text for name, text in NEW.items()}
ACTIONS: dict[str, tuple[Callable[[Path], object], dict[str, bytes], dict[str, bytes]]] = {
    "files": (write, OLD, NEW),
    "new files": (write, {}, NEW),
    "directory": (make, {}, FOLDER),
    "replaced directory": (partial(make, overwrite=True), OLD, FOLDER),
}
"""Each with what is there before and after it."""


@pytest.mark.medium
@pytest.mark.parametrize("is_killed", [True, False], ids=["kill", "error"])
@pytest.mark.parametrize("name", ACTIONS)
def test_the_next_call_removes_what_a_killed_process_left(name: str, is_killed: bool, fast_path: Path) -> None:
    """Killed at any call, it left the old files or the new ones; an error left the old ones and nothing else."""
    (act, old, new), real = ACTIONS[name], fast_path / "real"
    out = fast_path / "link" / "deep" / "out"
    (fast_path / "link").symlink_to(real)
    for at in count(1 + is_killed, 2):
        shutil.rmtree(real, ignore_errors=True)
        real.mkdir()
        if old:
            write(out, old)
        outcome = in_child(lambda: act(out), at, None if is_killed else errno.ENOSPC)
        if not outcome.was_killed and len(outcome.calls) < at:
            break
        found = {name: text for name, text in contents(out).items() if "unfinished" not in name}
        one_by_one = [{"one": files["one"]} for files in (old, new) if files] if act is write else []
        assert found in (old, new, {}, *one_by_one)
        hidden = [path for path in real.rglob("*") if path.name.startswith(".")]
        if outcome.raised:
            assert (outcome.raised, found, hidden) == ("OSError", old, [])
            assert [*real.iterdir()] == [real / "deep"] * bool(old)
        if outcome.was_killed and name == "replaced directory":  # also if it was moved away before, and the next fails
            with pytest.raises(InterruptedError), new_directory(out, overwrite=True):
                raise InterruptedError
            assert contents(out) in (old, new)
            found = contents(out)
        assert outcome.was_killed or found == (old if outcome.raised else new)
        assert not out.exists() or is_free(out) == (not found)
        with suppress(OSError):  # of a new directory, which is there by now
            act(out)
        assert contents(out) == new
        assert not [path for path in real.rglob("*") if path.name.startswith(".")]
    assert at > 10


def test_a_writer_that_fails_leaves_the_old_files_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, replace_file, calls = tmp_path / "out", Path.replace, count(1)

    def write_half(path: Path) -> None:
        path.write_bytes(b"hal")
        raise KeyboardInterrupt

    def fail_at_the_second(path: Path, target: Path) -> Path:
        if next(calls) == 2:
            raise OSError("the disk refuses")
        return replace_file(path, target)

    write(out, OLD)
    for failing in OLD:
        with pytest.raises(KeyboardInterrupt):
            write_files(Files(out, {**writers(NEW), failing: write_half}))
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "deep" / "er") as new:
        write_half(new / "file")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "hardlink_to", Mock(side_effect=OSError))  # as where the file system has no links
        patch.setattr(Path, "replace", fail_at_the_second)
        with pytest.raises(OSError, match="the disk refuses"):
            write(out)
    assert contents(tmp_path) == {f"out/{name}": text for name, text in OLD.items()}
    with pytest.raises(OSError, match="another"), new_directory(out := tmp_path / "another"):
        write(out, OLD)  # as another process might meanwhile
    assert contents(out) == OLD
    assert {*tmp_path.iterdir()} == {tmp_path / "out", out}
    (out / "two").unlink()
    (out / "two").mkdir()
    with pytest.raises(OSError, match="two"):
        write(out)
    assert contents(out) == {"one": OLD["one"]}


def test_a_process_forked_while_a_lock_is_held_does_not_keep_it(tmp_path: Path) -> None:
    with replace._locked(tmp_path):
        if (child := os.fork()) == 0:
            time.sleep(30)
            os._exit(0)
    with replace._locked(tmp_path, seconds=5.0) as is_locked:
        assert is_locked
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_threads_that_write_one_directory_leave_the_files_of_one_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replace, "flush", lambda _: time.sleep(random() / 200))  # when others go on, or overtake
    out = tmp_path / "out"
    texts = [bytes([number]) * 100 for number in range(8)]
    for _ in range(6):
        with ThreadPoolExecutor(len(texts)) as pool:
            assert {*pool.map(lambda text: write(out, {"one": text, "two": text}), texts)} == {200}
        assert contents(out) in [{"one": text, "two": text} for text in texts]


def test_a_directory_that_only_looks_like_a_leftover_stays(tmp_path: Path) -> None:
    looks = (".a[1].unfinished-mine", ".a[1].unfinished-chapter1", ".a[1].unfinished-chapter1.old")
    for name in looks:
        write(tmp_path / name)
    (tmp_path / ".a1.unfinished-leftover").mkdir()
    (tmp_path / ".a[1].unfinished-leftover").mkdir()
    link = tmp_path / ".a[1].unfinished-a_link_1"
    link.symlink_to(tmp_path / "data")
    write(tmp_path / "data" / "new")
    make(tmp_path / "a[1]")
    assert {path.name for path in tmp_path.iterdir()} == {*looks, ".a1.unfinished-leftover", link.name, "data", "a[1]"}
    assert all(contents(tmp_path / name) == NEW for name in (*looks, "data/new"))


LONG = ["n" * 101, "n" * 234, "n" * 235, "n" * 255, "é" * 127, "n" + "é" * 127, "字" * 85, "🙂" * 63]
"""Names up to the 255 bytes that the system allows, some of which no cut at a fixed byte leaves whole."""


@pytest.mark.parametrize("name", LONG, ids=lambda name: f"{name[:2]}{len(name.encode())}")
def test_a_directory_may_have_any_name_that_the_system_allows(name: str, fast_path: Path) -> None:
    acts: dict[str, Callable[[Path], object]] = {"inside": write, "beside": make}
    for where, act in acts.items():
        out, other = (fast_path / where / each for each in (name, name[:-1] + "m"))
        with replace.scratch_for(out, is_inside=where == "inside") as left:
            assert len(left.name.encode()) <= 143
        left.mkdir(parents=True)  # as a killed process leaves it
        act(other)
        assert left.exists()
        act(out)
        assert [*(fast_path / where).rglob(".*")] == []
        assert contents(out) == contents(other) == (NEW if where == "inside" else FOLDER)


def fill_the_disk(path: Path) -> None:
    path.symlink_to("/dev/full")
    path.write_bytes(b"more than fits")


TELLING: dict[str, tuple[Callable[[Path], object], int | None, str | None]] = {
    "a full disk": (fill_the_disk, errno.ENOSPC, "given/out"),
    "something hidden": (lambda path: (path / "deeper").write_bytes(b""), errno.ENOENT, "given/out"),
    "two that are hidden": (lambda path: path.rename(path.with_name("other")), errno.ENOENT, "given/out"),
    "a different file": (lambda _: Path("nowhere").read_bytes(), errno.ENOENT, "nowhere"),
    "nothing": (Mock(side_effect=OSError("the disk refuses")), None, None),
}
"""What fails, by what its error tells; the error's number, and what it names in the end."""


@pytest.mark.parametrize("told", TELLING)
def test_an_error_names_the_directory_given(told: str, fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing, number, named = TELLING[told]
    out = Path("given/out")
    monkeypatch.chdir(fast_path)

    def make_failing() -> None:
        with new_directory(out) as new:
            failing(new / "file")

    for act in (lambda: write_files(Files(out, {"file": failing})), make_failing):
        with pytest.raises(OSError) as raised:  # noqa: PT011  # whose words are the system's
            act()
        assert (raised.value.errno, raised.value.filename, raised.value.filename2) == (number, named, None)
        assert isinstance(raised.value.__cause__, OSError) == (named == "given/out")
        assert [*fast_path.iterdir()] == []


BY_NAME = {each.name: each for each in SCENARIOS}


@pytest.mark.medium
@pytest.mark.parametrize("name", ["over ours", further("over PEFT's"), further("LoRA over ours")])
@pytest.mark.parametrize("is_killed", [True, False], ids=["kill", "error"])
def test_a_kill_or_an_error_at_a_call_leaves_the_old_or_the_new_and_nothing_after_the_next(
    is_killed: bool, name: str, fast_path: Path
) -> None:
    stage = Stage(BY_NAME[name], fast_path)
    for at in count(1 + is_killed):
        broken = after_a_fault(stage, at, None if is_killed else ERRORS[at % len(ERRORS)])
        if broken is None:
            break
        assert broken == []
    assert at > 20


@pytest.mark.parametrize("name", [*ACTIONS, "over ours", "over PEFT's", "LoRA over ours"])
def test_what_gets_its_name_is_on_disk_before_and_the_name_after(name: str, fast_path: Path) -> None:
    """So a power failure leaves what a kill does, of which at most one step may be lost."""
    if name in BY_NAME:
        calls = Stage(BY_NAME[name], fast_path).run().calls
    else:
        act, old, _ = ACTIONS[name]
        if old:
            write(fast_path / "deep" / "out", old)
        calls = in_child(lambda: act(fast_path / "deep" / "out")).calls
    assert_flushed(calls)


def assert_flushed(calls: tuple[Call, ...]) -> None:
    """Check that files and directories are flushed before they get their names, and those after it."""
    visible = [at for at, call in enumerate(calls) if call.name == "rename" and "unfinished" not in call.paths[1]]
    assert visible
    for at in visible:
        source, target = calls[at].paths
        written = {call.paths[0]: place for place, call in enumerate(calls[:at]) if call.name in {"write", "mkdir"}}
        inside = {path: place for path, place in written.items() if path.startswith(source)}  # at its last write
        assert inside
        for path, place in inside.items():
            assert Call("fsync", (path,)) in calls[place:at], f"{path} is not flushed before its name"
        after = Call("fsync", (str(Path(target).parent),))
        assert calls[at + 1] == after, f"{target} is not flushed after it has its name"
    for at, call in enumerate(calls):
        changed = Path(call.paths[0])  # relative of what lies in a hidden directory that is removed
        if call.name in {"mkdir", "unlink"} and changed.is_absolute() and "unfinished" not in call.paths[0]:
            assert calls[at + 1] == Call("fsync", (str(changed.parent),)), f"{call} is not flushed"


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "PIECE_BYTES", 16)
        yield


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    tensor = torch.zeros(draw(st.lists(st.integers(0, 5), max_size=3)), dtype=draw(st.sampled_from(DTYPES)))
    raw = draw(st.binary(min_size=tensor.nbytes, max_size=tensor.nbytes))
    values = [byte % 2 if tensor.dtype == torch.bool else byte for byte in raw]
    bytes_of(tensor).copy_(torch.tensor(values, dtype=torch.uint8))
    return tensor


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=6).filter(
    lambda name: name != "__metadata__"
)


@given(st.dictionaries(names, tensors(), min_size=1, max_size=6), st.dictionaries(names, names, max_size=1))
def test_any_tensor_is_read_and_written_as_safetensors_does(held: dict[str, Tensor], metadata: dict[str, str]) -> None:
    wrote: list[int] = []
    with tempfile.TemporaryDirectory() as directory:
        path, ours = Path(directory, "file"), Path(directory, "ours")
        save_file(held, path, metadata or None)
        with open_shard(path) as (shard, raw):
            assert shard.metadata == metadata
            found = {entry.name: read_tensor(entry, raw) for entry in reversed(shard.entries)}
        again = {entry.name: read_tensor(entry) for entry in read_shard(path).entries}
        assert all_bits(again) == all_bits(found) == all_bits(load_file(path)) == all_bits(held)
        plans = [
            Planned(name, tensor.dtype, tuple(tensor.shape), partial(tensor.flatten().split, 1))
            for name, tensor in held.items()
        ]
        write_tensor_file(ours, plans, metadata, lambda count, _: wrote.append(count))
        assert ours.read_bytes() == path.read_bytes()
    assert sum(wrote) == sum(tensor.nbytes for tensor in held.values())


def test_tensors_are_read_in_pieces_into_new_memory_and_written_one_after_the_other(tmp_path: Path) -> None:
    path, tensor, asked = tmp_path / "file", torch.randn(3, formats.PIECE_BYTES // 4 + 1), list[str]()
    save_file({"a": torch.arange(3, dtype=torch.int8), "b": tensor}, path)
    with open_shard(path) as (shard, raw):
        found = {entry.name: read_tensor(entry, raw) for entry in shard.entries}
        pieces = [piece.clone() for piece in read_pieces(shard.entries[0], raw)]
    assert max(piece.nbytes for piece in pieces) <= formats.PIECE_BYTES < tensor.nbytes
    assert torch.equal(torch.cat(pieces).reshape(tensor.shape), tensor)
    os.truncate(path, 0)
    assert found["a"].tolist() == [0, 1, 2]
    assert torch.equal(found["b"], tensor)
    assert all(each.data_ptr() % 64 == 0 for each in found.values())

    def ask(name: str) -> Iterator[Tensor]:
        asked.append(name)
        yield torch.ones(2)

    plans = [Planned(name, torch.float32, (2,), partial(ask, name)) for name in "bca"]
    write_tensor_file(path, plans, {}, lambda _, name: asked.append(f"wrote {name}"))
    assert asked == ["a", "wrote a", "b", "wrote b", "c", "wrote c"]
    reads: list[Callable[[formats.Entry, Any], object]] = [read_tensor, lambda *read: [*read_pieces(*read)]]
    for read in reads:
        save_file({"a": torch.zeros(20_000), "b": torch.zeros(20_000)}, path)
        with open_shard(path) as (shard, raw):
            first, second = shard.entries
            read(first, raw)
            os.truncate(path, path.stat().st_size // 2)
            with pytest.raises(CheckpointError, match="ends within b: it was truncated while it was read"):
                read(second, raw)
        broken = Mock(readinto=Mock(side_effect=OSError(errno.EIO, "Input/output error")))
        with pytest.raises(CheckpointError, match=rf"^cannot read {path} \(Input/output error\)$"):
            read(second, broken)


def test_json_and_dims_are_read_up_to_their_limits(tmp_path: Path) -> None:
    for most in ("[" * 64 + "]" * 64, "9" * 309, "-" + "9" * 309):
        assert json.dumps(formats.parse_json(most)) == most
    for beyond, said in (("[" * 65 + "]" * 65, "deeper than 64 levels"), ("9" * 310, "an integer of 310 digits")):
        with pytest.raises(ValueError, match=said):
            formats.parse_json(beyond)
    assert formats.parse_json('{"a": 1, "a": 2}') == {"a": 2}
    save_file({"a": torch.ones([1] * 64)}, tmp_path / "file")
    assert [read_tensor(entry).ndim for entry in read_shard(tmp_path / "file").entries] == [64]


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    save_file({"a.weight": torch.ones(8, 4), "b.weight": torch.ones(2, 2)}, path)
    whole = path.read_bytes()
    cut = [whole[:length] for length in range(len(whole))]
    for held in (b"\0" * 8, b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", *cut):
        path.write_bytes(held)
        with pytest.raises(CheckpointError, match=f"{path} is truncated or damaged"):
            read_shard(path)
    path.write_bytes(whole)
    with pytest.raises(KeyError), open_shard(path):
        raise KeyError("a")

    monkeypatch.setattr(Path, "open", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(CheckpointError, match=r"^cannot read .*file \(Permission denied\)$"):
        read_shard(path)

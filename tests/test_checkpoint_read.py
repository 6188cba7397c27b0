"""Reading files: what is damaged or foreign is refused without a trace, the header decides, and memory is bounded."""

import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import RandLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import randlora
from randlora.checkpoint import read
from randlora.disk.formats import open_shard
from randlora.errors import CheckpointError
from tests.checkpoint_files import (
    CONFIG_FILE,
    GAMMA,
    HEADED,
    LAMBDA,
    LINEAR,
    PREFIX,
    TENSORS_FILE,
    Case,
    Stored,
    basis_of,
    doubted,
    edit_fields,
    edit_tensors,
    read_tensors,
    refused,
    reseal,
    trained,
    write_tensors,
)
from tests.further import further
from tests.kit import adapter_values, all_bits, bits, snapshot

SMALL = Case("small", lambda: nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 3)), {"train_also": ["1.bias"]})
OPTIONS: dict[str, Any] = {"stream": "portable", "seed": 5, "alpha": 3, "dropout": 0.25}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "PATIENCE", 0)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory that no seed of torch's stands for, with a parameter trained beside the adapter."""
    randlora.save(trained(SMALL, **OPTIONS), tmp_path / "saved")
    return tmp_path / "saved"


def facts(model: nn.Module, case: Case) -> tuple[object, ...]:
    """All that a file says about an adapter, as a model understood it."""
    (info,) = randlora.adapters(model)
    values = all_bits(adapter_values(model))
    return info, values, basis_of(model).digest(6, 2), bits(case.output(model))


def misread(directory: Path, case: Case, damaged: Path, versions: Iterable[tuple[object, bytes]]) -> list[object]:
    """Give a file other contents, one after the other, and list those that load as another adapter than the file's."""
    model, whole = case.build(), damaged.read_bytes()
    before = snapshot(model)
    randlora.load(model, directory)
    expected = facts(model, case)
    randlora.eject(model)
    wrong = []
    for label, contents in versions:
        damaged.write_bytes(contents)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=f"{CONFIG_FILE} says")
                randlora.load(model, directory)
        except CheckpointError:
            continue
        if facts(model, case) != expected:
            wrong.append(label)
        randlora.eject(model)
    damaged.write_bytes(whole)
    assert snapshot(model) == before
    return wrong


def region(raw: bytes, name: str) -> range:
    """Find a part of a safetensors file."""
    end_of_header = 8 + int.from_bytes(raw[:8], "little")
    key, names = raw.index(b'"randlora"'), raw.index(f'"{PREFIX}'.encode())
    return {
        "length": range(8),
        "key": range(key - 2, key + 12),
        "metadata": range(8, names),
        "tensor-headers": range(names, end_of_header),
        "data": range(end_of_header, len(raw)),
    }[name]


def flips(raw: bytes, places: range, *, every_bit: bool) -> Iterable[tuple[object, bytes]]:
    """Flip single bits: each bit of these places, or one of each byte, a different one from byte to byte."""
    for place in places:
        for bit in range(8) if every_bit else [(place + place // 8) % 8]:
            yield (place, bit), raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :]


@pytest.mark.parametrize(
    ("part", "every_bit"),
    [
        ("length", True),
        ("key", True),
        ("data", True),
        ("metadata", False),
        ("tensor-headers", False),
        pytest.param("metadata", True, marks=pytest.mark.slow),
        pytest.param("tensor-headers", True, marks=pytest.mark.slow),
    ],
)
def test_a_flipped_bit_of_the_tensors_file_is_refused_or_changes_nothing(
    part: str, every_bit: bool, saved: Path
) -> None:
    raw = (saved / TENSORS_FILE).read_bytes()
    damaged = flips(raw, region(raw, part), every_bit=every_bit)
    assert misread(saved, SMALL, saved / TENSORS_FILE, damaged) == []


@pytest.mark.parametrize("every_bit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_flipped_bit_of_the_json_is_refused_or_changes_nothing(saved: Path, *, every_bit: bool) -> None:
    raw = (saved / CONFIG_FILE).read_bytes()
    damaged = flips(raw, range(len(raw)), every_bit=every_bit)
    assert misread(saved, SMALL, saved / CONFIG_FILE, damaged) == []


@pytest.mark.parametrize("name", [TENSORS_FILE, CONFIG_FILE])
def test_a_file_cut_short_anywhere_is_refused_or_changes_nothing(name: str, saved: Path) -> None:
    raw = (saved / name).read_bytes()
    cut = ((length, raw[:length]) for length in range(len(raw)))
    assert misread(saved, SMALL, saved / name, cut) == []


def test_a_tensors_file_that_is_cut_or_has_bytes_after_its_end_is_refused(saved: Path) -> None:
    raw = (saved / TENSORS_FILE).read_bytes()
    for contents in (raw[:-1], raw + b"\0"):
        (saved / TENSORS_FILE).write_bytes(contents)
        refused(SMALL.build(), saved, "truncated or damaged")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "is damaged"),
        (b"{", "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b"null", "describes no RandLoRA adapter: expected peft_type='RANDLORA', got None"),
        (b"[]", "describes no RandLoRA adapter"),
        (b'"RANDLORA"', "describes no RandLoRA adapter"),
        (b"{}", "describes no RandLoRA adapter"),
        (b'{"peft_type": "LORA"}', "expected peft_type='RANDLORA', got 'LORA'"),
        (b'{"peft_type": ["RANDLORA"]}', "got ['RANDLORA']"),
    ],
    ids=["empty", "cut", "no-text", "nested", "null", "list", "string", "no-type", "lora", "type-list"],
)
def test_a_damaged_or_foreign_json_is_refused(contents: bytes, message: str, saved: Path) -> None:
    (saved / CONFIG_FILE).write_bytes(contents)
    refused(SMALL.build(), saved, message)


@pytest.mark.parametrize(
    ("name", "message"),
    [(CONFIG_FILE, f"expected a directory with {CONFIG_FILE} and {TENSORS_FILE}"), (TENSORS_FILE, "nothing is unpick")],
)
def test_a_missing_file_is_named(name: str, message: str, saved: Path) -> None:
    edit_tensors(saved, {})  # which our header would make do without the JSON
    (saved / name).unlink()
    refused(SMALL.build(), saved, message)
    refused(SMALL.build(), saved, name)


def test_a_pickle_in_place_of_the_tensors_is_refused_and_never_run(saved: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"weight": Bomb()}, saved / "adapter_model.bin")
    shutil.copy(saved / "adapter_model.bin", saved / TENSORS_FILE)
    refused(SMALL.build(), saved, "truncated or damaged")
    (saved / TENSORS_FILE).unlink()
    refused(SMALL.build(), saved, "only safetensors files are read, nothing is unpickled")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 1}, "says r=2, the tensors were saved with 1"),
        ({"alpha": 3.5}, "says randlora_alpha=3, the tensors were saved with 3.5"),
        ({"dropout": 0.5}, "says randlora_dropout=0.25, the tensors were saved with 0.5"),
        ({"seed": 6}, "says projection_prng_key=5, the tensors were saved with 6"),
        ({"basis": "sparse", "r": 8}, "kind of basis='dense', the tensors were saved with 'sparse'"),
    ],
    ids=["r", "alpha", "dropout", "seed", "kind"],
)
def test_tensors_beside_the_json_of_another_save_decide(
    options: dict[str, Any], message: str, saved: Path, tmp_path: Path
) -> None:
    other = trained(SMALL, **{**OPTIONS, **options})
    randlora.save(other, tmp_path / "other")
    shutil.copy(tmp_path / "other" / TENSORS_FILE, saved / TENSORS_FILE)
    model = SMALL.build()
    doubted(model, saved, message)
    assert facts(model, SMALL)[1:] == facts(other, SMALL)[1:]
    (summary, conversion) = (
        randlora.files.inspect(saved),
        randlora.files.convert(saved, tmp_path / "converted", "native"),
    )
    for notes in (summary.notes, conversion.notes):
        assert any(message in note and "the files come from different saves" in note for note in notes)
    assert not randlora.files.verify(saved).passed
    again = SMALL.build()
    randlora.load(again, tmp_path / "converted")
    assert facts(again, SMALL)[1:] == facts(other, SMALL)[1:]


@pytest.mark.parametrize("storage", ["seed", "stored"])
def test_tensors_with_our_header_need_no_json(storage: Stored, saved: Path) -> None:
    model = trained(SMALL, **OPTIONS)
    randlora.save(model, saved, bases=storage)
    (saved / CONFIG_FILE).unlink()
    twin = SMALL.build()
    doubted(twin, saved, f"there is no {CONFIG_FILE}")
    assert facts(twin, SMALL)[1:] == facts(model, SMALL)[1:]
    assert randlora.files.inspect(saved).nbytes == (saved / TENSORS_FILE).stat().st_size


def test_a_json_that_appears_within_a_moment_is_waited_for(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (saved / CONFIG_FILE).read_text(encoding="utf-8")
    edit_fields(saved, {"r": 7})
    monkeypatch.setattr(read, "PATIENCE", 5.0)
    monkeypatch.setattr(time, "sleep", lambda _: (saved / CONFIG_FILE).write_text(text, encoding="utf-8"))
    randlora.load(SMALL.build(), saved)  # where a warning is an error


def test_an_old_json_that_contradicts_the_tensors_is_not_waited_for(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_fields(saved, {"r": 7})
    now = time.time()
    monkeypatch.setattr(read, "PATIENCE", 5.0)
    monkeypatch.setattr(time, "time", lambda: now + 60)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
    doubted(SMALL.build(), saved, "says r=7")


def test_files_without_header_that_are_replaced_while_they_are_read_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The options of one adapter and the tensors of another would load without a word: their shapes are equal."""
    made = {}
    for name, alpha in (("old", 3.0), ("new", 5.0)):
        made[name] = trained(LINEAR, alpha=alpha)
        randlora.save(made[name], tmp_path / name)
        edit_tensors(tmp_path / name, {})
    shutil.copytree(tmp_path / "old", tmp_path / "there")

    def replaced(path: Path) -> Any:
        for name in (TENSORS_FILE, CONFIG_FILE):
            shutil.copy(tmp_path / "new" / name, path.parent / name)
        return open_shard(path)

    monkeypatch.setattr(read, "PATIENCE", 5.0)
    monkeypatch.setattr(read, "open_shard", replaced)
    model = LINEAR.build()
    randlora.load(model, tmp_path / "there")
    assert torch.equal(LINEAR.output(model), LINEAR.output(made["new"]))


def test_the_other_file_of_two_saves_with_equal_options_says_nothing_else(saved: Path, tmp_path: Path) -> None:
    body = Case("body", SMALL.make, {"targets": ["0"]})
    randlora.save(trained(body, **OPTIONS), tmp_path / "other")
    shutil.copy(tmp_path / "other" / TENSORS_FILE, saved / TENSORS_FILE)
    model = SMALL.build()
    randlora.load(model, saved)
    (info,) = randlora.adapters(model)
    assert (info.targets, info.train_also) == (("0",), ())


def test_a_header_under_a_damaged_name_is_refused(saved: Path) -> None:
    tensors, metadata = read_tensors(saved)
    write_tensors(saved, tensors, {"format": "pt", "sandlora": metadata["randlora"]})
    refused(SMALL.build(), saved, "has a header under a damaged name")


@pytest.mark.parametrize(
    ("changes", "drop"),
    [
        ({f"{PREFIX}0.bias": torch.ones(2)}, ()),
        ({}, (f"{PREFIX}1.base_layer.bias",)),
        ({f"{PREFIX}1.bias": torch.ones(3)}, (f"{PREFIX}1.base_layer.bias",)),
        ({}, (LAMBDA, GAMMA)),
        ({f"{PREFIX}2.randlora_lambda": torch.ones(2, 1), f"{PREFIX}2.randlora_gamma": torch.ones(1, 2)}, ()),
    ],
    ids=["more-trained", "fewer-trained", "another-trained", "fewer-targets", "more-targets"],
)
def test_tensors_that_the_header_does_not_name_are_refused_though_the_seal_is_whole(
    changes: Mapping[str, Tensor], drop: tuple[str, ...], saved: Path
) -> None:
    reseal(saved, changes, drop=drop)
    refused(SMALL.build(), saved, "cannot read")


def test_a_damaged_file_leaves_the_adapters_of_a_model_alone(saved: Path) -> None:
    model = trained(HEADED, name="first")
    (saved / TENSORS_FILE).write_bytes((saved / TENSORS_FILE).read_bytes()[:-1])
    refused(model, saved, "truncated or damaged", name="second")


@pytest.mark.parametrize("basis", ["block", "dense"])
def test_tensors_that_lost_their_header_are_not_taken_for_pefts(tmp_path: Path, basis: Any) -> None:
    """Some tools write safetensors anew without the metadata; PEFT's way of drawing would give other bases."""
    model = nn.Sequential(nn.Linear(8, 8))
    randlora.inject(model, r=4, targets="all-linear", basis=basis, stream="portable")
    randlora.save(model, tmp_path)
    path = tmp_path / TENSORS_FILE
    save_file(load_file(path), path)
    with pytest.raises(CheckpointError, match="have lost the header that goes with randlora_stream"):
        randlora.load(nn.Sequential(nn.Linear(8, 8)), tmp_path)


MEBIBYTE = 2**20
WIDTH, LAYERS, R = 1024, 48, 32

SCRIPT = """
import json, resource, sys
from pathlib import Path
import torch
from torch import nn
import randlora
from randlora.checkpoint.read import read_adapter

def kibibytes(name):
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name + ":"))

small, large, what, width, layers = *sys.argv[1:4], *map(int, sys.argv[4:])

def run(directory, width):
    if what == "read":
        return read_adapter(Path(directory))
    model = nn.Sequential(nn.Linear(width, width), *(nn.Linear(8, 8) for _ in range(layers)))
    return model, randlora.load(model, directory)

run(small, 16)  # so that code which is used for the first time counts for nothing
before = kibibytes("VmRSS")
kept = run(large, width)
peak = 1024 * (kibibytes("VmHWM") - before)
del kept
randlora.files.inspect(small)
room = Path(large, "adapter_model.safetensors").stat().st_size // 2 + 1024 * kibibytes("VmData")
resource.setrlimit(resource.RLIMIT_DATA, (room, room))
print(json.dumps({"peak": peak, "storage": randlora.files.inspect(large).storage}))
"""


def from_peft(directory: Path, width: int) -> Path:
    """Let PEFT write an adapter of one wide layer and many narrow ones, each with a copy of the wide one's bases."""
    model = nn.Sequential(nn.Linear(width, width), *(nn.Linear(8, 8) for _ in range(LAYERS)))
    names = [str(index) for index in range(LAYERS + 1)]
    get_peft_model(model, RandLoraConfig(r=R, target_modules=names)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return from_peft(tmp_path_factory.mktemp("small"), 16), from_peft(tmp_path_factory.mktemp("large"), WIDTH)


@pytest.mark.medium
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(("what", "copies"), [further("read", 2), ("load", 6)])
def test_a_file_of_200_megabytes_takes_the_memory_of_one_copy_of_its_bases(
    what: str, copies: int, directories: tuple[Path, Path]
) -> None:
    """To load takes the model, bases that are drawn to compare, and a chunk; to inspect, room for half of the file."""
    small, large = directories
    one_copy = 4 * (R * WIDTH + WIDTH * WIDTH)
    file = (large / TENSORS_FILE).stat().st_size
    assert file > max(200 * MEBIBYTE, LAYERS * one_copy)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, (small, large, what, WIDTH, LAYERS))],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["storage"] == f"stored {LAYERS + 2} times in the file"  # once for every layer, and once at the top
    peak = found["peak"]
    assert peak < copies * one_copy + 6 * MEBIBYTE < file / 5

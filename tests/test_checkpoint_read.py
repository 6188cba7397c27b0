"""Reading files: what is damaged or foreign is refused without a trace, the header decides, and memory is bounded."""

import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
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


def misread(directory: Path, case: Case, file: Path, versions: Iterable[tuple[object, bytes]]) -> list[object]:
    """Give a file other contents, one after the other, and list those that load as another adapter than the file's."""
    model, whole = case.build(), file.read_bytes()
    before = snapshot(model)
    randlora.load(model, directory)
    expected = facts(model, case)
    randlora.eject(model)
    wrong = []
    for label, contents in versions:
        file.write_bytes(contents)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=f"{CONFIG_FILE} says")
                randlora.load(model, directory)
        except CheckpointError:
            continue
        if facts(model, case) != expected:
            wrong.append(label)
        randlora.eject(model)
    file.write_bytes(whole)
    assert snapshot(model) == before
    return wrong


def damaged(raw: bytes, *, everywhere: bool) -> Iterable[tuple[object, bytes]]:
    """Flip each bit of the length and of our key, and one of every third byte, or each; and cut the bytes short."""
    key = raw.find(b'"randlora"')
    exact = {*range(8), *range(key - 2, key + 12)} if key >= 0 else set[int]()
    for place, byte in enumerate(raw):
        bits = range(8) if everywhere or place in exact else [(place + place // 8) % 8] if place % 3 == 0 else []
        for bit in bits:
            yield (place, bit), raw[:place] + bytes([byte ^ 1 << bit]) + raw[place + 1 :]
    for length in range(len(raw)):
        if everywhere or length % 5 == 0 or length > len(raw) - 8:
            yield length, raw[:length]


@pytest.mark.parametrize("name", [TENSORS_FILE, CONFIG_FILE])
@pytest.mark.parametrize("everywhere", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_file_with_a_flipped_bit_or_cut_short_is_refused_or_changes_nothing(
    name: str, saved: Path, *, everywhere: bool
) -> None:
    raw = (saved / name).read_bytes()
    assert misread(saved, SMALL, saved / name, damaged(raw, everywhere=everywhere)) == []
    for contents in (raw[:-1], raw + b"\0") if name == TENSORS_FILE else ():
        (saved / name).write_bytes(contents)
        refused(SMALL.build(), saved, "truncated or damaged")


NO_ADAPTER = "describes no RandLoRA adapter"


def test_a_damaged_or_foreign_json_is_refused(saved: Path) -> None:
    for contents, message in {
        b"": "is damaged",
        b"{": "is damaged",
        b"\xff\xfe": "is damaged",
        b"[" * 100_000: "is damaged",
        b"null": f"{NO_ADAPTER}: expected peft_type='RANDLORA', got None",
        b"[]": NO_ADAPTER,
        b'"RANDLORA"': NO_ADAPTER,
        b'{"peft_type": "LORA"}': "expected peft_type='RANDLORA', got 'LORA'",
        b'{"peft_type": ["RANDLORA"]}': "got ['RANDLORA']",
    }.items():
        (saved / CONFIG_FILE).write_bytes(contents)
        refused(SMALL.build(), saved, message)


def test_a_missing_file_is_named(saved: Path) -> None:
    edit_tensors(saved, {})  # which our header would make do without the JSON
    for name, message in ((TENSORS_FILE, "nothing is unpick"), (CONFIG_FILE, f"{CONFIG_FILE} and {TENSORS_FILE}")):
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
        ({"r": 1, "alpha": 3.5}, "says r=2, the tensors were saved with 1"),
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
    other, model, again = trained(SMALL, **{**OPTIONS, **options}), SMALL.build(), SMALL.build()
    randlora.save(other, tmp_path / "other")
    shutil.copy(tmp_path / "other" / TENSORS_FILE, saved / TENSORS_FILE)
    doubted(model, saved, message)
    assert facts(model, SMALL)[1:] == facts(other, SMALL)[1:]
    for report in (randlora.files.inspect(saved), randlora.files.convert(saved, tmp_path / "converted", "native")):
        assert any(message in note and "the files come from different saves" in note for note in report.notes)
    assert not randlora.files.verify(saved).passed
    randlora.load(again, tmp_path / "converted")
    assert facts(again, SMALL)[1:] == facts(other, SMALL)[1:]


def test_tensors_with_our_header_need_no_json(saved: Path) -> None:
    model = trained(SMALL, **OPTIONS)
    bases: tuple[Stored, ...] = ("seed", "stored")
    for storage in bases:
        randlora.save(model, saved, bases=storage)
        (saved / CONFIG_FILE).unlink()
        twin = SMALL.build()
        doubted(twin, saved, f"there is no {CONFIG_FILE}")
        assert facts(twin, SMALL)[1:] == facts(model, SMALL)[1:]
        assert randlora.files.inspect(saved).nbytes == (saved / TENSORS_FILE).stat().st_size


def test_a_json_that_appears_within_a_moment_is_waited_for_unless_it_is_old(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (saved / CONFIG_FILE).read_text(encoding="utf-8")
    edit_fields(saved, {"r": 7})
    monkeypatch.setattr(read, "PATIENCE", 5.0)
    monkeypatch.setattr(time, "sleep", lambda _: (saved / CONFIG_FILE).write_text(text, encoding="utf-8"))
    randlora.load(SMALL.build(), saved)  # where a warning is an error
    edit_fields(saved, {"r": 7})
    now = time.time()
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


def test_tensors_that_the_header_does_not_name_are_refused_though_the_seal_is_whole(saved: Path) -> None:
    whole, trained_too = (saved / TENSORS_FILE).read_bytes(), f"{PREFIX}1.base_layer.bias"
    changes: list[tuple[Mapping[str, Tensor], tuple[str, ...]]] = [
        ({f"{PREFIX}0.bias": torch.ones(2)}, ()),
        ({}, (trained_too,)),
        ({f"{PREFIX}1.bias": torch.ones(3)}, (trained_too,)),
        ({}, (LAMBDA, GAMMA)),
        ({f"{PREFIX}2.randlora_lambda": torch.ones(2, 1), f"{PREFIX}2.randlora_gamma": torch.ones(1, 2)}, ()),
    ]
    for more, fewer in changes:
        reseal(saved, more, drop=fewer)
        refused(SMALL.build(), saved, "cannot read")
        (saved / TENSORS_FILE).write_bytes(whole)


def test_a_damaged_file_leaves_the_adapters_of_a_model_alone(saved: Path) -> None:
    model = trained(HEADED, name="first")
    tensors, metadata = read_tensors(saved)
    write_tensors(saved, tensors, {"format": "pt", "sandlora": metadata["randlora"]})
    refused(model, saved, "has a header under a damaged name", name="second")
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

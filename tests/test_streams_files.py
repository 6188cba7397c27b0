"""Files and the two streams of PEFT: those that say theirs, those that prove it, and those that say neither."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import randlora
from randlora.bases.basis import Basis
from randlora.bases.spec import PEFT_STREAMS
from randlora.checkpoint.header import parse_header
from randlora.config import Stream
from randlora.errors import CheckpointError, ConfigError
from tests.checkpoint_files import (
    BASIS_A,
    BASIS_B,
    LINEAR,
    basis_of,
    edit_fields,
    edit_tensors,
    peft_directory,
    read_fields,
    read_tensors,
    refused,
    reseal,
    trained,
)
from tests.directories import base_directory, our_directory
from tests.models import LLAMA
from tests.peer import THEIR_WARNINGS, assert_same_effect, in_peft
from tests.test_golden import CASE, DATA

pytestmark = THEIR_WARNINGS

OURS, PEFTS = DATA / "golden_v1_torch_2_11", DATA / "golden_peft_torch_2_11"
"""One adapter, saved under torch 2.11.0 by this library, before the stream had a name, and by PEFT without bases."""

EXPECTED = json.loads((OURS / "expected.json").read_text(encoding="utf-8"))["delta_weight"]
"""The update of each layer, computed under torch 2.11.0; a test compares PEFT's with ours."""

ASSUMED = "PEFT stored neither the bases nor the torch that drew them"


def delta_weights(model: nn.Module) -> dict[str, Any]:
    (info,) = randlora.adapters(model)
    return {fqn: randlora.delta_weight(model, fqn).tolist() for fqn in info.targets}


def stream_of(directory: Path, of: str = "basis") -> str:
    """Read the stream in a header."""
    return str(json.loads(read_tensors(directory)[1]["randlora"])[of]["stream"])


def test_a_digest_decides_between_the_streams(tmp_path: Path) -> None:
    """Of a file of ours that was saved before the stream had a name."""
    streams: tuple[Stream | None, ...] = (None, "torch-2.11")
    for stream in streams:
        model, twin = CASE.build(), CASE.build()
        report = randlora.load(model, OURS, stream=stream)
        assert delta_weights(model) == EXPECTED
        assert [spec.stream for spec in report.specs] == ["torch-2.11"]
        assert ASSUMED not in str(report)
    randlora.save(model, tmp_path / "again")
    assert stream_of(tmp_path / "again") == "torch-2.11"
    randlora.load(twin, tmp_path / "again")
    assert delta_weights(twin) == EXPECTED
    assert randlora.adapters(twin)[0].config == randlora.adapters(model)[0].config
    refused(CASE.build(), OURS, "stream=\"torch\" is given, but the file's bases are from 'torch-2.11'", stream="torch")

    summary = randlora.files.inspect(OURS)
    assert (summary.config.stream, summary.bases[0].spec.stream, summary.notes) == ("torch-2.11", "torch-2.11", ())
    assert randlora.files.verify(OURS).passed
    randlora.files.convert(OURS, tmp_path / "native", "native")
    assert stream_of(tmp_path / "native", "config") == "torch-2.11"
    converted = randlora.files.convert(OURS, tmp_path / "peft", "peft")
    assert converted.notes == ("the bases are in the file: PEFT would draw different ones from the seed",)


# Files of PEFT without bases, which do not say under which torch they were trained


def test_without_a_stream_todays_is_assumed_and_the_report_says_so() -> None:
    assert json.loads((PEFTS / "expected.json").read_text(encoding="utf-8"))["delta_weight"] == EXPECTED
    model, other = CASE.build(), CASE.build()
    report = randlora.load(model, PEFTS, stream="torch-2.11")
    assert delta_weights(model) == EXPECTED
    assert ASSUMED not in str(report)
    (note,) = [note for note in randlora.load(other, PEFTS).notes if note.startswith(ASSUMED)]
    assert 'give stream="torch-2.11" for it' in note
    assert delta_weights(other) != EXPECTED


@pytest.mark.parametrize("stream", [None, *PEFT_STREAMS])
def test_every_verb_takes_the_stream_or_says_what_it_assumed(stream: Stream | None, tmp_path: Path) -> None:
    """Of a file that PEFT saves without bases, of an adapter trained under torch 2.11 or older."""
    (adapter, expected), base = our_directory(LLAMA, tmp_path, stream="torch-2.11"), base_directory(LLAMA, tmp_path)
    edit_tensors(adapter, {})
    edit_fields(adapter, {}, drop=["randlora_stream"])
    files, loaded, native = randlora.files, LLAMA.build(), LLAMA.build()
    summary = files.inspect(adapter, base, stream=stream)
    verification = files.verify(adapter, base, stream=stream)
    assert (summary.bases[0].spec.stream, verification.passed) == (stream or "torch", True)
    merged = files.merge(adapter, tmp_path / "merged", base=base, stream=stream)
    reports = [
        str(randlora.load(loaded, adapter, stream=stream)),
        *(str(verification), *summary.notes, *files.inspect(adapter, stream=stream).notes[:1], *merged.notes),
        *files.convert(adapter, tmp_path / "native", "native", base=base, stream=stream).notes,
        *files.convert(adapter, tmp_path / "lora", "lora", base=base, tolerance=1.0, stream=stream).notes[:1],
        *files.convert(adapter, tmp_path / "peft", "peft", base=base, stream=stream).notes[:1],
    ]
    assert sum(ASSUMED in report for report in reports) == (8 if stream is None else 0)
    assert stream or merged.notes[0].startswith(f"{adapter}: {ASSUMED}")
    assert (delta_weights(loaded) == delta_weights(expected)) == (stream == "torch-2.11")
    before, after = (load_file(directory / "model.safetensors") for directory in (base, tmp_path / "merged"))
    for fqn in randlora.adapters(loaded)[0].targets:
        update = randlora.delta_weight(loaded, fqn)
        assert torch.equal(after[f"{fqn}.weight"], before[f"{fqn}.weight"] + update)

    assert {stream_of(tmp_path / "native", of) for of in ("basis", "config")} == {stream or "torch"}
    assert ASSUMED not in str(randlora.load(native, tmp_path / "native"))
    assert delta_weights(native) == delta_weights(loaded)
    assert [check.outcome for check in files.verify(tmp_path / "native").checks] == ["passed"] * 3
    if stream:  # PEFT finds the bases in the file, and draws none
        assert_same_effect(loaded, in_peft(LLAMA, tmp_path / "peft"), LLAMA)


def test_bases_of_a_stream_are_not_written_for_layers_whose_shapes_no_file_says(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="give base=, the directory of its base model"):
        randlora.files.convert(PEFTS, tmp_path / "lost", "peft", stream="torch-2.11")
    assert not (tmp_path / "lost").exists()


# Files that do say it, or need not


@pytest.mark.parametrize("stream", PEFT_STREAMS)
def test_bases_that_peft_stored_decide_between_the_streams(stream: Stream, tmp_path: Path) -> None:
    directory = peft_directory(tmp_path / "peft", stream=stream)
    model = LINEAR.build()
    report = randlora.load(model, directory)
    assert (basis_of(model).stored, basis_of(model).spec.stream) == (None, stream)
    assert ASSUMED not in str(report)
    randlora.save(model, tmp_path / "seed")  # which they need no place in
    assert torch.equal(LINEAR.output(model), LINEAR.output(trained(LINEAR, stream=stream)))
    assert ASSUMED not in str(randlora.load(LINEAR.build(), of_one_stream(tmp_path / "sparse")))


def saved(parent: Path, **options: Any) -> Path:
    randlora.save(trained(LINEAR, **options), parent)
    return parent


def of_one_stream(parent: Path) -> Path:
    """Save ternary bases, which PEFT draws from one stream only, as their seed."""
    directory = peft_directory(parent, r=4, basis="sparse")
    edit_tensors(directory, {}, drop=[BASIS_A, BASIS_B])
    return directory


def of_no_seed(parent: Path) -> Path:
    directory = peft_directory(parent)
    edit_tensors(directory, {BASIS_A: torch.randn(2, 1, 5), BASIS_B: torch.randn(6, 3, 2)})
    return directory


def of_two_streams(parent: Path) -> Path:
    """Forge a digest of each: a file says one stream for every r."""
    saved(parent, r={"0": 2, ".*": 3})
    header = parse_header(read_tensors(parent)[1]["randlora"], read_tensors(parent)[0])
    record = header.bases[2]
    forged = Basis(replace(record.spec, stream="torch-2.11")).digest(record.spec.max_dim, record.spec.min_dim)
    reseal(parent, bases={**header.bases, 2: replace(record, digest=forged)})
    return parent


GIVEN = "is given, but the file's bases are from"
NO_STREAM = "stream must be one of torch, torch-2.11, portable or None, got "
WRONG: dict[str, tuple[Callable[[Path], Path], Any, str]] = {
    "the header's": (saved, "torch-2.11", f"stream=\"torch-2.11\" {GIVEN} 'torch': omit it"),
    "portable": (lambda place: saved(place, stream="portable"), "torch", f"stream=\"torch\" {GIVEN} 'portable': omit"),
    "stored": (peft_directory, "torch-2.11", f"{GIVEN} 'torch': omit it"),
    "of no seed": (of_no_seed, "torch", f'stream="torch" {GIVEN} no seed: omit it'),
    "not PEFT's": (lambda _: PEFTS, "portable", "PEFT draws dense bases from stream='torch' or 'torch-2.11', got"),
    "of one": (of_one_stream, "torch-2.11", "PEFT draws sparse bases from stream='torch', got 'torch-2.11'"),
    "of two": (of_two_streams, None, "its bases are from several streams, torch and torch-2.11"),
    "no stream": (lambda _: OURS, "numpy", NO_STREAM),
    "no string": (lambda _: OURS, 3, NO_STREAM),
}


@pytest.mark.parametrize(("make", "stream", "message"), WRONG.values(), ids=WRONG)
def test_a_stream_that_contradicts_the_file_is_an_error_of_every_verb(
    make: Callable[[Path], Path], stream: Any, message: str, tmp_path: Path
) -> None:
    directory, out = make(tmp_path / "adapter"), tmp_path / "out"
    error = ConfigError if message is NO_STREAM else CheckpointError
    model = CASE.build() if directory in (PEFTS, OURS) else LINEAR.build()
    refused(model, directory, message, error=error, stream=stream)
    calls: list[Callable[[], object]] = [
        lambda: randlora.files.inspect(directory, stream=stream),
        lambda: randlora.files.convert(directory, out, stream=stream),
    ]
    if error is ConfigError:  # before the base is looked for
        calls += [
            lambda: randlora.files.verify(directory, stream=stream),
            lambda: randlora.files.merge(directory, out, base=tmp_path / "base", stream=stream),
        ]
    else:
        assert message in str(randlora.files.verify(directory, stream=stream))
    for call in calls:
        with pytest.raises(error, match=re.escape(message)):
            call()
    assert not out.exists()


# PEFT, for which a file is saved


@pytest.mark.parametrize("version", ["2.11.0", "2.12.0", "2.15.0+cpu"])
def test_save_says_where_peft_draws_the_same(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = {stream: trained(LINEAR, stream=stream) for stream in PEFT_STREAMS}
    monkeypatch.setattr(torch, "__version__", version)
    newer, older = "2.12 and newer", "2.11 and older"
    for stream, model in adapters.items():
        notes = randlora.save(model, tmp_path / "seed").notes
        those = newer if stream == "torch" else older
        note = f"PEFT draws stream={stream!r} under torch {those} only: save with bases='stored' to load under any"
        assert notes == ((note,) if stream == "torch-2.11" or version == "2.11.0" else ())
        assert read_fields(tmp_path / "seed").get("randlora_stream") == (None if stream == "torch" else stream)
        assert randlora.save(model, tmp_path / "stored", bases="stored").notes == ()
        assert "randlora_stream" not in read_fields(tmp_path / "stored")

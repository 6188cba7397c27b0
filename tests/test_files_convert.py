"""Adapters converted to PEFT's format or to ours do what they did, joined parts are the whole, and streams are told."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import randlora
from randlora import files
from randlora.bases.basis import Basis
from randlora.bases.spec import PEFT_STREAMS
from randlora.checkpoint.header import ModelClass, parse_header
from randlora.checkpoint.read import read_adapter
from randlora.config import Stream
from randlora.errors import CheckpointError, ConfigError
from tests import checkpoint_files as stored
from tests import peer
from tests.checkpoint_files import LINEAR, edit_fields, edit_tensors, peft_directory, read_fields, read_tensors, refused
from tests.kit import all_bits, fill
from tests.model_directories import contents
from tests.models import BERT, GPT2, LLAMA, VIT, RealModel, outputs, reproducible
from tests.peer import THEIR_WARNINGS, assert_same_effect, base_directory, in_ours, in_peft, our_directory
from tests.test_golden import CASE, DATA

pytestmark = [*THEIR_WARNINGS, pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")]


def stated(directory: Path) -> tuple[Any, ...]:
    """Return what files say, with the bits of tensors, but for what none of PEFT says; names are in no order."""
    (tensors, header), fields = read_tensors(directory), read_fields(directory)
    facts = json.loads(header.pop("randlora")) | dict.fromkeys(("model_class", "sha256"))
    return all_bits(tensors), header, facts, fields | {"target_modules": None}


def scaled(kind: RealModel, parent: Path) -> tuple[Path, Any]:
    source, theirs = peer.their_directory(kind, parent)
    with torch.no_grad():
        theirs.base_model.randlora_B["default"].mul_(1.5)
    theirs.save_pretrained(source)
    return source, theirs


ours, theirs = our_directory, peer.their_directory
SOURCES: dict[str, tuple[RealModel, Callable[[RealModel, Path], tuple[Path, Any]], bool]] = {
    "dense": (LLAMA, ours, peer.PEFT_STREAM != "torch"),
    "portable": (VIT, partial(ours, basis="very_sparse", stream="portable"), True),
    "stored blocks": (LLAMA, partial(ours, bases="stored", basis="block"), True),
    "PEFT's key": (LLAMA, partial(theirs, save_projection=False, projection_prng_key=11), False),
    "PEFT's head and biases": (BERT, partial(theirs, modules_to_save=["classifier"], bias="randlora_only"), True),
    "PEFT's sparse": (GPT2, partial(theirs, basis="sparse", projection_prng_key=-3), True),
    "PEFT's of no key": (LLAMA, scaled, True),
}
"""What makes an adapter, ours or PEFT's, and whether PEFT needs the bases in the file."""


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_converted_does_what_it_did_and_is_the_file_that_save_writes(name: str, tmp_path: Path) -> None:
    kind, make, holds_bases = SOURCES[name]
    source, model = make(kind, tmp_path)
    before, base, is_theirs = contents(source), base_directory(kind, tmp_path), "PEFT" in name
    given: dict[str, Any] = {"base": base, "stream": peer.told_stream(source)} if is_theirs else {}
    peft, native, back = (tmp_path / each for each in ("peft", "native", "back"))
    for to in ("native", "lora") if is_theirs else ():
        with pytest.raises(CheckpointError, match="give base=, the directory of its base model"):
            files.convert(source, native, to)
    to_peft = files.convert(source, peft, "peft")
    to_native = files.convert(source, native, "native", **given)
    files.convert(peft, back, "native", **given)
    assert contents(source) == before

    loaded = in_peft(kind, peft)
    if is_theirs:
        assert torch.equal(outputs(loaded, kind.inputs()), outputs(model, kind.inputs()))
        assert read_fields(peft) == read_fields(source)
    for each in (model, *(in_ours(kind, directory) for directory in (peft, native, back))):
        assert_same_effect(each, model if is_theirs else loaded, kind)
    bases = [key for key in load_file(peft / stored.TENSORS_FILE) if key.endswith("randlora_B")]
    assert bases == ["base_model.randlora_B"] * holds_bases, "of which PEFT stores a copy for each layer"
    told = [[note for note in each.notes if "bases are in" in note] for each in (to_peft, to_native)]
    drawn = ["the bases are in the file: PEFT would draw different ones from the seed"] * holds_bases
    assert told[0] == ([] if is_theirs else drawn)
    assert told[1] == ["the bases are in the file: no seed reproduces them"] * (make is scaled)
    assert "randlora_stream" not in read_fields(peft)

    randlora.save(in_ours(kind, source), tmp_path / "saved", bases="stored" if make is scaled else "seed")
    for directory in (native, back):
        assert stated(directory) == stated(tmp_path / "saved")
    for directory in (source, peft, native, back):
        assert files.verify(directory).passed
    assert ("its key gives different ones here" in str(files.verify(source))) == (make is scaled)


def test_bases_narrower_than_what_peft_allocates_are_filled_up(tmp_path: Path) -> None:
    """A wide and a tall layer want a square of PEFT, of which bases drawn for the wide one alone are a part."""

    def build() -> nn.Module:
        return nn.Sequential(OrderedDict(wide=nn.Linear(20, 12), tanh=nn.Tanh(), tall=nn.Linear(12, 20)))

    model, plain, again = (reproducible(build) for _ in range(3))
    randlora.inject(model, r=4, targets=["wide"], name="narrow")
    randlora.inject(model, r=4, targets=["wide", "tall"], name="both")
    randlora.activate(model, "both")
    randlora.set_trainable(model, "both")
    fill(model, "both")
    saved = randlora.save(model, tmp_path / "ours", name="both", bases="stored")
    assert "too narrow for PEFT" in "".join(saved.notes)
    files.convert(tmp_path / "ours", tmp_path / "out")
    x = torch.randn(5, 20)
    assert (model(x) - plain(x)).abs().max() > 0.1
    theirs = PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-4)
    randlora.load(again, tmp_path / "out")
    assert torch.equal(again(x), model(x))


def test_other_files_and_strange_fields_stay_and_what_is_there_already_is_replaced_on_demand(tmp_path: Path) -> None:
    source, out = our_directory(LLAMA, tmp_path, "block")[0], tmp_path / "out"
    edit_fields(source, {"use_quantum": 3, "base_model_name_or_path": "some/model"})  # of which the first is unknown
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    shutil.copy(source / "README.md", out)  # as of an adapter that was saved here before
    files.convert(source, out, "native", overwrite=True)
    assert sorted(contents(out)) == [stored.CONFIG_FILE, stored.TENSORS_FILE, "notes.txt"]
    assert read_fields(out) == read_fields(source)
    with pytest.raises(CheckpointError, match="an input that must not change"):
        files.convert(source, out / "inside", "native", base=out, overwrite=True)


def test_an_adapter_whose_json_is_gone_becomes_one_of_peft(tmp_path: Path) -> None:
    source, model = our_directory(LLAMA, tmp_path)
    (source / stored.CONFIG_FILE).unlink()
    files.convert(source, tmp_path / "peft", "peft")
    assert_same_effect(model, in_peft(LLAMA, tmp_path / "peft"), LLAMA)


def whole_model(transposed: int = 0) -> nn.ModuleDict:
    """Return a model of four blocks and a head, of which the first blocks may store their weights transposed."""
    model = nn.ModuleDict()
    for index, (in_, out) in enumerate(pairwise((6, 10, 6, 14, 8))):
        pair = [Conv1D(out, in_), Conv1D(3, in_)] if index < transposed else [nn.Linear(in_, out), nn.Linear(in_, 3)]
        model[str(index)] = nn.ModuleDict(dict(zip("qv", pair, strict=True)))
    model["head"] = nn.Linear(8, 3)
    return model


def stages(*cuts: int, transposed: int = 0) -> list[nn.ModuleDict]:
    """Return models of which each has the modules of the whole up to the next cut."""
    model = whole_model(transposed)
    bounds = pairwise([0, *cuts, len(model)])
    return [nn.ModuleDict({name: model[name] for name in [*model][start:end]}) for start, end in bounds]


def saved(model: nn.ModuleDict, directory: Path, **options: Any) -> Path:
    also = ["head"] if "head" in model else None
    randlora.inject(model, **{"r": 2, "targets": ["q", "v"], "stream": "portable", "train_also": also, **options})
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(sum(name.encode()))
            parameter.data = torch.randn(parameter.shape, generator=generator)
    randlora.save(model, directory)
    (directory / "README.md").unlink()
    return directory


@pytest.mark.parametrize(
    ("cuts", "transposed", "options"),
    [
        ((1,), 1, {"alpha": {"q": 3.0, ".*": 5.0}, "dropout": 0.1}),  # a part of Conv1D alone, as no whole is
        ((1, 2, 3), 4, {"r": 4, "basis": "block", "blocks": (2, 2)}),
        ((2,), 0, {"r": {"v": 4, ".*": 2}, "basis": "sparse"}),
    ],
)
def test_joined_parts_are_the_files_of_the_whole(
    cuts: tuple[int, ...], transposed: int, options: dict[str, Any], tmp_path: Path
) -> None:
    made = stages(*cuts, transposed=transposed)
    parts = [saved(stage, tmp_path / str(index), **options) for index, stage in enumerate(made)]
    report = files.join(parts, tmp_path / "joined")
    assert contents(tmp_path / "joined") == contents(saved(whole_model(transposed), tmp_path / "whole", **options))
    assert report.layers == 8
    assert f"8 layers of {len(parts)} parts" in str(report)


UNLIKE: list[tuple[dict[str, Any], str]] = [
    ({"stream": "torch"}, "and no model can use both at once: train the parts with stream='portable'"),
    ({"seed": 1}, "seed is 0 in "),
    ({"dropout": 0.5}, "dropout is 0.0 in "),
    ({"basis": "sparse"}, "basis is 'dense' in "),
    ({"targets": r"[1-3]\.q"}, "both have 1.q"),
]


def test_parts_of_different_adapters_are_refused(tmp_path: Path) -> None:
    for number, (options, said) in enumerate(UNLIKE):
        first, second = stages(2)
        parts = [
            saved(first, tmp_path / f"a{number}", **(options if "stream" in options else {})),
            saved(whole_model() if "targets" in options else second, tmp_path / f"b{number}", **options),
        ]
        with pytest.raises(CheckpointError, match=f"(?s)cannot join.*{re.escape(said)}"):
            files.join(parts, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_each_layer_keeps_its_alpha_and_what_two_parts_train_must_be_one(tmp_path: Path) -> None:
    first, second = stages(2)
    first["head"] = copy.deepcopy(second["head"])
    parts = [saved(first, tmp_path / "a", alpha=3.0), saved(second, tmp_path / "b", alpha={"q": 3.0, ".*": 5.0})]
    joined, with_head = tmp_path / "joined", ModelClass("transformers", "BertForMaskedLM", labels=("a", "b"))
    for part, known in zip(parts, (replace(with_head, labels=None), with_head), strict=True):
        stored.reseal(part, model_class=known)
    files.join(parts, joined)
    header = read_adapter(joined).header
    assert header is not None
    assert header.model_class == with_head
    own = {fqn: option for part in parts for fqn, option in read_adapter(part).options.items()}
    assert {option.alpha for option in own.values()} == {3.0, 5.0}
    assert read_adapter(joined).options == own
    before = contents(joined)
    first.get_parameter("head.bias").data.add_(1)
    randlora.save(first, parts[0])
    with pytest.raises(CheckpointError, match=r"head\.bias has different values in .*a and in .*b"):
        files.join(parts, joined, overwrite=True)
    assert contents(joined) == before


OURS, PEFTS = DATA / "golden_v1_torch_2_11", DATA / "golden_peft_torch_2_11"
"""One adapter, saved under torch 2.11.0 by this library, before the stream had a name, and by PEFT without bases."""
EXPECTED, OF_PEFT = (
    json.loads((each / "expected.json").read_text(encoding="utf-8"))["delta_weight"] for each in (OURS, PEFTS)
)
"""The update of each layer, computed under torch 2.11.0."""
ASSUMED = "PEFT stored neither the bases nor the torch that drew them"


def delta_weights(model: nn.Module) -> dict[str, Any]:
    (info,) = randlora.adapters(model)
    return {fqn: randlora.delta_weight(model, fqn).tolist() for fqn in info.targets}


def stream_of(directory: Path, of: str = "basis") -> str:
    return str(json.loads(read_tensors(directory)[1]["randlora"])[of]["stream"])


def test_a_digest_decides_between_the_streams(tmp_path: Path) -> None:
    streams: tuple[Stream | None, ...] = (None, "torch-2.11")
    for stream in streams:
        model, twin = CASE.build(), CASE.build()
        report = randlora.load(model, OURS, stream=stream)
        assert (delta_weights(model), ASSUMED in str(report)) == (EXPECTED, False)
        assert [spec.stream for spec in report.specs] == ["torch-2.11"]
    of_peft = CASE.build()
    report = randlora.load(of_peft, PEFTS, stream="torch-2.11")
    assert (delta_weights(of_peft), OF_PEFT, ASSUMED in str(report)) == (EXPECTED, EXPECTED, False)
    randlora.save(model, tmp_path / "again")
    assert stream_of(tmp_path / "again") == "torch-2.11"
    randlora.load(twin, tmp_path / "again")
    assert delta_weights(twin) == EXPECTED
    assert randlora.adapters(twin)[0].config == randlora.adapters(model)[0].config
    summary = files.inspect(OURS)
    assert (summary.config.stream, summary.bases[0].spec.stream, summary.notes) == ("torch-2.11", "torch-2.11", ())
    assert files.verify(OURS).passed
    files.convert(OURS, tmp_path / "native", "native")
    assert stream_of(tmp_path / "native", "config") == "torch-2.11"
    converted = files.convert(OURS, tmp_path / "peft", "peft")
    assert converted.notes == ("the bases are in the file: PEFT would draw different ones from the seed",)


@pytest.mark.parametrize("stream", [None, *PEFT_STREAMS])
def test_every_verb_takes_the_stream_or_says_what_it_assumed(stream: Stream | None, tmp_path: Path) -> None:
    (adapter, expected), base = our_directory(LLAMA, tmp_path, stream="torch-2.11"), base_directory(LLAMA, tmp_path)
    edit_tensors(adapter, {})
    edit_fields(adapter, {}, drop=["randlora_stream"])
    loaded, native, given = LLAMA.build(), LLAMA.build(), {"base": base, "stream": stream}
    summary, verification = files.inspect(adapter, **given), files.verify(adapter, **given)  # type: ignore[arg-type]
    assert (summary.bases[0].spec.stream, verification.passed) == (stream or "torch", True)
    merged = files.merge(adapter, tmp_path / "merged", **given)  # type: ignore[arg-type]
    reports = [
        str(randlora.load(loaded, adapter, stream=stream)),
        *(str(verification), *summary.notes, *files.inspect(adapter, stream=stream).notes[:1], *merged.notes),
    ]
    for to in ("native", "lora", "peft"):
        more = {"tolerance": 1.0} if to == "lora" else {}
        reports += files.convert(adapter, tmp_path / to, to, **given, **more).notes[:1]  # type: ignore[arg-type]
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
    if stream in ("torch-2.11", peer.PEFT_STREAM):  # PEFT finds the bases in the file, or draws the same here
        assert_same_effect(loaded, in_peft(LLAMA, tmp_path / "peft"), LLAMA)


def of_ours(parent: Path, **options: Any) -> Path:
    randlora.save(stored.trained(LINEAR, **options), parent)
    return parent


def of_one_stream(parent: Path) -> Path:
    peft_directory(parent, r=4, basis="sparse")
    edit_tensors(parent, {}, drop=[stored.BASIS_A, stored.BASIS_B])
    return parent


def of_no_seed(parent: Path) -> Path:
    peft_directory(parent)
    edit_tensors(parent, {stored.BASIS_A: torch.randn(2, 1, 5), stored.BASIS_B: torch.randn(6, 3, 2)})
    return parent


def of_two_streams(parent: Path) -> Path:
    """Forge a digest of each: a file says one stream for every r."""
    tensors, metadata = read_tensors(of_ours(parent, r={"0": 2, ".*": 3}))
    bases = dict(parse_header(metadata["randlora"], tensors).bases)
    spec = bases[2].spec
    forged = Basis(replace(spec, stream="torch-2.11")).digest(spec.max_dim, spec.min_dim)
    stored.reseal(parent, bases={**bases, 2: replace(bases[2], digest=forged)})
    return parent


def test_bases_that_peft_stored_decide_between_the_streams(tmp_path: Path) -> None:
    for stream in PEFT_STREAMS:
        model, basis_of = LINEAR.build(), stored.basis_of
        report = randlora.load(model, peft_directory(tmp_path / stream, stream=stream))
        assert (basis_of(model).stored, basis_of(model).spec.stream, ASSUMED in str(report)) == (None, stream, False)
        randlora.save(model, tmp_path / "seed")  # which they need no place in
        assert torch.equal(LINEAR.output(model), LINEAR.output(stored.trained(LINEAR, stream=stream)))
    assert ASSUMED not in str(randlora.load(LINEAR.build(), of_one_stream(tmp_path / "sparse")))


GIVEN = "is given, but the bases are from"
NO_STREAM = "stream must be one of torch, torch-2.11, portable or None, got "
WRONG: list[tuple[Callable[[Path], Path], Any, str]] = [
    (of_ours, "torch-2.11", f"stream=\"torch-2.11\" {GIVEN} 'torch': omit it"),
    (lambda _: OURS, "torch", f"stream=\"torch\" {GIVEN} 'torch-2.11'"),
    (partial(of_ours, stream="portable"), "torch", f"stream=\"torch\" {GIVEN} 'portable': omit it"),
    (peft_directory, "torch-2.11", f"{GIVEN} 'torch': omit it"),
    (of_no_seed, "torch", f'stream="torch" {GIVEN} no seed: omit it'),
    (lambda _: PEFTS, "portable", "PEFT draws dense bases from stream='torch' or 'torch-2.11', got"),
    (of_one_stream, "torch-2.11", "PEFT draws sparse bases from stream='torch', got 'torch-2.11'"),
    (of_two_streams, None, "its bases are from several streams, torch and torch-2.11"),
    (lambda _: OURS, "numpy", NO_STREAM),
]


def test_a_stream_that_contradicts_the_file_is_an_error_of_every_verb(tmp_path: Path) -> None:
    for number, (make, stream, message) in enumerate(WRONG):
        directory, out = make(tmp_path / str(number)), tmp_path / "out"
        error = ConfigError if message is NO_STREAM else CheckpointError
        model = CASE.build() if directory in (PEFTS, OURS) else LINEAR.build()
        refused(model, directory, message, error=error, stream=stream)
        calls: list[Callable[[], object]] = [
            partial(files.inspect, directory, stream=stream),
            partial(files.convert, directory, out, stream=stream),
        ]
        if error is ConfigError:  # before the base is looked for
            calls.append(partial(files.verify, directory, stream=stream))
            calls.append(partial(files.merge, directory, out, base=tmp_path / "base", stream=stream))
        else:
            assert message in str(files.verify(directory, stream=stream))
        for call in calls:
            with pytest.raises(error, match=re.escape(message)):
                call()
        assert not out.exists()


@pytest.mark.parametrize("version", ["2.11.0", "2.12.0"])
def test_save_says_where_peft_draws_the_same(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = {stream: stored.trained(LINEAR, stream=stream) for stream in PEFT_STREAMS}
    monkeypatch.setattr(torch, "__version__", version)
    for stream, model in adapters.items():
        notes = randlora.save(model, tmp_path / "seed").notes
        those = "2.12 and newer" if stream == "torch" else "2.11 and older"
        note = f"PEFT draws stream={stream!r} under torch {those} only: save with bases='stored' to load under any"
        assert notes == ((note,) if stream == "torch-2.11" or version == "2.11.0" else ())
        assert read_fields(tmp_path / "seed").get("randlora_stream") == (None if stream == "torch" else stream)
        assert randlora.save(model, tmp_path / "stored", bases="stored").notes == ()
        assert "randlora_stream" not in read_fields(tmp_path / "stored")

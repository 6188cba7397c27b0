"""Adapters converted to PEFT's format or to ours do what they did, and those of parts join to that of the whole."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import randlora
from randlora.checkpoint.read import read_adapter
from randlora.config import BasisKind
from randlora.errors import CheckpointError
from tests.checkpoint_files import CONFIG_FILE, TENSORS_FILE, edit_fields, read_fields, read_tensors
from tests.directories import base_directory, our_directory, their_directory
from tests.kit import all_bits, fill
from tests.model_directories import contents
from tests.models import BERT, GPT2, LLAMA, VIT, RealModel, outputs, reproducible
from tests.peer import THEIR_WARNINGS, assert_same_effect, every_peft_kind, in_ours, in_peft, peft_draw, told_stream

pytestmark = [*THEIR_WARNINGS, pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")]

PORTABLE: dict[str, Any] = {"basis": "very_sparse", "stream": "portable"}


def assert_same_tensors_file(found: Path, expected: Path) -> None:
    """Compare tensors and header bit for bit, but for what no file of PEFT says; a header is in no order."""
    (tensors, header), (expected_tensors, expected_header) = read_tensors(found), read_tensors(expected)
    facts, expected_facts = (json.loads(metadata.pop("randlora")) for metadata in (header, expected_header))
    unsaid = dict.fromkeys(("model_class", "sha256"))
    assert (header, facts | unsaid) == (expected_header, expected_facts | unsaid)
    assert all_bits(tensors) == all_bits(expected_tensors)


@pytest.mark.parametrize(
    ("kind", "bases", "options"),
    [
        (LLAMA, "seed", {}),
        (GPT2, "seed", {"basis": "sparse"}),
        (VIT, "seed", PORTABLE),
        (LLAMA, "stored", {"basis": "block"}),
        (GPT2, "stored", {"stream": "portable"}),
    ],
)
def test_what_was_converted_for_peft_is_loaded_there_and_here_and_back_the_file_that_save_writes(
    kind: RealModel, bases: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    source, ours = our_directory(kind, tmp_path, bases=bases, **options)
    before = contents(source)
    report = randlora.files.convert(source, tmp_path / "out", "peft")
    assert_same_effect(ours, in_peft(kind, tmp_path / "out"), kind)
    assert torch.equal(outputs(in_ours(kind, tmp_path / "out"), kind.inputs()), outputs(ours, kind.inputs()))
    assert randlora.files.verify(tmp_path / "out").passed
    assert contents(source) == before
    stream = options.get("stream", peft_draw(options.get("basis", "dense")))
    peft_draws_them = stream in {None, "torch"} and options.get("basis") != "block"  # the newest torch at least
    assert ("base_model.randlora_B" in load_file(tmp_path / "out" / TENSORS_FILE)) == (not peft_draws_them)
    assert "randlora_stream" not in read_fields(tmp_path / "out")
    assert report.notes == (
        () if peft_draws_them else ("the bases are in the file: PEFT would draw different ones from the seed",)
    )
    randlora.files.convert(tmp_path / "out", tmp_path / "native", "native")
    randlora.save(ours, tmp_path / "expected", bases="seed")
    assert_same_tensors_file(tmp_path / "native", tmp_path / "expected")
    assert read_fields(tmp_path / "native") == read_fields(tmp_path / "expected")


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
    randlora.files.convert(tmp_path / "ours", tmp_path / "out")
    x = torch.randn(5, 20)
    assert (model(x) - plain(x)).abs().max() > 0.1
    theirs = PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-4)
    randlora.load(again, tmp_path / "out")
    assert torch.equal(again(x), model(x))


@every_peft_kind
def test_a_file_of_peft_loses_its_copies_of_the_bases_and_nothing_else(basis: BasisKind, tmp_path: Path) -> None:
    source, theirs = their_directory(BERT, tmp_path, basis, modules_to_save=["classifier"], projection_prng_key=-3)
    report = randlora.files.convert(source, tmp_path / "out", "peft")
    back = in_peft(BERT, tmp_path / "out")
    assert torch.equal(outputs(back, BERT.inputs()), outputs(theirs, BERT.inputs()))
    tensors = load_file(tmp_path / "out" / TENSORS_FILE)
    assert [key for key in tensors if key.endswith("randlora_B")] == ["base_model.randlora_B"]
    assert report.nbytes < 0.5 * sum(map(len, contents(source).values()))
    assert read_fields(tmp_path / "out") == read_fields(source)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LLAMA, {"save_projection": False, "projection_prng_key": 11}),
        (GPT2, {"save_projection": True, "projection_prng_key": 11}),
        (BERT, {"modules_to_save": ["classifier"], "bias": "randlora_only"}),
    ],
    ids=["bases from the key", "bases in the file", "head and biases"],
)
def test_a_file_of_peft_becomes_what_loading_and_saving_makes_of_it(
    kind: RealModel, options: dict[str, Any], tmp_path: Path
) -> None:
    source, theirs = their_directory(kind, tmp_path, **options)
    randlora.save(in_ours(kind, source), tmp_path / "saved")
    base, stream = base_directory(kind, tmp_path), told_stream(source)
    for to in ("native", "lora"):
        with pytest.raises(CheckpointError, match="give base=, the directory of its base model"):
            randlora.files.convert(source, tmp_path / "out", to)
    randlora.files.convert(source, tmp_path / "out", "native", base=base, stream=stream)
    assert_same_tensors_file(tmp_path / "out", tmp_path / "saved")
    written, saved = (read_fields(tmp_path / name) for name in ("out", "saved"))
    assert {**written, "target_modules": None} == {**saved, "target_modules": None}
    assert_same_effect(in_ours(kind, tmp_path / "out"), theirs, kind)
    assert randlora.files.verify(tmp_path / "out").passed


def test_bases_that_no_key_draws_stay_in_the_file(tmp_path: Path) -> None:
    """As from a machine where PEFT draws in float16."""
    source, theirs = their_directory(LLAMA, tmp_path)
    with torch.no_grad():
        theirs.base_model.randlora_B["default"].mul_(1.5)
    theirs.save_pretrained(source)
    verified = randlora.files.verify(source)
    assert verified.passed
    assert "its key gives different ones here" in verified.checks[-1].words
    report = randlora.files.convert(source, tmp_path / "native", "native", base=base_directory(LLAMA, tmp_path))
    assert report.notes == ("the bases are in the file: no seed reproduces them",)
    assert_same_effect(in_ours(LLAMA, tmp_path / "native"), theirs, LLAMA)
    randlora.files.convert(tmp_path / "native", tmp_path / "peft", "peft")
    assert_same_effect(in_peft(LLAMA, tmp_path / "peft"), theirs, LLAMA)
    assert_same_effect(in_ours(LLAMA, tmp_path / "peft"), theirs, LLAMA)


def test_no_input_is_written_into_and_what_is_there_already_is_replaced_only_on_demand(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path, "block")
    edit_fields(source, {"use_quantum": 3, "base_model_name_or_path": "some/model"})  # of which the first is unknown
    before, out = contents(source), tmp_path / "out"
    for inside in (tmp_path / "x" / ".." / "ours", source / "inside"):
        with pytest.raises(CheckpointError, match="or inside it, an input that must not change"):
            randlora.files.convert(source, inside, overwrite=True)
    with pytest.raises(CheckpointError, match="or inside it, an input that must not change"):
        randlora.files.convert(source / TENSORS_FILE, source, overwrite=True)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        randlora.files.convert(source, out)
    with pytest.raises(CheckpointError, match="is a file"):
        randlora.files.convert(source, out / "notes.txt", overwrite=True)
    assert (contents(source), contents(out)) == (before, {"notes.txt": b"mine"})
    randlora.files.convert(source, out, "native", overwrite=True)
    assert sorted(contents(out)) == [CONFIG_FILE, TENSORS_FILE, "notes.txt"]
    assert read_fields(out) == read_fields(source)


# Adapters of the stages of a pipeline, joined to one of the whole model


def whole_model() -> nn.ModuleDict:
    model = nn.ModuleDict({
        str(index): nn.ModuleDict({"q": nn.Linear(*pair), "v": nn.Linear(pair[0], 3)})
        for index, pair in enumerate(pairwise((6, 10, 6, 14, 8)))
    })
    model["head"] = nn.Linear(8, 3)
    return model


def stages(model: nn.ModuleDict, *cuts: int) -> list[nn.ModuleDict]:
    """Return copies of a model of which each has the modules up to the next cut."""
    bounds = pairwise([0, *cuts, len(model)])
    return [nn.ModuleDict({name: copy.deepcopy(model[name]) for name in [*model][start:end]}) for start, end in bounds]


def save_all(models: list[nn.ModuleDict], root: Path, **options: Any) -> list[Path]:
    """Adapt models, fill the adapters by name, save them, and return where."""
    for index, model in enumerate(models):
        also = ["head"] if "head" in model else None
        given: dict[str, Any] = {"r": 2, "targets": ["q", "v"], "stream": "portable", **options}
        randlora.inject(model, train_also=also, **given)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(sum(name.encode()))
                parameter.data = torch.randn(parameter.shape, generator=generator)
        randlora.save(model, root / str(index))
    return [root / str(index) for index in range(len(models))]


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "README.md"}


@settings(max_examples=6, deadline=None)
@given(
    cuts=st.sets(st.integers(1, 3), min_size=1),
    options=st.sampled_from([
        {"alpha": {"q": 3.0, ".*": 5.0}, "dropout": 0.1},
        {"r": 4, "basis": "block", "blocks": (2, 2)},
        {"r": {"v": 4, ".*": 2}, "basis": "sparse"},
    ]),
)
def test_joined_parts_are_the_files_of_the_whole(
    cuts: set[int], options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root, model = tmp_path_factory.mktemp("join"), whole_model()
    parts = save_all(stages(model, *sorted(cuts)), root / "parts", **options)
    (whole,) = save_all([model], root / "whole", **options)
    report = randlora.files.join(parts, root / "joined")
    assert files_of(root / "joined") == files_of(whole)
    assert report.layers == 8
    assert f"8 layers of {len(parts)} parts" in str(report)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stream": "torch"}, "and no model can use both at once: train the parts with stream='portable'"),
        ({"seed": 1}, "seed is 0 in "),
        ({"dropout": 0.5}, "dropout is 0.0 in "),
        ({"basis": "sparse"}, "basis is 'dense' in "),
        ({"targets": r"[1-3]\.q"}, "both have 1.q"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_parts_of_different_adapters_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    first, second = stages(whole_model(), 2)
    common = {"stream": options["stream"]} if "stream" in options else {}
    second = whole_model() if "targets" in options else second
    parts = [*save_all([first], tmp_path / "a", **common), *save_all([second], tmp_path / "b", **options)]
    with pytest.raises(CheckpointError, match="cannot join") as caught:
        randlora.files.join(parts, tmp_path / "joined")
    assert said in str(caught.value)
    assert not (tmp_path / "joined").exists()


def test_each_layer_keeps_its_alpha(tmp_path: Path) -> None:
    first, second = stages(whole_model(), 1)
    parts = [
        *save_all([first], tmp_path / "a", alpha=3.0),
        *save_all([second], tmp_path / "b", alpha={"q": 3.0, ".*": 5.0}),
    ]
    randlora.files.join(parts, tmp_path / "joined")
    own = {fqn: option for part in parts for fqn, option in read_adapter(part).options.items()}
    assert {option.alpha for option in own.values()} == {3.0, 5.0}
    assert read_adapter(tmp_path / "joined").options == own


def test_what_two_parts_train_must_be_one_and_a_directory_is_replaced_only_on_demand(tmp_path: Path) -> None:
    first, second = stages(whole_model(), 2)
    first["head"] = copy.deepcopy(second["head"])
    parts, joined = save_all([first, second], tmp_path), tmp_path / "joined"
    for out, said in ((parts[0], "or inside it, an input that must not change"), (tmp_path, "exists and is not empty")):
        with pytest.raises(CheckpointError, match=said):
            randlora.files.join(parts, out)
    with pytest.raises(CheckpointError, match="expected two or more parts, got 1"):
        randlora.files.join(parts[:1], joined)
    randlora.files.join(parts, joined)
    before = files_of(joined)
    randlora.files.join(parts, joined, overwrite=True)
    first.get_parameter("head.bias").data.add_(1)
    randlora.save(first, parts[0])
    with pytest.raises(CheckpointError, match=r"head\.bias has different values in .*0 and in .*1"):
        randlora.files.join(parts, joined, overwrite=True)
    assert files_of(joined) == before

"""Adapters converted to PEFT's format or to ours do what they did, and those of parts join to that of the whole."""

from __future__ import annotations

import copy
import json
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
from randlora.checkpoint.peft_config import CONFIG_FILE
from randlora.checkpoint.read import read_adapter
from randlora.checkpoint.tensors import TENSORS_FILE
from randlora.config import BasisKind
from randlora.disk import replace
from randlora.errors import CheckpointError
from tests.checkpoint_files import read_fields, read_tensors
from tests.directories import base_directory, our_directory, their_directory
from tests.kit import all_bits, fill
from tests.model_directories import contents
from tests.models import BERT, GPT2, LLAMA, VIT, RealModel, every_transformers_model, outputs
from tests.peer import THEIR_WARNINGS, assert_same_effect, every_peft_kind, in_ours, in_peft, peft_draw, told_stream

pytestmark = [*THEIR_WARNINGS, pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")]

BASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "sparse": {"basis": "sparse"},
    "block": {"basis": "block"},
    "portable": {"stream": "portable"},
    "very sparse, portable": {"basis": "very_sparse", "stream": "portable"},
}
every_basis = pytest.mark.parametrize("options", BASES.values(), ids=BASES)


@every_basis
@every_transformers_model
def test_what_was_converted_for_peft_is_loaded_there_and_here(
    kind: RealModel, options: dict[str, Any], tmp_path: Path
) -> None:
    source, ours = our_directory(kind, tmp_path, **options)
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


def test_bases_drawn_for_other_layers_too_are_stored_for_peft(tmp_path: Path) -> None:
    model = LLAMA.build()
    randlora.inject(model, r=6, targets=["down_proj"], name="first")
    randlora.inject(model, r=6, targets=["q_proj", "v_proj"], name="second")
    randlora.activate(model, "second")
    randlora.set_trainable(model, "second")
    fill(model, "second")
    randlora.save(model, tmp_path / "ours", name="second")
    randlora.files.convert(tmp_path / "ours", tmp_path / "out")
    assert_same_effect(model, in_peft(LLAMA, tmp_path / "out"), LLAMA)


def test_bases_narrower_than_what_peft_allocates_are_filled_up(tmp_path: Path) -> None:
    """A wide and a tall layer want a square of PEFT, of which bases drawn for the wide one alone are a part."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.tall = nn.Linear(20, 12), nn.Linear(12, 20)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.tall(torch.tanh(self.wide(x)))
            return output

    def build() -> nn.Module:
        torch.manual_seed(3)
        return Pair().eval()

    model = build()
    randlora.inject(model, r=4, targets=["wide"], name="narrow")
    randlora.inject(model, r=4, targets=["wide", "tall"], name="both")
    randlora.activate(model, "both")
    randlora.set_trainable(model, "both")
    fill(model, "both")
    saved = randlora.save(model, tmp_path / "ours", name="both", bases="stored")
    assert "too narrow for PEFT" in "".join(saved.notes)
    randlora.files.convert(tmp_path / "ours", tmp_path / "out")
    theirs = PeftModel.from_pretrained(build(), tmp_path / "out").eval()
    x = torch.randn(5, 20)
    assert (model(x) - build()(x)).abs().max() > 0.1
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-4)
    again = build()
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


@pytest.mark.parametrize("save_projection", [True, False], ids=["bases in the file", "bases from the key"])
@every_transformers_model
def test_a_file_of_peft_becomes_what_loading_and_saving_makes_of_it(
    kind: RealModel, save_projection: bool, tmp_path: Path
) -> None:
    source, theirs = their_directory(kind, tmp_path, save_projection=save_projection, projection_prng_key=11)
    model = in_ours(kind, source)
    randlora.save(model, tmp_path / "saved")
    base, stream = base_directory(kind, tmp_path), told_stream(source)
    randlora.files.convert(source, tmp_path / "out", "native", base=base, stream=stream)
    assert_same_tensors_file(tmp_path / "out", tmp_path / "saved")
    written, saved = (read_fields(tmp_path / name) for name in ("out", "saved"))
    assert {**written, "target_modules": None} == {**saved, "target_modules": None}
    assert_same_effect(in_ours(kind, tmp_path / "out"), theirs, kind)


def test_a_head_and_biases_that_peft_trained_become_ours(tmp_path: Path) -> None:
    source, theirs = their_directory(BERT, tmp_path, modules_to_save=["classifier"], bias="randlora_only")
    randlora.files.convert(source, tmp_path / "out", "native", base=base_directory(BERT, tmp_path))
    ours = BERT.build()
    report = randlora.load(ours, tmp_path / "out")
    assert "classifier.weight" in report.train_also
    assert "bert.encoder.layer.0.attention.self.query.bias" in report.train_also
    assert_same_effect(ours, theirs, BERT)
    assert randlora.files.verify(tmp_path / "out").passed


def test_bases_that_no_key_draws_stay_in_the_file(tmp_path: Path) -> None:
    """As from a machine where PEFT draws in float16."""
    source, theirs = their_directory(LLAMA, tmp_path)
    with torch.no_grad():
        theirs.base_model.randlora_B["default"].mul_(1.5)
    theirs.save_pretrained(source)
    base = base_directory(LLAMA, tmp_path)
    report = randlora.files.convert(source, tmp_path / "native", "native", base=base)
    assert report.notes == ("the bases are in the file: no seed reproduces them",)
    assert_same_effect(in_ours(LLAMA, tmp_path / "native"), theirs, LLAMA)
    randlora.files.convert(tmp_path / "native", tmp_path / "peft", "peft")
    assert_same_effect(in_ours(LLAMA, tmp_path / "peft"), in_peft(LLAMA, tmp_path / "peft"), LLAMA)
    assert_same_effect(in_ours(LLAMA, tmp_path / "peft"), theirs, LLAMA)


@every_basis
@pytest.mark.parametrize("bases", ["seed", "stored"])
def test_converting_to_our_own_format_brings_back_the_file_that_save_writes(
    bases: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    source, model = our_directory(GPT2, tmp_path, bases=bases, **options)
    randlora.files.convert(source, tmp_path / "peft", "peft")
    randlora.files.convert(tmp_path / "peft", tmp_path / "native", "native")
    randlora.save(model, tmp_path / "expected", bases="seed")
    assert_same_tensors_file(tmp_path / "native", tmp_path / "expected")
    assert read_fields(tmp_path / "native") == read_fields(tmp_path / "expected")


def test_fields_that_are_not_understood_are_kept(tmp_path: Path) -> None:
    source, _ = our_directory(VIT, tmp_path)
    fields = {**read_fields(source), "use_quantum": 3, "base_model_name_or_path": "some/model"}
    (source / CONFIG_FILE).write_text(json.dumps(fields))
    randlora.files.convert(source, tmp_path / "out", "native")
    assert read_fields(tmp_path / "out") == fields


def test_a_file_of_peft_becomes_ours_only_with_its_base(tmp_path: Path) -> None:
    source, _ = their_directory(LLAMA, tmp_path)
    for to in ("native", "lora"):
        with pytest.raises(CheckpointError, match="give base=, the directory of its base model"):
            randlora.files.convert(source, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_never_converted_into_itself(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    before = contents(source)
    for out in (tmp_path / "x" / ".." / "ours", source / "inside"):
        with pytest.raises(CheckpointError, match="or inside it, an input that must not change"):
            randlora.files.convert(source, out, overwrite=True)
    with pytest.raises(CheckpointError, match="or inside it, an input that must not change"):
        randlora.files.convert(source / TENSORS_FILE, source, overwrite=True)
    assert contents(source) == before


def test_what_is_there_already_is_written_over_only_on_demand(tmp_path: Path) -> None:
    source, ours = our_directory(LLAMA, tmp_path, "block")
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        randlora.files.convert(source, out)
    assert contents(out) == {"notes.txt": b"mine"}
    randlora.files.convert(source, out, overwrite=True)
    assert sorted(contents(out)) == [CONFIG_FILE, TENSORS_FILE, "notes.txt"]
    assert_same_effect(ours, in_peft(LLAMA, out), LLAMA)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        randlora.files.convert(source, tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_disk_that_fills_up_leaves_no_trace(overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    if overwrite:
        randlora.files.convert(source, tmp_path / "out")
    before = contents(tmp_path)
    flush = replace.flush

    def full(path: Path) -> None:
        flush(path)
        if path.name == CONFIG_FILE:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(replace, "flush", full)
    with pytest.raises(OSError, match="No space left"):
        randlora.files.convert(source, tmp_path / "out", overwrite=overwrite)
    assert contents(tmp_path) == before
    assert (tmp_path / "out").exists() == overwrite


def _without_class(metadata: dict[str, str]) -> dict[str, Any]:
    """Return our header without the class of a model, which a file of PEFT does not say, and the checksum."""
    header = json.loads(metadata["randlora"])
    return {**metadata, "randlora": {name: header[name] for name in header.keys() - {"model_class", "sha256"}}}


def assert_same_tensors_file(found: Path, expected: Path) -> None:
    """Compare tensors and header bit for bit; safetensors writes the entries of the header in no order."""
    (tensors, header), (expected_tensors, expected_header) = read_tensors(found), read_tensors(expected)
    assert _without_class(header) == _without_class(expected_header)
    assert all_bits(tensors) == all_bits(expected_tensors)


WIDTHS = (6, 10, 6, 14, 8)


class Model(nn.Module):
    """Layers by name, so that a stage of them keeps their names, with a head in the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({
            str(index): nn.ModuleDict({"q": nn.Linear(*pair), "v": nn.Linear(pair[0], 3)})
            for index, pair in enumerate(pairwise(WIDTHS))
        })
        self.head = nn.Linear(WIDTHS[-1], 3)


def stages(model: Model, cuts: list[int]) -> list[Model]:
    """Return copies of a model of which each has the layers up to the next cut, and the last one the head."""
    bounds = [0, *cuts, len(model.layers)]
    parts = []
    for start, end in pairwise(bounds):
        parts.append(copy.deepcopy(model))
        for index in {*range(len(model.layers))} - {*range(start, end)}:
            del parts[-1].layers[str(index)]
        if end < len(model.layers):
            del parts[-1].head
    return parts


def save_all(models: list[Model], root: Path, **options: Any) -> list[Path]:
    """Adapt models, fill the adapters by name, save them, and return where."""
    options = dict[str, Any](r=2, targets=["q", "v"], stream="portable") | options
    for index, model in enumerate(models):
        has_head = hasattr(model, "head")
        randlora.inject(model, train_also=["head"] if has_head else None, **options)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(sum(name.encode()))
                parameter.data = torch.randn(parameter.shape, generator=generator)
        randlora.save(model, root / str(index))
    return [root / str(index) for index in range(len(models))]


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "README.md"}


@settings(max_examples=8, deadline=None)
@given(
    cuts=st.sets(st.integers(1, 3), min_size=1),
    options=st.sampled_from([
        {},
        {"basis": "sparse"},
        {"r": 4, "basis": "block", "blocks": (2, 2)},
        {"r": {"v": 4, ".*": 2}},
        {"alpha": {"q": 3.0, ".*": 5.0}, "dropout": 0.1},
    ]),
)
def test_joined_parts_are_the_files_of_the_whole(
    cuts: set[int], options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("join")
    torch.manual_seed(0)
    model = Model()
    parts = save_all(stages(model, sorted(cuts)), root / "parts", **options)
    (whole,) = save_all([model], root / "whole", **options)
    report = randlora.files.join(parts, root / "joined")
    assert files_of(root / "joined") == files_of(whole)
    assert report.layers == 8
    assert f"8 layers of {len(parts)} parts" in str(report)
    randlora.load(Model(), root / "joined")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stream": "torch"}, "and no model can use both at once: train the parts with stream='portable'"),
        ({"seed": 1}, "seed is 0 in "),
        ({"dropout": 0.5}, "dropout is 0.0 in "),
        ({"basis": "sparse"}, "basis is 'dense' in "),
        ({"targets": ["q"]}, "both have layers.1.q"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_parts_of_different_adapters_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    first, second = stages(Model(), [2])
    common = {"stream": options["stream"]} if "stream" in options else {}
    if "targets" in options:
        second = Model()
        options = {"targets": r"layers\.[1-3]\.q"}
    parts = [*save_all([first], tmp_path / "a", **common), *save_all([second], tmp_path / "b", **options)]
    with pytest.raises(CheckpointError, match="cannot join") as caught:
        randlora.files.join(parts, tmp_path / "joined")
    assert said in str(caught.value)
    assert not (tmp_path / "joined").exists()


@pytest.mark.parametrize("alphas", [(None, 3.0), (5.0, 3.0), (3.0, {"q": 3.0, ".*": 5.0})], ids=str)
def test_each_layer_keeps_its_alpha(alphas: tuple[Any, ...], tmp_path: Path) -> None:
    parts = stages(Model(), [1])
    directories = [
        *save_all(parts[:1], tmp_path / "a", alpha=alphas[0]),
        *save_all(parts[1:], tmp_path / "b", alpha=alphas[1]),
    ]
    randlora.files.join(directories, tmp_path / "joined")
    own = {fqn: option for directory in directories for fqn, option in read_adapter(directory).options.items()}
    assert len({option.alpha for option in own.values()}) == 2
    assert read_adapter(tmp_path / "joined").options == own


def test_what_two_parts_train_must_be_one(tmp_path: Path) -> None:
    parts = stages(Model(), [2])
    parts[0].head = copy.deepcopy(parts[1].head)
    directories = save_all(parts, tmp_path)
    randlora.files.join(directories, tmp_path / "joined")
    parts[0].head.bias.data.add_(1)
    randlora.save(parts[0], directories[0])
    with pytest.raises(CheckpointError, match=r"head\.bias has different values in .*0 and in .*1"):
        randlora.files.join(directories, tmp_path / "joined", overwrite=True)


def test_what_a_directory_holds_is_not_replaced_unless_asked_for(tmp_path: Path) -> None:
    parts = save_all(stages(Model(), [2]), tmp_path)
    for out, said in ((parts[0], "or inside it, an input that must not change"), (tmp_path, "exists and is not empty")):
        with pytest.raises(CheckpointError, match=said):
            randlora.files.join(parts, out)
    with pytest.raises(CheckpointError, match="expected two or more parts, got 1"):
        randlora.files.join(parts[:1], tmp_path / "joined")
    randlora.files.join(parts, tmp_path / "joined")
    before = files_of(tmp_path / "joined")
    randlora.files.join(parts, tmp_path / "joined", overwrite=True)
    assert files_of(tmp_path / "joined") == before

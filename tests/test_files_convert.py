"""Adapters converted to PEFT's format or to ours do what they did, and those of parts join to that of the whole."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
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
from randlora.errors import CheckpointError
from tests.checkpoint_files import CONFIG_FILE, TENSORS_FILE, edit_fields, read_fields, read_tensors
from tests.directories import base_directory, our_directory, their_directory
from tests.kit import all_bits, fill
from tests.model_directories import contents
from tests.models import BERT, GPT2, LLAMA, VIT, RealModel, outputs, reproducible
from tests.peer import THEIR_WARNINGS, assert_same_effect, in_ours, in_peft, told_stream

pytestmark = [*THEIR_WARNINGS, pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")]

PORTABLE: dict[str, Any] = {"basis": "very_sparse", "stream": "portable"}


def assert_same_tensors_file(found: Path, expected: Path) -> None:
    """Compare tensors and header bit for bit, but for what no file of PEFT says; a header is in no order."""
    (tensors, header), (expected_tensors, expected_header) = read_tensors(found), read_tensors(expected)
    facts, expected_facts = (json.loads(metadata.pop("randlora")) for metadata in (header, expected_header))
    unsaid = dict.fromkeys(("model_class", "sha256"))
    assert (header, facts | unsaid) == (expected_header, expected_facts | unsaid)
    assert all_bits(tensors) == all_bits(expected_tensors)


def scaled(kind: RealModel, parent: Path) -> tuple[Path, Any]:
    """Save bases that no key draws, as from a machine where PEFT draws in float16."""
    source, theirs = their_directory(kind, parent)
    with torch.no_grad():
        theirs.base_model.randlora_B["default"].mul_(1.5)
    theirs.save_pretrained(source)
    return source, theirs


ours, theirs = our_directory, their_directory
SOURCES: dict[str, tuple[RealModel, Callable[[RealModel, Path], tuple[Path, Any]], bool]] = {
    "dense": (LLAMA, ours, False),
    "sparse": (GPT2, partial(ours, basis="sparse"), False),
    "portable": (VIT, partial(ours, **PORTABLE), True),
    "stored blocks": (LLAMA, partial(ours, bases="stored", basis="block"), True),
    "stored portable": (GPT2, partial(ours, bases="stored", stream="portable"), True),
    "PEFT's key": (LLAMA, partial(theirs, save_projection=False, projection_prng_key=11), False),
    "PEFT's head and biases": (BERT, partial(theirs, modules_to_save=["classifier"], bias="randlora_only"), True),
    "PEFT's sparse": (GPT2, partial(theirs, basis="sparse", projection_prng_key=-3), True),
    "PEFT's very sparse": (BERT, partial(theirs, basis="very_sparse"), True),
    "PEFT's of no key": (LLAMA, scaled, True),
}
"""What makes an adapter, ours or PEFT's, and whether PEFT needs the bases in the file."""


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_converted_does_what_it_did_and_is_the_file_that_save_writes(name: str, tmp_path: Path) -> None:
    kind, make, holds_bases = SOURCES[name]
    source, model = make(kind, tmp_path)
    before, base, is_theirs = contents(source), base_directory(kind, tmp_path), "PEFT" in name
    given: dict[str, Any] = {"base": base, "stream": told_stream(source)} if is_theirs else {}
    peft, native, back = (tmp_path / each for each in ("peft", "native", "back"))
    for to in ("native", "lora") if is_theirs else ():
        with pytest.raises(CheckpointError, match="give base=, the directory of its base model"):
            randlora.files.convert(source, native, to)
    to_peft = randlora.files.convert(source, peft, "peft")
    to_native = randlora.files.convert(source, native, "native", **given)
    randlora.files.convert(peft, back, "native", **given)
    assert contents(source) == before

    loaded = in_peft(kind, peft)
    if is_theirs:
        assert torch.equal(outputs(loaded, kind.inputs()), outputs(model, kind.inputs()))
        assert read_fields(peft) == read_fields(source)
    for each in (model, *(in_ours(kind, directory) for directory in (peft, native, back))):
        assert_same_effect(each, model if is_theirs else loaded, kind)
    bases = [key for key in load_file(peft / TENSORS_FILE) if key.endswith("randlora_B")]
    assert bases == ["base_model.randlora_B"] * holds_bases, "of which PEFT stores a copy for each layer"
    told = [[note for note in each.notes if "bases are in" in note] for each in (to_peft, to_native)]
    drawn = ["the bases are in the file: PEFT would draw different ones from the seed"] * holds_bases
    assert told[0] == ([] if is_theirs else drawn)
    assert told[1] == ["the bases are in the file: no seed reproduces them"] * (make is scaled)
    assert "randlora_stream" not in read_fields(peft)

    randlora.save(in_ours(kind, source), tmp_path / "saved", bases="stored" if make is scaled else "seed")
    for directory in (native, back):
        assert_same_tensors_file(directory, tmp_path / "saved")
        written, saved = (read_fields(each) | {"target_modules": None} for each in (directory, tmp_path / "saved"))
        assert written == saved
    for directory in (source, peft, native, back):
        assert randlora.files.verify(directory).passed
    assert ("its key gives different ones here" in str(randlora.files.verify(source))) == (make is scaled)


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


def test_other_files_and_strange_fields_stay_and_what_is_there_already_is_replaced_on_demand(tmp_path: Path) -> None:
    source, out = our_directory(LLAMA, tmp_path, "block")[0], tmp_path / "out"
    edit_fields(source, {"use_quantum": 3, "base_model_name_or_path": "some/model"})  # of which the first is unknown
    out.mkdir()
    (out / "notes.txt").write_text("mine")
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


def stages(*cuts: int) -> list[nn.ModuleDict]:
    """Return models of which each has the modules of the whole up to the next cut."""
    model = whole_model()
    bounds = pairwise([0, *cuts, len(model)])
    return [nn.ModuleDict({name: model[name] for name in [*model][start:end]}) for start, end in bounds]


def saved(model: nn.ModuleDict, directory: Path, **options: Any) -> Path:
    """Adapt a model, fill the adapter by name, and save it."""
    also = ["head"] if "head" in model else None
    given: dict[str, Any] = {"r": 2, "targets": ["q", "v"], "stream": "portable", **options}
    randlora.inject(model, train_also=also, **given)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(sum(name.encode()))
            parameter.data = torch.randn(parameter.shape, generator=generator)
    randlora.save(model, directory)
    return directory


def files_of(directory: Path) -> dict[str, bytes]:
    return {name: held for name, held in contents(directory).items() if name != "README.md"}


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
    root = tmp_path_factory.mktemp("join")
    parts = [saved(stage, root / str(index), **options) for index, stage in enumerate(stages(*sorted(cuts)))]
    report = randlora.files.join(parts, root / "joined")
    assert files_of(root / "joined") == files_of(saved(whole_model(), root / "whole", **options))
    assert report.layers == 8
    assert f"8 layers of {len(parts)} parts" in str(report)


UNLIKE: dict[str, tuple[dict[str, Any], str]] = {
    "stream": ({"stream": "torch"}, "and no model can use both at once: train the parts with stream='portable'"),
    "seed": ({"seed": 1}, "seed is 0 in "),
    "dropout": ({"dropout": 0.5}, "dropout is 0.0 in "),
    "basis": ({"basis": "sparse"}, "basis is 'dense' in "),
    "layers": ({"targets": r"[1-3]\.q"}, "both have 1.q"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_parts_of_different_adapters_are_refused(name: str, tmp_path: Path) -> None:
    options, said = UNLIKE[name]
    first, second = stages(2)
    parts = [
        saved(first, tmp_path / "a", **(options if name == "stream" else {})),
        saved(whole_model() if name == "layers" else second, tmp_path / "b", **options),
    ]
    with pytest.raises(CheckpointError, match="cannot join") as caught:
        randlora.files.join(parts, tmp_path / "joined")
    assert said in str(caught.value)
    assert not (tmp_path / "joined").exists()


def test_each_layer_keeps_its_alpha_and_what_two_parts_train_must_be_one(tmp_path: Path) -> None:
    first, second = stages(2)
    first["head"] = copy.deepcopy(second["head"])
    parts = [
        saved(first, tmp_path / "a", alpha=3.0),
        saved(second, tmp_path / "b", alpha={"q": 3.0, ".*": 5.0}),
    ]
    joined = tmp_path / "joined"
    randlora.files.join(parts, joined)
    own = {fqn: option for part in parts for fqn, option in read_adapter(part).options.items()}
    assert {option.alpha for option in own.values()} == {3.0, 5.0}
    assert read_adapter(joined).options == own
    before = files_of(joined)
    randlora.files.join(parts, joined, overwrite=True)
    first.get_parameter("head.bias").data.add_(1)
    randlora.save(first, parts[0])
    with pytest.raises(CheckpointError, match=r"head\.bias has different values in .*a and in .*b"):
        randlora.files.join(parts, joined, overwrite=True)
    assert files_of(joined) == before

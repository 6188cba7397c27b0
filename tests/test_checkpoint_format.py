"""The header, whose seal covers every fact and tensor, and the names of the tensors, which differ as the tensors do."""

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import randlora
from randlora import RandLoRAConfig
from randlora.bases import BasisSpec
from randlora.checkpoint.header import BasisRecord, Header, ModelClass, dump_header, parse_header
from randlora.checkpoint.tensors import MODEL_PREFIX, trained_fqn, value_keys
from randlora.disk.formats import LONGEST_NAME
from randlora.errors import AdapterError, CheckpointError, ConfigError, RandLoRAError, TargetError
from randlora.targets.census import Shapes, is_part
from tests.kit import adapter_values, all_bits, fill, untouched
from tests.layer_kinds import LAYER_KINDS, LayerKind, every_kind

SHAPES: Shapes = {"a": (4, 6), "b.c": (5, 3)}
SPEC = BasisSpec("dense", "torch", seed=3, r=2, max_dim=6, min_dim=5)
CONFIG = RandLoRAConfig(r=2, targets=("a", "b.c"), alpha=5.0, dropout=0.5, seed=3, train_also=("d",))
RECORD = BasisRecord(SPEC, "0" * 64, is_reproducible=True)
HEADER = Header(
    CONFIG, {2: RECORD}, SHAPES, "0.1.0", "2.9.1", ("b.c",), {"a": "experts"}, ModelClass("transformers", "A", ("b",))
)
TENSORS = {"x": torch.arange(6.0).reshape(2, 3), "y": torch.ones(4, dtype=torch.bfloat16)}


def test_tensors_are_sealed_in_any_order() -> None:
    backwards = dict(reversed(TENSORS.items()))
    assert parse_header(dump_header(HEADER, TENSORS), backwards) == HEADER


Facts = dict[str, Any]
CHANGED: dict[str, Callable[[Facts], object]] = {
    "basis_sha256": lambda facts: facts.update(basis_sha256="1" * 64),
    "alpha": lambda facts: facts["config"].update(alpha=6.0),
    "another-fact": lambda facts: facts.update(more=1),
    "seal": lambda facts: facts.update(sha256="0" * 64),
}
CHANGED_TENSORS: dict[str, dict[str, Tensor]] = {
    "value": {**TENSORS, "x": TENSORS["x"] + 1},
    "sign-of-zero": {**TENSORS, "x": TENSORS["x"] * torch.tensor([[-1.0, 1, 1], [1, 1, 1]])},
    "dtype": {**TENSORS, "y": torch.ones(4, dtype=torch.bfloat16).view(torch.int16)},
    "shape": {**TENSORS, "x": TENSORS["x"].reshape(3, 2)},
    "name": {"z": TENSORS["x"], "y": TENSORS["y"]},
    "swapped": {"x": TENSORS["y"], "y": TENSORS["x"]},
    "fewer": {"x": TENSORS["x"]},
    "more-of-nothing": {**TENSORS, "z": torch.ones(0)},
}


@pytest.mark.parametrize("what", [*CHANGED, *CHANGED_TENSORS])
def test_any_changed_fact_breaks_the_seal(what: str) -> None:
    """And any changed tensor."""
    facts = json.loads(dump_header(HEADER, TENSORS))
    CHANGED.get(what, bool)(facts)
    with pytest.raises(CheckpointError, match="do not match its checksum"):
        parse_header(json.dumps(facts), CHANGED_TENSORS.get(what, TENSORS))


def _without(*path: str) -> Callable[[Facts], object]:
    def remove(facts: Facts) -> None:
        for name in path[:-1]:
            facts = facts[name]
        del facts[path[-1]]

    return remove


LABELED = {"library": "transformers", "name": "BertModel", "labels": {"0": "a"}}
BROKEN: dict[str, Callable[[Facts], object]] = {
    **{f"no-{name}": _without(name) for name in ("format_version", "sha256", "config", "basis", "targets")},
    **{f"no-{path[-1]}": _without(*path) for path in [("basis_sha256",), ("basis", "blocks"), ("basis", "seed")]},
    "shape-short": lambda facts: facts["targets"].update(a=[4]),
    "shape-zero": lambda facts: facts["targets"].update(a=[0, 6]),
    "model_class-unnamed": lambda facts: facts.update(model_class={"library": "transformers"}),
    "model_class-labels": lambda facts: facts.update(model_class=LABELED),
    "target-of-unknown-kind": lambda facts: facts.update(kinds={"a": "convolutions"}),
    "kind-of-no-target": lambda facts: facts.update(kinds={"c": "experts"}),
    "exclude": lambda facts: facts["config"].update(exclude="(a+)+b"),
    "unknown-option": lambda facts: facts["config"].update(rank=2),
    "rank-zero": lambda facts: facts["config"].update(r=0),
    "dims": lambda facts: facts["basis"].update(min_dim=0),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_facts_that_are_none_are_called_damaged(change: Callable[[Facts], object]) -> None:
    facts = json.loads(dump_header(HEADER, TENSORS))
    change(facts)
    with pytest.raises(CheckpointError, match="header is damaged"):
        parse_header(json.dumps(facts), TENSORS)


def test_text_that_is_no_header_is_called_damaged_and_another_version_is_named() -> None:
    for text in ("", "null", "[" * 100_000):
        with pytest.raises(CheckpointError, match="header is damaged"):
            parse_header(text, TENSORS)
    for version in (0, 4, "1", None, [1]):
        with pytest.raises(CheckpointError, match="this library reads versions 1 to 3: install one"):
            parse_header(json.dumps({"format_version": version}), {})


def _with(**changes: Any) -> Header:
    """Return the header with another spec of its bases."""
    return replace(HEADER, bases={2: replace(RECORD, spec=replace(SPEC, **changes))})


OTHER = BasisRecord(replace(SPEC, r=4, max_dim=5, min_dim=3), "2" * 64, is_reproducible=False)
BY_LAYER = replace(
    HEADER,
    config=replace(CONFIG, r={"b.c": 4, "a": 2}, alpha={"b.c": 5, "a": 0.5}),
    bases={2: RECORD, 4: OTHER},
)
CONTRADICTIONS: dict[str, Header] = {
    "rank": _with(r=4),
    "seed": _with(seed=4),
    "kind": _with(kind="sparse"),
    "stream": _with(stream="portable"),
    "too-low": _with(max_dim=5),
    "too-narrow": _with(min_dim=3),
    "bases-of-an-r-less": replace(BY_LAYER, bases={2: RECORD}),
    "bases-under-another-r": replace(BY_LAYER, bases={2: OTHER, 4: RECORD}),
    "too-low-for-an-r": replace(BY_LAYER, bases={2: RECORD, 4: replace(OTHER, spec=replace(OTHER.spec, max_dim=4))}),
    "alpha-of-another-target": replace(BY_LAYER, config=replace(BY_LAYER.config, alpha={"b.c": 5, "a": 4, "d": 1})),
    "patterns": replace(BY_LAYER, config=replace(BY_LAYER.config, r={"b.c": 4, ".*": 2})),
}


def test_options_of_each_layer_are_parsed_back_in_any_order() -> None:
    assert (BY_LAYER.format_version, HEADER.format_version) == (2, 1)
    assert BY_LAYER.options == {"a": (2, 0.5), "b.c": (4, 5.0)}
    alpha_alone = replace(HEADER, config=replace(CONFIG, alpha={"b.c": 5, "a": 0.5}))
    for header in (BY_LAYER, alpha_alone, replace(BY_LAYER, config=replace(BY_LAYER.config, alpha=None))):
        assert parse_header(dump_header(header, TENSORS), TENSORS) == header
    facts = json.loads(dump_header(BY_LAYER, TENSORS))
    facts["bases"] = dict(reversed(facts["bases"].items()))
    assert parse_header(json.dumps(facts, sort_keys=True), TENSORS).options == BY_LAYER.options
    for header in (HEADER, BY_LAYER):  # under the number of the other version
        facts = json.loads(dump_header(header, TENSORS))
        facts["format_version"] = 3 - header.format_version
        with pytest.raises(CheckpointError, match=r"header is damaged|contradict each other|do not match its checksum"):
            parse_header(json.dumps(facts), TENSORS)


@pytest.mark.parametrize("header", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_options_that_contradict_the_bases_are_refused_though_the_seal_is_whole(header: Header) -> None:
    with pytest.raises(CheckpointError, match="contradict each other"):
        parse_header(dump_header(header, TENSORS), TENSORS)


NAMES = (
    "base_layer", "randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B", "randlora", "randlora_state",
    "model", "base_model", "default", "weight", "bias", "x", "0", "r2", "é", "a b", "x/y", "\n", "`|`", "\ud800",
    "__metadata__", "modules_to_save", "original_module", "lora_A",
)  # fmt: skip
odd_names = st.one_of(
    st.just("base_layer"),
    st.sampled_from(NAMES),
    st.text(st.characters(exclude_characters="."), min_size=1, max_size=3),
)


def test_a_child_of_a_layer_goes_by_the_name_that_peft_gives_it_too() -> None:
    for key, fqn in {
        "q.base_layer.bias": "q.bias",
        "q.base_layer.child.bias": "q.child.bias",  # as PEFT writes it
        "q.child.bias": "q.child.bias",  # as we do
        "q.base_layer.base_layer.bias": "q.base_layer.bias",
        "k.base_layer.bias": "k.base_layer.bias",
    }.items():
        assert trained_fqn(MODEL_PREFIX + key, {"q"}) == fqn


class Odd(nn.Linear):
    """A linear layer with parameters and children of its own, which it does not use."""

    def __init__(self, parameters: list[str], children: Mapping[str, nn.Module]) -> None:
        super().__init__(3, 4)
        for name in parameters:
            self.register_parameter(name, nn.Parameter(torch.randn(2)))
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the output of a linear layer, whatever its attributes are called."""
        return nn.functional.linear(input, self.weight, self.bias)


@st.composite
def odd_layers(draw: st.DrawFn, depth: int = 2) -> Odd:
    taken = dir(nn.Linear(1, 1))
    free = odd_names.filter(lambda name: name not in taken)
    parameters = draw(st.lists(free, max_size=2, unique=True))
    inside = free.filter(lambda name: name not in parameters)
    children = {name: draw(odd_layers(depth - 1)) for name in draw(st.lists(inside, max_size=depth, unique=True))}
    return Odd(parameters, children)


def exactly(fqns: list[str]) -> str:
    return "|".join(map(re.escape, fqns))


@pytest.mark.medium
@settings(max_examples=40)
@given(
    st.dictionaries(odd_names.filter(lambda name: name not in dir(nn.Module())), odd_layers(), min_size=1, max_size=2),
    st.randoms(use_true_random=False),
)
def test_an_adapter_of_a_model_of_any_names_is_refused_or_comes_back_as_it_was(
    layers: dict[str, Odd], random: object
) -> None:
    model = nn.Module()
    for name, layer in layers.items():
        model.add_module(name, layer)
    modules = [fqn for fqn, _ in model.named_modules() if fqn]
    targets = random.sample(modules, random.randint(1, len(modules)))  # type: ignore[attr-defined]
    free = [fqn for fqn, _ in model.named_parameters() if fqn.removesuffix(".weight") not in targets]
    also = random.sample(free, random.randint(0, len(free)))  # type: ignore[attr-defined]
    is_text = all(fqn.encode(errors="replace").decode() == fqn for fqn in (*targets, *also))
    hidden = {"randlora", "randlora_lambda", "randlora_gamma"}
    held = {
        name for fqn in targets for part in ("_modules", "_parameters") for name in vars(model.get_submodule(fqn))[part]
    }
    is_hiding = "randlora_state" in layers or not hidden.isdisjoint(held)
    if is_hiding or any(map(is_part, targets)):
        with (
            untouched(model),
            pytest.raises((AdapterError, TargetError), match=r"already has an attribute|part of another"),
        ):
            randlora.inject(model, r=2, targets=exactly(targets), train_also=exactly(also) if also else None)
        return
    randlora.inject(model, r=2, targets=exactly(targets), train_also=exactly(also) if also else None)
    own = all_bits(adapter_values(fill(model)))
    with TemporaryDirectory() as place:
        directory = Path(place) / "adapter"
        if not is_text:
            with pytest.raises(CheckpointError, match="is not valid Unicode: rename the module"):
                randlora.save(model, directory)
            assert not directory.exists()
            return
        randlora.save(model, directory)
        randlora.eject(model)
        randlora.load(model, directory)
        assert all_bits(adapter_values(model)) == own
        assert randlora.files.verify(directory).passed


@pytest.mark.parametrize("name", ["randlora", "randlora_lambda", "randlora_gamma"])
def test_a_layer_or_a_model_whose_own_attribute_would_be_hidden_is_refused(name: str) -> None:
    for layer in (Odd([name], {}), Odd([], {name: nn.Linear(2, 2)})):
        model = nn.Sequential(layer)
        with untouched(model), pytest.raises(TargetError, match=f"0 already has an attribute {name}"):
            randlora.inject(model, r=2, targets=["0"])
    whole = nn.ModuleDict({"randlora_state": nn.Linear(3, 3), "q": nn.Linear(3, 3)})
    with pytest.raises(RandLoRAError, match="already has an attribute randlora_state"):
        randlora.inject(whole, r=2, targets=["q"])
    assert type(whole["q"]) is nn.Linear


PLACES = "base_layer", "randlora_lambda", "x", "a b"


@every_kind
def test_what_was_saved_of_layers_is_loaded_under_any_name(kind: LayerKind, tmp_path: Path) -> None:
    name = PLACES[LAYER_KINDS.index(kind) % len(PLACES)]
    model = nn.ModuleDict({name: kind.build(128, 32, True, kind.exact), "beside": nn.Linear(4, 6)})
    base = copy.deepcopy(model)
    randlora.inject(model, r=4, targets=[name], train_also=[f"{name}.bias", "beside"])
    own = all_bits(adapter_values(fill(model)))
    for bases in ("seed", "stored"):
        randlora.save(model, tmp_path / bases, bases=bases)
        assert randlora.files.verify(tmp_path / bases).passed
    randlora.load(base, tmp_path / "stored")
    assert all_bits(adapter_values(base)) == own


def test_a_name_that_a_lora_has_for_something_else_is_refused_there(tmp_path: Path) -> None:
    model = nn.Sequential(Odd([], {"lora_A": nn.Linear(3, 4)}))
    randlora.inject(model, r=2, targets="0", train_also=r"0\.lora_A\.weight")
    randlora.save(fill(model), tmp_path / "own")
    with pytest.raises(ConfigError, match=r"0\.lora_A\.weight would have the name of a factor of an update: rename it"):
        randlora.files.convert(tmp_path / "own", tmp_path / "lora", "lora", tolerance=1.0)
    assert not (tmp_path / "lora").exists()


def test_a_name_that_is_too_long_to_be_loaded_is_not_saved(tmp_path: Path) -> None:
    long = "long" * 1024
    for also in (False, True):
        model = nn.ModuleDict({long: nn.LayerNorm(4) if also else nn.Linear(4, 4), "other": nn.Linear(4, 4)})
        randlora.inject(model, r=2, targets=["other"] if also else [long], train_also=[long] if also else None)
        for verb in (lambda model: randlora.save(model, tmp_path / "adapter"), randlora.adapter_state):
            with untouched(model), pytest.raises(CheckpointError, match=r"longlong.*… in a file would have 41"):
                verb(model)
    assert not (tmp_path / "adapter").exists()
    greatest = "n" * (LONGEST_NAME - len(value_keys("", ())[0]))
    model = nn.ModuleDict({greatest: nn.Linear(4, 4)})
    randlora.inject(model, r=2, targets=[greatest])
    randlora.save(model, tmp_path)
    randlora.load(model, tmp_path, name="again")

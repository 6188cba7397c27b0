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
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import randlora
from randlora import RandLoRAConfig
from randlora.bases import BasisSpec
from randlora.checkpoint.header import BasisRecord, Header, ModelClass, dump_header, parse_header
from randlora.checkpoint.tensors import MODEL_PREFIX, TOP_BASIS_A, TOP_BASIS_B, trained_fqn, trained_key, value_keys
from randlora.config import LARGEST_FACTOR
from randlora.disk.formats import LONGEST_NAME
from randlora.errors import AdapterError, CheckpointError, ConfigError, RandLoRAError, TargetError
from randlora.targets.census import Shapes, is_part
from tests.kit import adapter_values, all_bits, fill, untouched
from tests.layer_kinds import LAYER_KINDS, LayerKind, every_kind
from tests.read_kinds import READ_KINDS, ReadKind, every_read_kind
from tests.strategies import specs

SHAPES: Shapes = {"a": (4, 6), "b.c": (5, 3)}
SPEC = BasisSpec("dense", "torch", seed=3, r=2, max_dim=6, min_dim=5)
CONFIG = RandLoRAConfig(r=2, targets=("a", "b.c"), alpha=5.0, dropout=0.5, seed=3, train_also=("d",))
RECORD = BasisRecord(SPEC, "0" * 64, is_reproducible=True)
HEADER = Header(
    CONFIG,
    {2: RECORD},
    SHAPES,
    library_version="0.1.0",
    torch_version="2.9.1",
    transposed=("b.c",),
)
TENSORS = {"x": torch.arange(6.0).reshape(2, 3), "y": torch.ones(4, dtype=torch.bfloat16)}

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    """Draw headers of every kind of bases, with any names, over shapes that the bases reach."""
    spec = draw(specs())
    side = st.integers(1, spec.min_dim)
    shape = st.tuples(side, side) | st.tuples(st.integers(1, 4), side, side)
    shapes: Shapes = draw(st.dictionaries(names, shape, min_size=1, max_size=3))
    config = RandLoRAConfig(
        r=spec.r,
        basis=spec.kind,
        stream=spec.stream,
        blocks=spec.blocks,
        seed=spec.seed,
        targets=tuple(shapes),
        alpha=draw(st.none() | st.floats(-LARGEST_FACTOR, LARGEST_FACTOR) | st.integers(-(10**9), 10**9)),
        dropout=draw(st.floats(0, 1, exclude_max=True)),
        train_also=draw(st.none() | st.lists(names, min_size=1, max_size=2).map(tuple)),
    )
    digest = draw(st.text("0123456789abcdef", min_size=64, max_size=64))
    transposed = draw(st.none() | st.just(tuple(shapes)))
    kinds = dict.fromkeys(shapes, "experts") if draw(st.booleans()) else {}
    records = {spec.r: BasisRecord(spec, digest, draw(st.booleans()))}
    labels = st.none() | st.lists(names, max_size=3).map(tuple)
    model_class = st.none() | st.builds(ModelClass, names, names, labels, st.none() | names)
    return Header(config, records, shapes, draw(names), draw(st.none() | names), transposed, kinds, draw(model_class))


@given(headers())
def test_what_is_dumped_is_parsed_back(header: Header) -> None:
    assert parse_header(dump_header(header, TENSORS), TENSORS) == header


def test_tensors_are_sealed_in_any_order() -> None:
    backwards = dict(reversed(TENSORS.items()))
    assert parse_header(dump_header(HEADER, TENSORS), backwards) == HEADER


CHANGED_FACTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "kind": lambda facts: facts["basis"].update(kind="sparse") or facts["config"].update(basis="sparse"),
    "basis_sha256": lambda facts: facts.update(basis_sha256="1" * 64),
    "alpha": lambda facts: facts["config"].update(alpha=6.0),
    "train_also": lambda facts: facts["config"].update(train_also=["e"]),
    "another-fact": lambda facts: facts.update(more=1),
    "seal": lambda facts: facts.update(sha256="0" * 64),
}


@pytest.mark.parametrize("change", CHANGED_FACTS.values(), ids=CHANGED_FACTS)
def test_any_changed_fact_breaks_the_seal(change: Callable[[dict[str, Any]], object]) -> None:
    facts = json.loads(dump_header(HEADER, TENSORS))
    change(facts)
    with pytest.raises(CheckpointError, match="do not match its checksum"):
        parse_header(json.dumps(facts), TENSORS)


CHANGED_TENSORS: dict[str, dict[str, Tensor]] = {
    "value": {**TENSORS, "x": TENSORS["x"] + 1},
    "sign-of-zero": {**TENSORS, "x": TENSORS["x"] * torch.tensor([[-1.0, 1, 1], [1, 1, 1]])},
    "dtype": {**TENSORS, "y": torch.ones(4, dtype=torch.bfloat16).view(torch.int16)},
    "shape": {**TENSORS, "x": TENSORS["x"].reshape(3, 2)},
    "name": {"z": TENSORS["x"], "y": TENSORS["y"]},
    "swapped": {"x": TENSORS["y"], "y": TENSORS["x"]},
    "fewer": {"x": TENSORS["x"]},
    "more": {**TENSORS, "z": torch.ones(1)},
    "more-of-nothing": {**TENSORS, "z": torch.ones(0)},
}


@pytest.mark.parametrize("tensors", CHANGED_TENSORS.values(), ids=CHANGED_TENSORS)
def test_any_changed_tensor_breaks_the_seal(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match="do not match its checksum"):
        parse_header(dump_header(HEADER, TENSORS), tensors)


def _without(*path: str) -> Callable[[dict[str, Any]], object]:
    def remove(facts: dict[str, Any]) -> None:
        for name in path[:-1]:
            facts = facts[name]
        del facts[path[-1]]

    return remove


BROKEN_FACTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no-version": _without("format_version"),
    "no-seal": _without("sha256"),
    "no-config": _without("config"),
    "no-basis": _without("basis"),
    "no-targets": _without("targets"),
    "no-digest": _without("basis_sha256"),
    "no-blocks": _without("basis", "blocks"),
    "no-seed": _without("basis", "seed"),
    "shape-short": lambda facts: facts["targets"].update(a=[4]),
    "shape-fraction": lambda facts: facts["targets"].update(a=[4.5, 6]),
    "shape-zero": lambda facts: facts["targets"].update(a=[0, 6]),
    "shape-negative": lambda facts: facts["targets"].update(a=[4, -6]),
    "model_class-unnamed": lambda facts: facts.update(model_class={"library": "transformers"}),
    "model_class-labels": lambda facts: facts.update(
        model_class={"library": "transformers", "name": "BertModel", "labels": {"0": "a"}}
    ),
    "target-of-unknown-kind": lambda facts: facts.update(kinds={"a": "convolutions"}),
    "kind-of-no-target": lambda facts: facts.update(kinds={"c": "experts"}),
    "regex": lambda facts: facts["config"].update(targets="(a+)+b|.*"),
    "exclude": lambda facts: facts["config"].update(exclude="(a+)+b"),
    "regex-of-trained": lambda facts: facts["config"].update(train_also="(d+)+e|d"),
    "no-target": lambda facts: facts.update(targets={}) or facts["config"].update(targets=[]),
    "unknown-option": lambda facts: facts["config"].update(rank=2),
    "unknown-kind": lambda facts: facts["basis"].update(kind="gauss"),
    "unknown-stream": lambda facts: facts["basis"].update(stream="numpy"),
    "rank-zero": lambda facts: facts["config"].update(r=0),
}


@pytest.mark.parametrize("change", BROKEN_FACTS.values(), ids=BROKEN_FACTS)
def test_facts_that_are_none_are_called_damaged(change: Callable[[dict[str, Any]], object]) -> None:
    facts = json.loads(dump_header(HEADER, TENSORS))
    change(facts)
    with pytest.raises(CheckpointError, match="header is damaged"):
        parse_header(json.dumps(facts), TENSORS)


@pytest.mark.parametrize("text", ["", "null", "[" * 100_000], ids=["empty", "null", "deep"])
def test_text_that_is_no_header_is_called_damaged(text: str) -> None:
    with pytest.raises(CheckpointError, match="header is damaged"):
        parse_header(text, TENSORS)


@pytest.mark.parametrize("version", [0, 4, "1", None, [1]], ids=repr)
def test_another_format_version_is_named_whatever_else_the_header_holds(version: object) -> None:
    with pytest.raises(
        CheckpointError, match=r"has format version .*, this library reads versions 1 to 3: install one"
    ):
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
    "bases-of-an-r-more": replace(BY_LAYER, config=replace(BY_LAYER.config, r=2)),
    "bases-under-another-r": replace(BY_LAYER, bases={2: OTHER, 4: RECORD}),
    "too-low-for-an-r": replace(BY_LAYER, bases={2: RECORD, 4: replace(OTHER, spec=replace(OTHER.spec, max_dim=4))}),
    "r-of-a-target-less": replace(BY_LAYER, config=replace(BY_LAYER.config, r={"b.c": 4})),
    "alpha-of-another-target": replace(BY_LAYER, config=replace(BY_LAYER.config, alpha={"b.c": 5, "a": 4, "d": 1})),
    "patterns": replace(BY_LAYER, config=replace(BY_LAYER.config, r={"b.c": 4, ".*": 2})),
}


def test_options_of_each_layer_are_parsed_back_in_any_order() -> None:
    assert (BY_LAYER.format_version, HEADER.format_version) == (2, 1)
    assert BY_LAYER.options == {"a": (2, 0.5), "b.c": (4, 5.0)}
    text = dump_header(BY_LAYER, TENSORS)
    assert parse_header(text, TENSORS) == BY_LAYER
    facts = json.loads(text)
    facts["bases"] = dict(reversed(facts["bases"].items()))
    assert parse_header(json.dumps(facts, sort_keys=True), TENSORS).options == BY_LAYER.options


def test_alpha_alone_or_r_alone_may_differ() -> None:
    for header in (
        replace(HEADER, config=replace(CONFIG, alpha={"b.c": 5, "a": 0.5})),
        replace(BY_LAYER, config=replace(BY_LAYER.config, alpha=None)),
    ):
        assert parse_header(dump_header(header, TENSORS), TENSORS) == header


@pytest.mark.parametrize("version", [1, 2])
def test_contents_of_one_version_under_the_number_of_the_other_are_refused(version: int) -> None:
    facts = json.loads(dump_header(BY_LAYER if version == 2 else HEADER, TENSORS))
    facts["format_version"] = 3 - version
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
paths = st.lists(st.sampled_from(["base_layer", "x", "randlora_lambda"]), min_size=1, max_size=4).map(".".join)


@settings(max_examples=200)
@given(st.sets(paths, max_size=4), st.sets(paths, max_size=6))
@example({"x"}, {"x.x", "x.base_layer.x"})
@example({"x", "x.base_layer"}, {"x.base_layer.x", "x.base_layer.base_layer.x", "x.base_layer"})
def test_keys_are_one_to_one_whatever_the_names(targets: set[str], parameters: set[str]) -> None:
    """Where a target has no child or parameter of the names of Λ and Γ, which `inject` refuses."""
    taken = {f"{fqn}.{name}" for fqn in targets for name in ("randlora_lambda", "randlora_gamma")}
    parameters -= {fqn for fqn in parameters if any(f"{fqn}.".startswith(f"{path}.") for path in taken)}
    targets -= {fqn for fqn in targets if any(f"{fqn}.".startswith(f"{path}.") for path in taken)}
    keys = [key for fqn in targets for key in value_keys(fqn, targets)]
    keys += [trained_key(fqn, targets) for fqn in parameters]
    assert len(set(keys)) == len(keys)
    assert {TOP_BASIS_A, TOP_BASIS_B}.isdisjoint(keys)
    assert all(trained_fqn(trained_key(fqn, targets), targets) == fqn for fqn in parameters)


@pytest.mark.parametrize(
    ("key", "fqn"),
    [
        ("q.base_layer.bias", "q.bias"),
        ("q.base_layer.child.bias", "q.child.bias"),  # as PEFT writes it
        ("q.child.bias", "q.child.bias"),  # as we do
        ("q.base_layer.base_layer.bias", "q.base_layer.bias"),
        ("k.base_layer.bias", "k.base_layer.bias"),
    ],
)
def test_a_child_of_a_layer_goes_by_the_name_that_peft_gives_it_too(key: str, fqn: str) -> None:
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


def held_by(model: nn.Module, fqn: str) -> set[str]:
    """Return the names of a module's own children and parameters."""
    module = model.get_submodule(fqn)
    return {*module._modules, *module._parameters}


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
    is_hiding = "randlora_state" in layers or any(not hidden.isdisjoint(held_by(model, fqn)) for fqn in targets)
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
@pytest.mark.parametrize("what", ["child", "parameter"])
def test_a_layer_whose_own_attribute_would_be_hidden_is_refused(name: str, what: str) -> None:
    layer = Odd([name], {}) if what == "parameter" else Odd([], {name: nn.Linear(2, 2)})
    model = nn.Sequential(layer)
    with untouched(model), pytest.raises(TargetError, match=f"0 already has an attribute {name}"):
        randlora.inject(model, r=2, targets=["0"])


def test_a_model_whose_own_attribute_would_be_hidden_is_refused() -> None:
    model = nn.ModuleDict({"randlora_state": nn.Linear(3, 3), "q": nn.Linear(3, 3)})
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(RandLoRAError, match="already has an attribute randlora_state"):
        randlora.inject(model, r=2, targets=["q"])
    assert {name: id(module) for name, module in model.named_modules()} == before


PLACES = "base_layer.randlora_A", "randlora_lambda", "x.base_layer", "default.a b"


def placed(layer: nn.Module, path: str) -> nn.Module:
    """Return a model with a layer at a path, and another layer."""
    *outer, name = path.split(".")
    module: nn.Module = nn.ModuleDict({name: layer})
    for part in reversed(outer):
        module = nn.ModuleDict({part: module})
    module.add_module("beside", nn.Linear(4, 6))
    return module


@every_read_kind
def test_what_was_saved_of_weights_that_are_read_is_loaded_under_any_name(kind: ReadKind, tmp_path: Path) -> None:
    path = PLACES[READ_KINDS.index(kind) % len(PLACES)]
    model = placed(kind.build(), path)
    base = copy.deepcopy(model)
    target, parameter = (f"{path}{fqn.removeprefix('0')}" for fqn in (kind.target, kind.parameter_fqn))
    also = [fqn for fqn, _ in model.named_parameters() if fqn != parameter]
    randlora.inject(model, **{**kind.adapter_options, "targets": [target], "train_also": also})
    assert_comes_back(fill(model), base, tmp_path)


@every_kind
def test_what_was_saved_of_layers_is_loaded_under_any_name(kind: LayerKind, tmp_path: Path) -> None:
    path = PLACES[LAYER_KINDS.index(kind) % len(PLACES)]
    model = placed(kind.build(128, 32, True, kind.exact), path)
    base = copy.deepcopy(model)
    randlora.inject(model, r=4, targets=[path], train_also=[f"{path}.bias", "beside"])
    assert_comes_back(fill(model), base, tmp_path)


def assert_comes_back(model: nn.Module, base: nn.Module, place: Path) -> None:
    own = all_bits(adapter_values(model))
    for name in ("seed", "stored"):
        randlora.save(model, place / name, bases=name)
    assert all(randlora.files.verify(place / name).passed for name in ("seed", "stored"))
    randlora.load(base, place / "stored")
    assert all_bits(adapter_values(base)) == own


def test_a_name_that_a_lora_has_for_something_else_is_refused_there(tmp_path: Path) -> None:
    model = nn.Sequential(Odd([], {"lora_A": nn.Linear(3, 4)}))
    randlora.inject(model, r=2, targets="0", train_also=r"0\.lora_A\.weight")
    randlora.save(fill(model), tmp_path / "own")
    with pytest.raises(ConfigError, match=r"0\.lora_A\.weight would have the name of a factor of an update: rename it"):
        randlora.files.convert(tmp_path / "own", tmp_path / "lora", "lora", tolerance=1.0)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("also", [False, True], ids=["target", "train_also"])
def test_a_name_that_is_too_long_to_be_loaded_is_not_saved(also: bool, tmp_path: Path) -> None:
    name = "long" * 1024
    model = nn.ModuleDict({name: nn.LayerNorm(4) if also else nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    randlora.inject(model, r=2, targets=["other"] if also else [name], train_also=[name] if also else None)
    for verb in (lambda: randlora.save(model, tmp_path / "adapter"), lambda: randlora.adapter_state(model)):
        with (
            untouched(model),
            pytest.raises(CheckpointError, match=r"longlong.*… in a file would have 41"),
        ):
            verb()
    assert not (tmp_path / "adapter").exists()


def test_a_name_of_the_greatest_length_is_saved_and_loaded(tmp_path: Path) -> None:
    name = "n" * (LONGEST_NAME - len(value_keys("", ())[0]))
    model = nn.ModuleDict({name: nn.Linear(4, 4)})
    randlora.inject(model, r=2, targets=[name])
    randlora.save(model, tmp_path)
    randlora.load(model, tmp_path, name="again")

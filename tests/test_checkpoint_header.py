"""The header: what it carries comes back, and its seal covers every fact and every tensor."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from randlora import RandLoRAConfig
from randlora.bases import BasisSpec
from randlora.checkpoint.header import BasisRecord, Header, ModelClass, dump_header, parse_header
from randlora.config import LARGEST_FACTOR
from randlora.errors import CheckpointError
from randlora.targets.site import Shapes
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


@given(st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1))
def test_extent_and_rectangle_are_the_dims_that_layers_slice_and_that_peft_draws(
    shapes: dict[str, tuple[int, int]],
) -> None:
    header = replace(HEADER, shapes={**shapes})
    larger, smaller = zip(*(sorted(shape, reverse=True) for shape in shapes.values()), strict=True)
    widest_out, widest_in = max(out for out, _ in shapes.values()), max(in_ for _, in_ in shapes.values())
    assert header.rectangles[2] == (max(larger), min(widest_out, widest_in))
    assert header.rectangles[2][1] >= max(smaller)


CHANGED_FACTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "seed": lambda facts: facts["basis"].update(seed=4) or facts["config"].update(seed=4),
    "kind": lambda facts: facts["basis"].update(kind="sparse") or facts["config"].update(basis="sparse"),
    "max_dim": lambda facts: facts["basis"].update(max_dim=7),
    "min_dim": lambda facts: facts["basis"].update(min_dim=6),
    "basis_sha256": lambda facts: facts.update(basis_sha256="1" * 64),
    "alpha": lambda facts: facts["config"].update(alpha=6.0),
    "dropout": lambda facts: facts["config"].update(dropout=0.25),
    "train_also": lambda facts: facts["config"].update(train_also=["e"]),
    "targets-order": lambda facts: facts["config"].update(targets=["b.c", "a"]),
    "is_reproducible": lambda facts: facts.update(is_reproducible=False),
    "library_version": lambda facts: facts.update(library_version="9"),
    "shape": lambda facts: facts["targets"].update(a=[6, 4]),
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
    "basis-list": lambda facts: facts.update(basis=[]),
    "basis-null": lambda facts: facts.update(basis=None),
    "config-list": lambda facts: facts.update(config=[]),
    "targets-list": lambda facts: facts.update(targets=["a"]),
    "shape-short": lambda facts: facts["targets"].update(a=[4]),
    "shape-null": lambda facts: facts["targets"].update(a=None),
    "shape-infinite": lambda facts: facts["targets"].update(a=[4, float("inf")]),
    "shape-nan": lambda facts: facts["targets"].update(a=[4, float("nan")]),
    "shape-fraction": lambda facts: facts["targets"].update(a=[4.5, 6]),
    "shape-float": lambda facts: facts["targets"].update(a=[4.0, 6]),
    "shape-text": lambda facts: facts["targets"].update(a=["4", "6"]),
    "shape-digits": lambda facts: facts["targets"].update(a="46"),
    "shape-bool": lambda facts: facts["targets"].update(a=[True, 6]),
    "shape-zero": lambda facts: facts["targets"].update(a=[0, 6]),
    "shape-negative": lambda facts: facts["targets"].update(a=[4, -6]),
    "model_class-text": lambda facts: facts.update(model_class="BertModel"),
    "model_class-unnamed": lambda facts: facts.update(model_class={"library": "transformers"}),
    "model_class-labels": lambda facts: facts.update(
        model_class={"library": "transformers", "name": "BertModel", "labels": {"0": "a"}}
    ),
    "target-of-unknown-kind": lambda facts: facts.update(kinds={"a": "convolutions"}),
    "target-of-no-kind": lambda facts: facts.update(kinds={"a": ["experts"]}),
    "kind-of-no-target": lambda facts: facts.update(kinds={"c": "experts"}),
    "kinds-pairs": lambda facts: facts.update(kinds=[["a", "experts"]]),
    "regex": lambda facts: facts["config"].update(targets="(a+)+b|.*"),
    "exclude": lambda facts: facts["config"].update(exclude="(a+)+b"),
    "regex-of-trained": lambda facts: facts["config"].update(train_also="(d+)+e|d"),
    "no-target": lambda facts: facts.update(targets={}) or facts["config"].update(targets=[]),
    "digest-number": lambda facts: facts.update(basis_sha256=7),
    "no-library-version": _without("library_version"),
    "unknown-option": lambda facts: facts["config"].update(rank=2),
    "unknown-kind": lambda facts: facts["basis"].update(kind="gauss"),
    "unknown-stream": lambda facts: facts["basis"].update(stream="numpy"),
    "rank-zero": lambda facts: facts["config"].update(r=0),
    "dims-text": lambda facts: facts["basis"].update(max_dim="6"),
    "blocks-number": lambda facts: facts["basis"].update(blocks=5),
    "alpha-huge": lambda facts: facts["config"].update(alpha=10**400),
    "alpha-nan": lambda facts: facts["config"].update(alpha=float("nan")),
}


@pytest.mark.parametrize("change", BROKEN_FACTS.values(), ids=BROKEN_FACTS)
def test_facts_that_are_none_are_called_damaged(change: Callable[[dict[str, Any]], object]) -> None:
    facts = json.loads(dump_header(HEADER, TENSORS))
    change(facts)
    with pytest.raises(CheckpointError, match="header is damaged"):
        parse_header(json.dumps(facts), TENSORS)


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "1", '"text"', "[" * 100_000], ids=lambda text: text[:6] or "empty"
)
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

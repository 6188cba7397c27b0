"""The walk over a model, which layers a pattern means, by which rule, and what was probably meant by one refused."""

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import randlora
from randlora.errors import ConfigError, TargetError
from randlora.targets.census import Census
from randlora.targets.match import nearest_names
from randlora.targets.obstacles import obstacles
from randlora.targets.select import Selection, find_targets, select
from tests.kit import untouched


class Model(nn.Module):
    """Two blocks between a bag of embeddings, which no adapter layer adapts, and a head."""

    def __init__(self, model_type: str | None = None, head: str = "head") -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type=model_type)
        self.embed = nn.EmbeddingBag(10, 6)
        self.layers = nn.ModuleList()
        for _ in range(2):
            attention = {"q_proj": nn.Linear(6, 6), "v_proj": nn.Linear(6, 3), "proj": nn.Linear(6, 6)}
            block = {"attention": nn.ModuleDict(attention), "norm": nn.LayerNorm(6), "up": Conv1D(12, 6)}
            block["attention"].register_module("dropout", None)
            self.layers.append(nn.ModuleDict(block))
        self.add_module(head, nn.Linear(6, 10))


LINEAR = [f"layers.{i}.{name}" for i in (0, 1) for name in (*(f"attention.{p}proj" for p in ("q_", "v_", "")), "up")]
BODY, UP = [LINEAR[i] for i in (0, 1, 4, 5)], LINEAR[3::4]


def selected(model: nn.Module, pattern: Any = None, exclude: Any = None) -> Selection:
    return select(Census.of(model), pattern, exclude)


def found(model: nn.Module, pattern: Any = None, exclude: Any = None) -> list[str]:
    return [target.fqn for target in find_targets(model, pattern, exclude)]


def is_conv1d(fqn: str, module: nn.Module) -> bool:
    return isinstance(module, Conv1D)


def nothing(fqn: str, module: nn.Module) -> bool:
    return False


# The walk

names = st.sampled_from(["a", "b", "0"])
trees: st.SearchStrategy[Any] = st.recursive(
    st.none(), lambda inner: st.dictionaries(names, inner, max_size=3), max_leaves=12
)


def build(tree: dict[str, Any] | None) -> nn.Module:
    return nn.Linear(2, 2) if tree is None else nn.ModuleDict({name: build(inner) for name, inner in tree.items()})


@given(trees.filter(bool))
def test_a_walk_comes_past_every_module_under_its_name_and_sees_an_adapted_model_as_it_was(tree: Any) -> None:
    model = nn.ModuleDict({"top": build(tree), "more": nn.Linear(2, 2), "layer": nn.Linear(2, 2)})
    named = [(fqn, module) for fqn, module in model.named_modules() if fqn]
    model["layer"].bias = model["more"].bias
    plain = Census.of(model)
    assert [(visit.fqn, visit.module) for visit in plain.visits] == named
    assert plain.adapted == ()
    parameters = [(held.fqn, id(held.parameter)) for held in plain.parameters]
    assert parameters == [(fqn, id(value)) for fqn, value in model.named_parameters(remove_duplicate=False)]
    randlora.inject(model, r=1, targets="all-linear", exclude="layer")
    census = Census.of(model)
    assert [(visit.fqn, visit.module) for visit in census.visits] == named
    assert [(held.fqn, id(held.parameter)) for held in census.parameters] == parameters
    linear = {fqn for fqn, module in named if isinstance(module, nn.Linear)}
    assert {site.fqn for site in census.adapted} == linear - {"layer"}
    assert {site.fqn for site in find_targets(model, "all-linear") if site.adapter_layer} == linear - {"layer"}


# What a pattern means

PATTERNS: list[tuple[Any, Any, list[str]]] = [
    (r".*\.(q|v)_proj", None, BODY),
    (r"layers\.\d\.(attention(\.proj)?|norm|up)", None, [LINEAR[i] for i in (2, 3, 6, 7)]),
    ({"up"}, None, UP),
    (lambda fqn, _: fqn.startswith("layers.0") and fqn.endswith("q_proj"), None, LINEAR[:1]),
    (None, None, LINEAR),
    ("all-linear", r".*\.attention\..*", UP),
    (None, r"(?!.*\.up$).*", UP),
    (None, lambda fqn, _: not fqn.endswith(".up"), UP),
    (None, lambda _, module: module.bias.numel() != 12, UP),  # it sees no module without a bias
    *[(None, anyway, LINEAR) for anyway in (nothing, ["head"], ["norm"], r".*\.norm")],
    (None, ["embed", "layers.0"], LINEAR[4:]),
]


@pytest.mark.parametrize(("pattern", "exclude", "expected"), PATTERNS)
def test_a_pattern_means_these_layers_in_the_models_order(pattern: Any, exclude: Any, expected: list[str]) -> None:
    model = Model()
    with untouched(model):
        assert found(model, pattern, exclude) == expected


NAMES = sorted({
    ".".join(parts[start:])
    for fqn, _ in Model().named_modules()
    for parts in [fqn.split(".")]
    for start in range(len(parts) if fqn else 0)
})
HOLDING = [name for name in NAMES if any(f".{name}." in f".{fqn}." for fqn in [*LINEAR, "head"])]


@given(
    st.lists(st.sampled_from(HOLDING), min_size=1, max_size=3), st.none() | st.lists(st.sampled_from(NAMES), min_size=1)
)
def test_a_list_means_the_layers_of_its_names_and_in_modules_of_its_names(
    names: list[str], exclude: list[str] | None
) -> None:
    def means(entries: list[str], fqn: str) -> bool:
        return any(f".{entry}." in f".{fqn}." for entry in entries)

    expected = [fqn for fqn in [*LINEAR, "head"] if means(names, fqn) and not means(exclude or [], fqn)]
    if expected:
        assert found(Model(), names, exclude) == expected
    else:
        with pytest.raises(TargetError, match="without the excluded: no layer is left to adapt"):
            find_targets(Model(), names, exclude)


@pytest.mark.parametrize("exclude", [["b"], "a", ["a", "b"]])
def test_a_layer_of_two_names_is_found_and_excluded_by_either_and_called_by_its_first(exclude: Any) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    model["b"] = model["a"]
    assert found(model, exclude) == ["a"]
    assert found(model, None, exclude) == found(model, ["a", "c"], exclude) == ["c"]
    shared = nn.ModuleDict({"x": model, "y": model})
    assert found(shared) == ["x.a", "x.c"]
    assert obstacles(Census.of(shared), find_targets(shared), 0.0) == []  # they are not tied to themselves


@pytest.mark.parametrize(
    ("model_type", "pattern", "rule", "count"),
    [
        ("llama", None, "the preset of model_type 'llama' (q_proj, v_proj)", 4),
        ("blip-2", None, "the preset of model_type 'blip-2' (q, v, q_proj, v_proj)", 4),  # q, v: of a variant
        ("unheard-of", None, "the query and value projections (q_proj, v_proj)", 4),
        (None, None, "all linear layers but the output head", 8),
        ("llama", "all-linear", "all linear layers but the output head", 8),
        (None, ["up", "proj"], "the names up, proj", 4),
        (None, "head", "the regex 'head'", 1),
        (None, is_conv1d, "the callable is_conv1d", 2),
    ],
)
def test_the_rule_that_applied_is_told(model_type: str | None, pattern: Any, rule: str, count: int) -> None:
    selection = selected(Model(model_type), pattern)
    assert (selection.rule, len(selection.sites)) == (rule, count)
    assert selected(Model(model_type), pattern, lambda *_: False).rule == f"{rule}, without the excluded"


def test_the_names_of_a_preset_are_those_of_layers() -> None:
    model = nn.ModuleDict({"q": nn.ModuleDict({"inner": nn.Linear(2, 2)}), "v": nn.Linear(2, 2)})
    model.__dict__["config"] = SimpleNamespace(model_type="t5")  # q, v
    assert found(model) == ["v"]
    assert found(model, ["q", "v"]) == ["q.inner", "v"]


# What is left out


def vision_transformer() -> nn.Module:
    """Build what has timm's names: but the projection of patches is of a type without an adapter layer."""
    blocks = nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(4, 12), "proj": nn.Linear(4, 4)}) for _ in range(2))
    return nn.ModuleDict({"patch_embed": nn.ModuleDict({"proj": nn.Bilinear(3, 4, 2)}), "blocks": blocks})


def test_a_head_is_left_out_where_the_model_says_which_it_is_under_all_names_unless_it_is_asked_for() -> None:
    model = Model(head="to_words")
    model.get_output_embeddings = lambda: model.get_submodule("to_words")  # type: ignore[assignment]
    model.add_module("again", model.get_submodule("to_words"))
    assert found(model) == LINEAR
    assert selected(model).skipped == {"to_words": "the output head", "again": "the output head"}
    by_name = nn.ModuleDict({
        "body": nn.ModuleDict({"score": nn.Linear(2, 2)}),
        "score": nn.Sequential(nn.Linear(2, 2)),
    })
    assert found(by_name) == ["body.score"]  # at the top alone
    assert selected(by_name).skipped == {"score.0": "the output head"}
    assert randlora.inject(model, r=2, targets=["to_words"]).targets == ("to_words",)
    assert found(model) == LINEAR


@pytest.mark.parametrize(
    ("targets", "exclude"),
    [
        (["qkv", "proj"], r"patch_embed\..*"),
        (["qkv", "proj"], lambda _, module: isinstance(module, nn.Bilinear)),
        (r".*\.(qkv|proj)", ["patch_embed.proj"]),
        (lambda fqn, _: fqn.endswith(("qkv", "proj")), ["patch_embed.proj"]),
        (["patch_embed.proj", "qkv", "proj"], ["patch_embed"]),
    ],
)
def test_what_is_excluded_is_not_refused_and_what_is_inside_of_what_was_named_is_left_out(
    targets: Any, exclude: Any
) -> None:
    model = vision_transformer()
    with pytest.raises(TargetError, match=r'Bilinear, for which .* exclude=\["patch_embed\.proj"\]'):
        find_targets(model, targets)
    in_blocks = [f"blocks.{index}.{name}" for index in (0, 1) for name in ("qkv", "proj")]
    assert found(model, targets, exclude) == in_blocks
    inside = selected(nn.ModuleDict({"body": model}), ["body"])
    assert [site.fqn for site in inside.sites] == [f"body.{fqn}" for fqn in in_blocks]
    assert inside.skipped == {"body.patch_embed.proj": "of type Bilinear, for which there is no adapter layer"}
    assert selected(nn.ModuleDict({"body": model}), ["body"], ["patch_embed"]).skipped == {}


# What is refused

NONE = "matches no layer or weight that can be adapted"
NO_EMBED = "embed is of type EmbeddingBag, for which there is no adapter layer"
OTHERS = {
    "bilinear": nn.Sequential(nn.Bilinear(1, 1, 1), nn.Tanh()),
    "empty": nn.Sequential(),
    "norms": nn.ModuleDict({"up": nn.Linear(2, 2), "norms": nn.Sequential(nn.LayerNorm(2))}),
    "layer": Conv1D(2, 2),
}
ONLY = "; the model has no layer or weight that can be adapted, only Bilinear, Tanh"
REFUSED: list[tuple[Any, Any, str]] = [
    ("q_prj", None, f"'q_prj' {NONE}; the nearest names are q_proj, "),
    (["v_proj", "q_prj"], None, f"'q_prj' {NONE}; the nearest names are q_proj, "),
    (["layers.2.up"], None, f"'layers.2.up' {NONE}; the nearest names are layers.1.up, layers.0.up"),
    (["norm", "up"], None, f"'norm' {NONE}"),
    (r".*\.norm", None, NONE),
    (["embed"], None, NO_EMBED),
    (".*", None, f"{NO_EMBED}: narrow the pattern"),
    (nothing, None, f"the callable nothing {NONE}; the model has"),
    (["up"], ["up"], "the names up, without the excluded: no layer is left to adapt"),
    (None, ["q_proj", "k_proj"], "exclude='k_proj' matches no layer or weight"),
    (None, ["nrm"], "exclude='nrm' matches no layer or weight; the nearest names are norm"),
    (["q_prj"], ["v_prj"], "2 problems"),
    ("attention.q_proj", None, 'did you mean targets=["attention.q_proj"]?'),
    *[(joined, None, 'did you mean targets=["q_proj", "v_proj"]?') for joined in ("(q_proj|v_proj)", "q_proj, v_proj")],
    (("q_proj,v_proj",), None, 'did you mean targets=["q_proj", "v_proj"]?'),
    (r"layers\.0", None, 'did you mean targets=["layers.0"]?'),
    ([r".*\.q_proj"], None, r'did you mean targets=r".*\.q_proj"?'),
    *[
        (word, None, 'did you mean targets="all-linear"?')
        for word in ("all_linear", "All Linear", ["all_linear", "up"])
    ],
    (None, r"layers\.0", 'did you mean exclude=["layers.0"]?'),
    (None, "attention.proj|up", 'did you mean exclude=["attention.proj", "up"]?'),
    *[(targets, OTHERS["bilinear"], ONLY) for targets in ("q", ["q"], "all-linear", nothing)],
    ("q", OTHERS["empty"], "; the model has no submodules"),
    (["up", "norms"], OTHERS["norms"], f"targets='norms' {NONE}, only norms (Sequential)"),
    (None, OTHERS["layer"], "the model itself is a layer (Conv1D) and has no name within a model: wrap it in a module"),
]


@pytest.mark.parametrize(("targets", "exclude", "message"), REFUSED)
def test_a_pattern_that_means_nothing_is_refused_with_what_was_probably_meant(
    targets: Any, exclude: Any, message: str
) -> None:
    model, exclude = (exclude, None) if isinstance(exclude, nn.Module) else (Model(), exclude)
    with untouched(model), pytest.raises(TargetError, match=re.escape(message)):
        find_targets(model, targets, exclude)


def test_a_pattern_that_is_none_is_refused_and_of_many_refused_modules_five_are_named() -> None:
    patterns: list[tuple[str, Any]] = [("targets", "("), ("targets", ["q", 3]), ("exclude", 7), ("exclude", "(")]
    for name, pattern in patterns:
        with pytest.raises(ConfigError, match=f"configure RandLoRA: {name}"):
            randlora.plan(Model(), r=2, **{name: pattern})
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Bilinear(1, 1, 1) for _ in range(560)))
    with pytest.raises(TargetError, match="560 problems") as caught:
        find_targets(model, ".*")
    assert len(str(caught.value).splitlines()) == 7
    assert str(caught.value).endswith("and 555 more")


words = st.sampled_from(NAMES) | st.text("abhdeornqpuv_.01|", min_size=1, max_size=8)


@given(words | st.lists(words, min_size=1, max_size=2), st.sampled_from([Model(), nn.Sequential(nn.Tanh())]))
def test_no_answer_suggests_what_was_written(targets: Any, model: nn.Module) -> None:
    answer = ""
    try:
        find_targets(model, targets)
    except TargetError as error:
        answer = str(error)
    except ConfigError:
        pass  # no regular expression
    lines = re.findall(r"targets='(.*)' matches no layer or weight that can be adapted(.*)", answer)
    assume(lines)
    for said, rest in lines:
        suggested = re.findall(r"did you mean targets=(.*)\?|the nearest names are (.*)|(the model has) ", rest)
        assert suggested
        for meant, near, _ in suggested:
            assert meant not in {json.dumps(targets), f'r"{targets}"'}
            assert not {said, "none"} & set(near.split(", "))


def test_nearest_names_are_at_most_five_and_alike_if_any_is_else_the_common_ones() -> None:
    names = ["a.q_proj", "a.v_proj", "b.q_proj"]
    assert nearest_names("xyzzy", [*names, "a", "b"], common=names) == "q_proj, v_proj"
    assert nearest_names("zz.zz", [*names, "a", "b"], common=["b.q_proj"]) == "b.q_proj"
    assert nearest_names("gate", ["zzzz", "gxxe"]) == "gxxe"
    assert len(nearest_names("layer.1", [f"layer.{index}" for index in range(20)]).split(", ")) == 5

"""Which layers a pattern means, by which rule, and which patterns are refused, with what was probably meant."""

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
from randlora.targets.select import find_targets, select
from tests.kit import untouched
from tests.walk_models import LINEAR, Model, found

BODY = [f"layers.{index}.attention.{name}" for index in (0, 1) for name in ("q_proj", "v_proj")]
UP = ["layers.0.up", "layers.1.up"]
HEAD = {"head": "the output head"}


def is_linear(fqn: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def is_conv1d(fqn: str, module: nn.Module) -> bool:
    return isinstance(module, Conv1D)


def nothing(fqn: str, module: nn.Module) -> bool:
    return False


PATTERNS: list[tuple[Any, Any, list[str]]] = [
    (r".*\.(q|v)_proj", None, BODY),
    (r"layers\.\d\.(attention(\.proj)?|norm|up)", None, [LINEAR[i] for i in (2, 3, 6, 7)]),
    ("head", None, ["head"]),
    (("up",), None, UP),
    ({"up"}, None, UP),
    (is_conv1d, None, UP),
    (lambda fqn, _: fqn.startswith("layers.0") and fqn.endswith("q_proj"), None, LINEAR[:1]),
    *[(rule, None, LINEAR) for rule in (None, "all-linear")],
    *[(rule, r".*\.attention\..*", UP) for rule in (None, "all-linear")],
    (None, r"(?!.*\.up$).*", UP),
    (None, lambda fqn, _: not fqn.endswith(".up"), UP),
    (None, is_linear, UP),
    (None, lambda _, module: module.bias.numel() != 12, LINEAR[3::4]),  # it sees no module without a bias
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


@pytest.mark.parametrize("exclude", [["b"], ["a"], "b", "a", ["a", "b"]])
def test_a_layer_of_two_names_is_found_and_excluded_by_either_and_called_by_its_first(exclude: Any) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    model["b"] = model["a"]
    assert found(model, exclude) == ["a"]
    assert found(model, None, exclude) == found(model, ["a", "c"], exclude) == ["c"]


@pytest.mark.parametrize(
    ("model", "pattern", "rule", "count"),
    [
        (Model("llama"), None, "the preset of model_type 'llama' (q_proj, v_proj)", 4),
        (Model("blip-2"), None, "the preset of model_type 'blip-2' (q, v, q_proj, v_proj)", 4),  # q, v: of a variant
        (Model("unheard-of"), None, "the query and value projections (q_proj, v_proj)", 4),
        (Model(None), None, "all linear layers but the output head", 8),
        (Model("llama"), "all-linear", "all linear layers but the output head", 8),
        (Model("llama"), ["up", "proj"], "the names up, proj", 4),
        (Model("llama"), "head", "the regex 'head'", 1),
        (Model("llama"), is_conv1d, "the callable is_conv1d", 2),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_rule_that_applied_is_told(model: nn.Module, pattern: Any, rule: str, count: int) -> None:
    selection = select(Census.of(model), pattern, None)
    assert selection.rule == rule
    assert len(selection.sites) == count
    assert select(Census.of(model), pattern, lambda *_: False).rule == f"{rule}, without the excluded"


def test_the_names_of_a_preset_are_those_of_layers() -> None:
    model = nn.ModuleDict({"q": nn.ModuleDict({"inner": nn.Linear(2, 2)}), "v": nn.Linear(2, 2)})
    model.__dict__["config"] = SimpleNamespace(model_type="t5")  # q, v
    assert found(model) == ["v"]
    assert found(model, ["q", "v"]) == ["q.inner", "v"]


# Output heads


@pytest.mark.parametrize("head", ["lm_head", "classifier", "score", "qa_outputs", "heads", "embed_out"])
def test_a_head_is_left_out_by_its_name_at_the_top(head: str) -> None:
    selection = select(Census.of(Model(head=head)), None, None)
    assert [site.fqn for site in selection.sites] == LINEAR
    assert selection.skipped == {head: "the output head"}
    model = nn.ModuleDict({"body": nn.ModuleDict({head: nn.Linear(2, 2)}), head: nn.Sequential(nn.Linear(2, 2))})
    selection = select(Census.of(model), None, None)
    assert [site.fqn for site in selection.sites] == [f"body.{head}"]
    assert selection.skipped == {f"{head}.0": "the output head"}


def test_a_head_is_left_out_where_the_model_says_which_it_is_unless_it_is_asked_for() -> None:
    model = Model(head="to_words")
    model.get_output_embeddings = lambda: model.get_submodule("to_words")  # type: ignore[assignment]
    selection = select(Census.of(model), None, None)
    assert [site.fqn for site in selection.sites] == LINEAR
    assert selection.skipped == {"to_words": "the output head"}
    assert randlora.inject(model, r=2, targets=["to_words"]).targets == ("to_words",)
    assert found(model) == LINEAR


def test_a_head_of_two_names_is_left_out_under_both() -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "out": nn.Linear(2, 2)})
    model["head"] = model["out"]
    selection = select(Census.of(model), None, None)
    assert [site.fqn for site in selection.sites] == ["body"]
    assert set(selection.skipped) == {"out", "head"}


# What cannot be adapted, and is excluded or left out


def vision_transformer() -> nn.Module:
    """Build what has timm's names: but the projection of patches is of a type without an adapter layer."""
    blocks = nn.ModuleList(
        nn.ModuleDict({"qkv": nn.Linear(4, 12), "proj": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}) for _ in range(2)
    )
    return nn.ModuleDict({"patch_embed": nn.ModuleDict({"proj": nn.Bilinear(3, 4, 2)}), "blocks": blocks})


IN_BLOCKS = [f"blocks.{index}.{name}" for index in (0, 1) for name in ("qkv", "proj")]


@pytest.mark.parametrize(
    ("targets", "exclude"),
    [
        (["qkv", "proj"], ["patch_embed.proj"]),
        (["qkv", "proj"], r"patch_embed\..*"),
        (["qkv", "proj"], lambda _, module: isinstance(module, nn.Bilinear)),
        (r".*\.(qkv|proj)", ["patch_embed.proj"]),
        (lambda fqn, _: fqn.endswith(("qkv", "proj")), ["patch_embed.proj"]),
        (["patch_embed.proj", "qkv", "proj"], ["patch_embed"]),
    ],
)
def test_what_is_excluded_is_not_refused(targets: Any, exclude: Any) -> None:
    with pytest.raises(TargetError, match=r'Bilinear, for which .* exclude=\["patch_embed\.proj"\]'):
        find_targets(vision_transformer(), targets)
    assert found(vision_transformer(), targets, exclude) == IN_BLOCKS


def test_what_a_named_module_holds_beside_linear_layers_is_left_out_with_the_reason() -> None:
    model = nn.ModuleDict({"body": vision_transformer()})
    selection = select(Census.of(model), ["body"], None)
    assert [site.fqn for site in selection.sites] == [f"body.{fqn}" for fqn in IN_BLOCKS]
    assert selection.skipped == {"body.patch_embed.proj": "of type Bilinear, for which there is no adapter layer"}
    assert select(Census.of(model), ["body"], ["patch_embed"]).skipped == {}


# What is refused

NONE = "matches no layer or weight that can be adapted"
NO_EMBED = "embed is of type EmbeddingBag, for which there is no adapter layer"
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
    *[
        (targets, None, f'did you mean targets=["{meant}"]?')
        for targets, meant in {
            "attention.q_proj": "attention.q_proj",
            "(q_proj|v_proj)": 'q_proj", "v_proj',
            "q_proj, v_proj": 'q_proj", "v_proj',
            ("q_proj,v_proj",): 'q_proj", "v_proj',
            "attention": "attention",
            r"layers\.0": "layers.0",
        }.items()
    ],
    ([r".*\.q_proj"], None, r'did you mean targets=r".*\.q_proj"?'),
    *[(word, None, 'did you mean targets="all-linear"?') for word in ("all_linear", "ALL-LINEAR", "All Linear")],
    (["all_linear", "up"], None, 'did you mean targets="all-linear"?'),
    (None, r"layers\.0", 'did you mean exclude=["layers.0"]?'),
    (None, "attention.proj|up", 'did you mean exclude=["attention.proj", "up"]?'),
]


@pytest.mark.parametrize(("targets", "exclude", "message"), REFUSED)
def test_a_pattern_that_means_nothing_is_refused_with_what_was_probably_meant(
    targets: Any, exclude: Any, message: str
) -> None:
    with pytest.raises(TargetError, match=re.escape(message)):
        find_targets(Model(), targets, exclude)


@pytest.mark.parametrize("pattern", ["(", ["q", 3], 7])
@pytest.mark.parametrize("name", ["targets", "exclude"])
def test_a_pattern_that_is_none_is_refused(name: str, pattern: Any) -> None:
    with pytest.raises(ConfigError, match=f"configure RandLoRA: {name}"):
        randlora.plan(Model(), r=2, **{name: pattern})


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


@pytest.mark.parametrize("targets", ["q", ["q"], "all-linear", nothing])
def test_of_a_model_without_linear_layers_it_is_told_what_it_has(targets: Any) -> None:
    with pytest.raises(TargetError, match=r"; the model has no .* adapted, only Bilinear, Tanh"):
        find_targets(nn.Sequential(nn.Bilinear(1, 1, 1), nn.Tanh()), targets)
    with pytest.raises(TargetError, match="; the model has no submodules"):
        find_targets(nn.Sequential(), targets)


def test_a_named_module_without_layers_to_adapt_is_refused() -> None:
    model = nn.ModuleDict({"up": nn.Linear(2, 2), "norms": nn.Sequential(nn.LayerNorm(2))})
    with pytest.raises(TargetError, match=rf"targets='norms' {NONE}, only norms \(Sequential\)"):
        find_targets(model, ["up", "norms"])


@pytest.mark.parametrize("model", [nn.Linear(2, 2), Conv1D(2, 2)], ids=["Linear", "Conv1D"])
def test_the_model_itself_cannot_be_a_target(model: nn.Module) -> None:
    with pytest.raises(TargetError, match=f"itself is a layer .{type(model).__name__}. .*wrap it in a module"):
        find_targets(model)


def test_of_many_refused_modules_five_are_named_and_the_rest_counted() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Bilinear(1, 1, 1) for _ in range(560)))
    with pytest.raises(TargetError, match="560 problems") as caught:
        find_targets(model, ".*")
    assert len(str(caught.value).splitlines()) == 7
    assert str(caught.value).endswith("and 555 more")

"""The walker: which layers a pattern means, by which rule, and why some cannot be adapted."""

import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import randlora
from randlora.walk import Target, find_targets, max_dims, named_parameters, obstacles, select, used_dims, walk


class Attention(nn.Module):
    """Four layers, two of which have names that end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.v_proj = nn.Linear(6, 3)
        self.proj = nn.Linear(6, 6)
        self.register_module("dropout", None)


class Block(nn.Module):
    """Attention, a norm and a feed-forward layer stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.norm = nn.LayerNorm(6)
        self.up = Conv1D(12, 6)


class Model(nn.Module):
    """Two blocks between an embedding and a head, as language models are built."""

    def __init__(self, model_type: str | None = None, head: str = "head") -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type=model_type)
        self.embed = nn.Embedding(10, 6)
        self.layers = nn.ModuleList([Block(), Block()])
        self.add_module(head, nn.Linear(6, 10))


class WithOutputEmbeddings(Model):
    """A model that says what its head is, under a name that does not."""

    def __init__(self) -> None:
        super().__init__(head="to_words")

    def get_output_embeddings(self) -> nn.Module | None:
        return self.get_submodule("to_words")


BODY = [f"layers.{index}.{name}" for index in (0, 1) for name in ("attention.q_proj", "attention.v_proj")]
LINEAR = [
    f"layers.{index}.{name}"
    for index in (0, 1)
    for name in ("attention.q_proj", "attention.v_proj", "attention.proj", "up")
]
PROJ = ["layers.0.attention.proj", "layers.1.attention.proj"]


def found(model: nn.Module, pattern: Any = None, exclude: Any = None) -> list[str]:
    return [target.fqn for target in find_targets(model, pattern, exclude)]


def is_linear(fqn: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def is_conv1d(fqn: str, module: nn.Module) -> bool:
    return isinstance(module, Conv1D)


def nothing(fqn: str, module: nn.Module) -> bool:
    return False


# Walking


names = st.sampled_from(["a", "b", "0"])
trees: st.SearchStrategy[Any] = st.recursive(
    st.none(), lambda inner: st.dictionaries(names, inner, max_size=3), max_leaves=12
)


def build(tree: dict[str, Any] | None) -> nn.Module:
    return nn.Linear(2, 2) if tree is None else nn.ModuleDict({name: build(inner) for name, inner in tree.items()})


@given(trees)
def test_walking_comes_past_every_module_under_its_name_parents_first(tree: Any) -> None:
    model = build(tree)
    named = [(fqn, module) for fqn, module in model.named_modules() if fqn]
    visits = list(walk(model))
    assert [(visit.fqn, visit.module) for visit in visits] == named
    assert all(getattr(visit.parent, "_modules")[visit.attribute] is visit.module for visit in visits)  # noqa: B009
    assert all(visit.adapter is None for visit in visits)


@given(trees.filter(bool))
def test_walking_an_adapted_model_sees_it_as_it_was_before(tree: Any) -> None:
    model = nn.ModuleDict({"top": build(tree), "more": nn.Linear(2, 2), "layer": nn.Linear(2, 2)})
    before = [(visit.fqn, visit.module) for visit in walk(model)]
    parameters = [(fqn, id(parameter)) for fqn, _, _, parameter in named_parameters(model)]
    randlora.inject(model, r=1, targets="all-linear", exclude="layer")
    visits = list(walk(model))
    assert [(visit.fqn, visit.module) for visit in visits] == before
    assert [(fqn, id(parameter)) for fqn, _, _, parameter in named_parameters(model)] == parameters
    adapted = {visit.fqn for visit in visits if visit.adapter is not None}
    assert adapted == {fqn for fqn, module in before if isinstance(module, nn.Linear) and fqn != "layer"}


def test_own_parameters_come_once_for_every_place() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model[1].weight = model[0].bias
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    listed = list(named_parameters(model))
    assert [fqn for fqn, *_ in listed] == ["scale", "0.weight", "0.bias", "1.weight", "1.bias"]
    assert [fqn for fqn, *_ in listed] == [fqn for fqn, _ in model.named_parameters(remove_duplicate=False)]
    assert all(module._parameters[attribute] is parameter for _, module, attribute, parameter in listed)


# What a pattern means


PATTERNS: list[tuple[str, Any, list[str]]] = [
    ("regex", r".*\.(q|v)_proj", BODY),
    ("regex-of-one", r"layers\.1\.up", ["layers.1.up"]),
    ("regex-over-containers", r"layers\.\d\.(attention(\.proj)?|norm|up)", [LINEAR[i] for i in (2, 3, 6, 7)]),
    ("suffixes", ["q_proj", "v_proj"], BODY),
    ("suffix-is-no-substring", ["proj"], PROJ),
    ("suffix-of-two-components", ["attention.proj"], PROJ),
    ("whole-name", ["layers.0.up"], ["layers.0.up"]),
    ("tuple", ("up",), ["layers.0.up", "layers.1.up"]),
    ("set", {"up"}, ["layers.0.up", "layers.1.up"]),
    ("all-linear", "all-linear", LINEAR),
    ("callable", is_conv1d, ["layers.0.up", "layers.1.up"]),
    ("callable-by-name", lambda fqn, _: fqn.startswith("layers.0") and fqn.endswith("q_proj"), [LINEAR[0]]),
    ("head-by-regex", "head", ["head"]),
    ("head-by-suffix", ["head"], ["head"]),
]


@pytest.mark.parametrize(("pattern", "expected"), [row[1:] for row in PATTERNS], ids=[row[0] for row in PATTERNS])
def test_a_pattern_means_these_layers_in_the_models_order(pattern: Any, expected: list[str]) -> None:
    assert found(Model(), pattern) == expected


EXCLUDED: list[tuple[str, Any, list[str]]] = [
    ("regex", r".*\.attention\..*", ["layers.0.up", "layers.1.up"]),
    ("suffixes", ["q_proj", "v_proj"], [LINEAR[i] for i in (2, 3, 6, 7)]),
    ("suffix-is-no-substring", ["proj"], [LINEAR[i] for i in (0, 1, 3, 4, 5, 7)]),
    ("whole-name", ["layers.0.up"], [fqn for fqn in LINEAR if fqn != "layers.0.up"]),
    ("callable", is_linear, ["layers.0.up", "layers.1.up"]),
    ("callable-of-nothing", nothing, LINEAR),
    ("what-is-left-out-anyway", ["head"], LINEAR),
    ("all-in-a-module", ["layers.0"], LINEAR[4:]),
    ("all-but-by-regex", r"(?!.*\.up$).*", ["layers.0.up", "layers.1.up"]),
    ("all-but-by-callable", lambda fqn, _: not fqn.endswith(".up"), ["layers.0.up", "layers.1.up"]),
    ("all-in-modules-of-a-name", ["attention"], ["layers.0.up", "layers.1.up"]),
]


@pytest.mark.parametrize(("exclude", "expected"), [row[1:] for row in EXCLUDED], ids=[row[0] for row in EXCLUDED])
def test_what_is_excluded_is_left_out(exclude: Any, expected: list[str]) -> None:
    assert found(Model(), None, exclude) == expected
    assert found(Model(), "all-linear", exclude) == expected


@pytest.mark.parametrize("exclude", [["b"], ["a"], "b", "a", ["a", "b"]], ids=str)
def test_a_layer_of_two_names_is_excluded_by_either(exclude: Any) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    model["b"] = model["a"]
    assert found(model, None, exclude) == ["c"]
    assert found(model, ["a", "c"], exclude) == ["c"]


# Which rule applies


@pytest.mark.parametrize(
    ("model", "pattern", "rule", "count"),
    [
        (Model("llama"), None, "the preset of model_type 'llama' (q_proj, v_proj)", 4),
        (Model("unheard-of"), None, "all linear layers but the output head", 8),
        (Model(None), None, "all linear layers but the output head", 8),
        (Model("llama"), "all-linear", "all linear layers but the output head", 8),
        (Model("llama"), ["up"], "the names up", 2),
        (Model("llama"), ["up", "proj"], "the names up, proj", 4),
        (Model("llama"), "head", "the regex 'head'", 1),
        (Model("llama"), is_conv1d, "the callable is_conv1d", 2),
    ],
    ids=["preset", "unknown-type", "no-type", "all-linear-over-preset", "name", "names", "regex", "callable"],
)
def test_the_rule_that_applied_is_told(model: nn.Module, pattern: Any, rule: str, count: int) -> None:
    selection = select(model, pattern, None)
    assert selection.rule == rule
    assert len(selection.targets) == count
    assert select(model, pattern, lambda *_: False).rule == f"{rule}, without the excluded"


def test_a_model_without_a_config_is_adapted_by_the_general_rule() -> None:
    assert select(nn.Sequential(nn.Linear(2, 2)), None, None).rule == "all linear layers but the output head"


def test_a_preset_may_name_layers_that_a_variant_lacks() -> None:
    model = Model("blip-2")  # q, v, q_proj, v_proj: the first two are of another half
    assert found(model) == BODY


def test_a_preset_that_matches_nothing_is_refused_with_what_the_model_has() -> None:
    with pytest.raises(
        randlora.TargetError, match=r"the preset of model_type 'gpt2' \(c_attn\) matches no linear layer"
    ):
        find_targets(Model("gpt2"))


@pytest.mark.parametrize("head", ["lm_head", "classifier", "score", "qa_outputs", "heads", "embed_out"])
def test_a_head_is_left_out_by_its_name(head: str) -> None:
    selection = select(Model(head=head), None, None)
    assert [target.fqn for target in selection.targets] == LINEAR
    assert selection.skipped == {head: "the output head"}


def test_a_layer_deeper_in_the_model_is_no_head_for_its_name() -> None:
    model = nn.ModuleDict({"body": nn.ModuleDict({"head": nn.Linear(2, 2)}), "head": nn.Sequential(nn.Linear(2, 2))})
    selection = select(model, None, None)
    assert [target.fqn for target in selection.targets] == ["body.head"]
    assert selection.skipped == {"head.0": "the output head"}


def test_a_head_is_left_out_where_the_model_says_which_it_is() -> None:
    selection = select(WithOutputEmbeddings(), None, None)
    assert [target.fqn for target in selection.targets] == LINEAR
    assert selection.skipped == {"to_words": "the output head"}


def test_a_head_is_left_out_still_where_it_is_adapted_already() -> None:
    model = WithOutputEmbeddings()
    randlora.inject(model, r=2, targets=["to_words"])
    assert found(model) == LINEAR


def test_a_head_of_two_names_is_left_out_under_both() -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "out": nn.Linear(2, 2)})
    model["head"] = model["out"]
    selection = select(model, None, None)
    assert [target.fqn for target in selection.targets] == ["body"]
    assert set(selection.skipped) == {"out", "head"}


def test_a_head_that_is_asked_for_is_adapted() -> None:
    assert found(WithOutputEmbeddings(), ["to_words"]) == ["to_words"]


def test_layers_that_cannot_be_adapted_are_left_out_of_all_linear_with_the_reason() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "up": nn.Linear(4, 4)})
    selection = select(model, "all-linear", None)
    assert [target.fqn for target in selection.targets] == ["up"]
    assert list(selection.skipped) == ["attention.out_proj"]
    assert selection.skipped["attention.out_proj"].startswith("nn.MultiheadAttention reads this weight")


# What is refused


REFUSED: list[tuple[str, Any, str]] = [
    ("regex-of-nothing", "q_prj", "'q_prj' matches no linear layer; the nearest names are q_proj, "),
    ("regex-by-search", "attention", "'attention' matches no linear layer"),
    ("name-of-nothing", ["q_prj"], "'q_prj' matches no linear layer; the nearest names are q_proj, "),
    ("name-of-nothing-beside-one", ["v_proj", "q_prj"], "'q_prj' matches no linear layer"),
    (
        "path-of-nothing",
        ["layers.2.up"],
        "'layers.2.up' matches no linear layer; the nearest names are layers.1.up, layers.0.up",
    ),
    ("a-norm", ["norm"], "'norm' matches no linear layer"),
    ("a-container", ["attention"], "'attention' matches no linear layer"),
    ("a-norm-beside-one", ["norm", "up"], "'norm' matches no linear layer"),
    ("norms-by-regex", r".*\.norm", "matches no linear layer"),
    ("an-embedding", ["embed"], "embed is a Embedding, and only linear layers can be adapted"),
    ("an-embedding-by-regex", "embed|head", "embed is a Embedding, and only linear layers can be adapted"),
    ("everything", ".*", "embed is a Embedding, and only linear layers can be adapted: narrow the pattern"),
    ("callable-of-nothing", nothing, "the callable nothing matches no linear layer; the model has"),
]


@pytest.mark.parametrize(("pattern", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_a_pattern_that_means_no_linear_layer_is_refused(pattern: Any, message: str) -> None:
    with pytest.raises(randlora.TargetError, match=re.escape(message)):
        find_targets(Model(), pattern)


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Conv2d(2, 2, 1), "Conv2d"),
        (nn.Bilinear(2, 2, 2), "Bilinear"),
        (nn.LazyConv1d(2, 1), "LazyConv1d"),
        (nn.GRU(2, 2), "GRU"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_layer_with_a_weight_matrix_is_refused_by_name_and_kind(layer: nn.Module, kind: str) -> None:
    model = nn.ModuleDict({"up": nn.Linear(2, 2), "other": layer})
    with pytest.raises(randlora.TargetError, match=f"other is a {kind}, and only linear layers can be adapted"):
        find_targets(model, "up|other")


def test_a_refused_kind_is_named_with_its_reason() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    with pytest.raises(
        randlora.TargetError,
        match=r"attention\.out_proj \(NonDynamicallyQuantizableLinear\) cannot be adapted: nn\.MultiheadAttention",
    ):
        find_targets(model, ["out_proj"])


def test_every_entry_that_matches_nothing_is_named_at_once() -> None:
    with pytest.raises(randlora.TargetError, match="cannot find the targets, 2 problems") as caught:
        find_targets(Model(), ["q_prj", "up", "k_proj"])
    assert "'q_prj' matches" in str(caught.value)
    assert "'k_proj' matches" in str(caught.value)


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        (["q_prj"], "exclude='q_prj' matches no linear layer; the nearest names are q_proj"),
        (["q_proj", "k_proj"], "exclude='k_proj' matches no linear layer"),
        (["norm"], "exclude='norm' matches no linear layer"),
        (["embed", "layers.0"], "exclude='embed' matches no linear layer"),
        ("proj", "exclude='proj' matches no linear layer"),
        (r"layers\.0", "exclude='layers\\\\.0' matches no linear layer"),
    ],
    ids=["name", "one-of-two", "a-norm", "an-embedding", "regex-by-search", "regex-of-a-module"],
)
def test_an_exclude_that_matches_nothing_is_refused(exclude: Any, message: str) -> None:
    with pytest.raises(randlora.TargetError, match=re.escape(message)):
        find_targets(Model(), None, exclude)


@pytest.mark.parametrize("pattern", ["(", ["q", 3], 7], ids=str)
@pytest.mark.parametrize("name", ["targets", "exclude"])
def test_a_pattern_that_is_none_is_refused(name: str, pattern: Any) -> None:
    patterns = {"targets": None, "exclude": None, name: pattern}
    with pytest.raises(randlora.ConfigError, match=f"configure RandLoRA: {name}"):
        find_targets(Model(), patterns["targets"], patterns["exclude"])


def test_excluding_every_layer_is_refused() -> None:
    with pytest.raises(randlora.TargetError, match="the names up, without the excluded leaves no layer to adapt"):
        find_targets(Model(), ["up"], ["up"])


@pytest.mark.parametrize("model", [nn.Linear(2, 2), Conv1D(2, 2)], ids=["Linear", "Conv1D"])
def test_the_model_itself_cannot_be_a_target(model: nn.Module) -> None:
    with pytest.raises(randlora.TargetError, match=f"the model itself is a {type(model).__name__}, .*wrap it"):
        find_targets(model)


@pytest.mark.parametrize("model", [nn.Sequential(), nn.Sequential(nn.Tanh())], ids=["empty", "no-linear"])
def test_a_model_without_linear_layers_is_refused(model: nn.Module) -> None:
    with pytest.raises(randlora.TargetError, match="leaves no layer to adapt"):
        find_targets(model)


# Shared and nested layers


def test_a_layer_used_in_two_places_is_one_target_with_both() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "inner": nn.ModuleDict()})
    inner = model["inner"]
    assert isinstance(inner, nn.ModuleDict)
    inner["b"] = model["a"]
    (target,) = find_targets(model)
    assert target.fqn == "a"
    assert target.places == ((model, "a"), (inner, "b"))
    replacement = nn.Tanh()
    target.replace(replacement)
    assert model["a"] is inner["b"] is replacement


@pytest.mark.parametrize("pattern", [["a"], ["b"], "b", ["a", "b"], None], ids=str)
def test_a_layer_used_in_two_places_is_found_by_either_name_and_called_by_its_first(pattern: Any) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    model["b"] = model["a"]
    (target,) = find_targets(model, pattern)
    assert (target.fqn, len(target.places)) == ("a", 2)


def test_a_layer_in_a_container_used_in_two_places_hangs_in_one() -> None:
    block = nn.Sequential(nn.Linear(2, 2))
    (target,) = find_targets(nn.ModuleDict({"a": block, "b": block}))
    assert target.places == ((block, "0"),)


class Outer(nn.Linear):
    """A linear layer that holds another."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.inner = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.inner(super().forward(x))
        return output


def test_a_target_inside_a_target_is_a_target_of_its_own() -> None:
    model = nn.ModuleDict({"outer": Outer()})
    outer = model["outer"]
    assert found(model) == ["outer", "outer.inner"]
    randlora.inject(model, r=1)
    assert found(model) == ["outer", "outer.inner"]
    assert isinstance(outer.get_submodule("inner"), randlora.AdapterLayer)
    randlora.eject(model)
    assert model["outer"] is outer
    assert type(outer.get_submodule("inner")) is nn.Linear


def test_the_target_says_which_adapter_layer_is_round_it() -> None:
    model = Model()
    plain = find_targets(model, ["up"])
    randlora.inject(model, r=2, targets=["up"])
    wrapped = find_targets(model, ["up", "proj"])
    assert [target.adapter for target in plain] == [None, None]
    assert [target.adapter is not None for target in wrapped] == [False, True, False, True]
    assert [target.module for target in wrapped if target.adapter] == [target.module for target in plain]
    assert model.get_submodule("layers.0.up") is wrapped[1].adapter


# Dims


sides = st.tuples(st.integers(1, 30), st.integers(1, 30))


def linear_model(shapes: list[tuple[int, int]], conv1d: bool) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(Conv1D(out, in_) if conv1d else nn.Linear(in_, out) for out, in_ in shapes))


@given(st.lists(sides, min_size=1, max_size=5), st.booleans())
def test_dims_are_those_that_peft_draws_and_those_that_layers_slice(
    shapes: list[tuple[int, int]], conv1d: bool
) -> None:
    targets = find_targets(linear_model(shapes, conv1d))
    assert [(target.out_features, target.in_features) for target in targets] == shapes
    largest = (0, 0)
    for out, in_ in shapes:  # as PEFT 0.21.2 goes through them
        largest = (max(largest[0], out), max(largest[1], in_))
    assert max_dims(targets) == (max(largest), min(largest))
    assert used_dims(targets) == (max(max(shape) for shape in shapes), max(min(shape) for shape in shapes))
    assert all(drawn >= used for drawn, used in zip(max_dims(targets), used_dims(targets), strict=True))


# Obstacles


def problems(model: nn.Module, pattern: Any = None) -> list[str]:
    return obstacles(model, find_targets(model, pattern))


def test_a_plain_model_has_no_obstacles() -> None:
    assert problems(Model(), "all-linear") == []


def tied_parameter() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "up": nn.Linear(3, 4)})
    model["up"].weight = model["embed"].weight
    return model


def tied_storage() -> nn.Module:
    model = tied_parameter()
    weight = model.get_parameter("embed.weight")
    model.get_submodule("up").weight = nn.Parameter(weight.detach())
    assert model.get_parameter("up.weight") is not weight
    return model


def tied_on_meta() -> nn.Module:
    with torch.device("meta"):
        return tied_parameter()


@pytest.mark.parametrize("make", [tied_parameter, tied_storage, tied_on_meta], ids=lambda make: make.__name__)
def test_a_weight_tied_to_another_module_is_refused_and_both_are_named(make: Callable[[], nn.Module]) -> None:
    message = "the weight of up is tied to embed.weight: untie it, or leave the layer out"
    assert problems(make(), ["up"]) == [message]
    with pytest.raises(randlora.TargetError, match=re.escape(message)):
        randlora.inject(make(), r=1)


def test_two_targets_of_one_weight_are_both_refused() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    assert problems(model) == [
        "the weight of a is tied to b.weight: untie it, or leave the layer out",
        "the weight of b is tied to a.weight: untie it, or leave the layer out",
    ]


def test_a_layer_used_in_two_places_is_not_tied_to_itself() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3)})
    model["b"] = model["a"]
    assert problems(model) == []


def test_a_tied_bias_and_tied_weights_outside_the_targets_are_no_obstacle() -> None:
    model = nn.ModuleDict({
        "a": nn.Linear(3, 3),
        "b": nn.Linear(3, 3),
        "x": nn.Embedding(2, 2),
        "y": nn.Embedding(2, 2),
    })
    model["b"].bias = model["a"].bias
    model["y"].weight = model["x"].weight
    assert problems(model) == []


def parametrised() -> nn.Module:
    layer: nn.Module = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    return layer


def computed() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.register_parameter("weight", None)
    return layer


@pytest.mark.parametrize("make", [parametrised, computed], ids=lambda make: make.__name__)
def test_a_layer_that_computes_its_parameters_is_refused(make: Callable[[], nn.Module]) -> None:
    message = "layer computes its weight from other parameters: remove the parametrisation first"
    assert problems(nn.ModuleDict({"layer": make()})) == [message]
    with pytest.raises(randlora.TargetError, match=message):
        randlora.inject(nn.ModuleDict({"layer": make(), "norm": nn.LayerNorm(3)}), r=1, train_also=["norm"])


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_layer_without_a_shape_is_refused_until_it_has_one() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(randlora.TargetError, match="0 has no shape yet: run one forward pass first"):
        randlora.inject(model, r=1)
    model(torch.ones(1, 2))
    assert problems(model) == []


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32], ids=str)
def test_a_weight_of_integers_is_refused(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].weight = nn.Parameter(torch.ones(3, 3, dtype=dtype), requires_grad=False)
    assert problems(model) == [f"0 has a weight of {dtype}, expected a floating dtype: dequantise it first"]


def test_all_obstacles_are_named_at_once() -> None:
    model = nn.ModuleDict({"a": parametrised(), "b": nn.Linear(3, 3), "embed": nn.Embedding(3, 3)})
    model["b"].weight = model["embed"].weight
    with pytest.raises(randlora.TargetError, match="2 problems") as caught:
        randlora.inject(model, r=1)
    assert "a computes its weight" in str(caught.value)
    assert "the weight of b is tied to embed.weight" in str(caught.value)


# Weights that are elsewhere


def emptied(model: nn.Module) -> nn.Module:
    """Leave every parameter empty with its shape beside it, as DeepSpeed's ZeRO-3 does between forwards."""
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    return model


def test_shapes_are_read_beside_a_weight_that_is_empty() -> None:
    model = nn.Sequential(nn.Linear(7, 3), Conv1D(5, 3))
    expected = [(target.out_features, target.in_features) for target in find_targets(model)]
    assert expected == [(3, 7), (5, 3)]
    targets = find_targets(emptied(model))
    assert [(target.out_features, target.in_features) for target in targets] == expected
    assert all(isinstance(size, int) for target in targets for size in (target.in_features, target.out_features))


def test_empty_weights_are_not_taken_for_tied_ones() -> None:
    assert problems(emptied(nn.Sequential(nn.Linear(7, 3), nn.Linear(3, 3), Conv1D(5, 3)))) == []


def test_a_model_on_the_meta_device_has_the_same_targets() -> None:
    with torch.device("meta"):
        model = Model()
    assert found(model) == LINEAR
    assert problems(model) == []


def test_a_target_reads_its_dims_off_its_layer() -> None:
    (target,) = find_targets(nn.Sequential(nn.Linear(7, 3)))
    assert isinstance(target, Target)
    assert (target.in_features, target.out_features) == (7, 3)
    assert math.prod(target.module.get_parameter("weight").shape) == 21


def test_finding_targets_leaves_no_trace() -> None:
    model = Model()
    before = [(fqn, id(module), sorted(vars(module))) for fqn, module in model.named_modules()]
    find_targets(model, ".*proj", ["v_proj"])
    assert [(fqn, id(module), sorted(vars(module))) for fqn, module in model.named_modules()] == before

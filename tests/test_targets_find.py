"""Which layers and weights a pattern means, by which rule, and which patterns are refused."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

import randlora
from randlora.errors import ConfigError, TargetError
from randlora.targets.select import find_targets, select
from randlora.targets.walk import Census
from tests.kit import untouched
from tests.left_out_models import mixed, quiet_plan, register
from tests.walk_models import LINEAR, Model, found


class WithOutputEmbeddings(Model):
    """A model that says what its head is, under a name that does not."""

    def __init__(self) -> None:
        super().__init__(head="to_words")

    def get_output_embeddings(self) -> nn.Module | None:
        return self.get_submodule("to_words")


BODY = [f"layers.{index}.{name}" for index in (0, 1) for name in ("attention.q_proj", "attention.v_proj")]
PROJ = ["layers.0.attention.proj", "layers.1.attention.proj"]


def is_linear(fqn: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def is_conv1d(fqn: str, module: nn.Module) -> bool:
    return isinstance(module, Conv1D)


def nothing(fqn: str, module: nn.Module) -> bool:
    return False


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
    ("a-module", ["layers.0"], LINEAR[:4]),
    ("modules-of-a-name", ["attention"], [LINEAR[i] for i in (0, 1, 2, 4, 5, 6)]),
    ("a-module-and-layers", ["layers.0.attention", "up"], [LINEAR[i] for i in (0, 1, 2, 3, 7)]),
    ("a-module-of-modules", ["layers"], LINEAR),
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
    ("a-norm", ["norm"], LINEAR),
    ("norms-by-regex", r".*\.norm", LINEAR),
    ("an-embedding-and-a-module", ["embed", "layers.0"], LINEAR[4:]),
    ("by-an-attribute-of-linear-layers", lambda _, module: module.bias.numel() != 12, LINEAR[3::4]),
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
        (Model("unheard-of"), None, "the query and value projections (q_proj, v_proj)", 4),
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
    selection = select(Census.of(model), pattern, None)
    assert selection.rule == rule
    assert len(selection.sites) == count
    assert select(Census.of(model), pattern, lambda *_: False).rule == f"{rule}, without the excluded"


def test_a_preset_may_name_layers_that_a_variant_lacks() -> None:
    model = Model("blip-2")  # q, v, q_proj, v_proj: the first two are of another half
    assert found(model) == BODY


def test_a_preset_that_matches_nothing_is_refused_with_what_the_model_has() -> None:
    with pytest.raises(
        TargetError, match=r"the preset of model_type 'gpt2' \(c_attn\) matches no layer or weight that can be adapted"
    ):
        find_targets(Model("gpt2"))


@pytest.mark.parametrize("head", ["lm_head", "classifier", "score", "qa_outputs", "heads", "embed_out"])
def test_a_head_is_left_out_by_its_name(head: str) -> None:
    selection = select(Census.of(Model(head=head)), None, None)
    assert [site.fqn for site in selection.sites] == LINEAR
    assert selection.skipped == {head: "the output head"}


def test_a_layer_deeper_in_the_model_is_no_head_for_its_name() -> None:
    model = nn.ModuleDict({"body": nn.ModuleDict({"head": nn.Linear(2, 2)}), "head": nn.Sequential(nn.Linear(2, 2))})
    selection = select(Census.of(model), None, None)
    assert [site.fqn for site in selection.sites] == ["body.head"]
    assert selection.skipped == {"head.0": "the output head"}


def test_a_head_is_left_out_where_the_model_says_which_it_is() -> None:
    selection = select(Census.of(WithOutputEmbeddings()), None, None)
    assert [site.fqn for site in selection.sites] == LINEAR
    assert selection.skipped == {"to_words": "the output head"}


def test_a_head_is_left_out_still_where_it_is_adapted_already() -> None:
    model = WithOutputEmbeddings()
    randlora.inject(model, r=2, targets=["to_words"])
    assert found(model) == LINEAR


def test_a_head_of_two_names_is_left_out_under_both() -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "out": nn.Linear(2, 2)})
    model["head"] = model["out"]
    selection = select(Census.of(model), None, None)
    assert [site.fqn for site in selection.sites] == ["body"]
    assert set(selection.skipped) == {"out", "head"}


def test_a_head_that_is_asked_for_is_adapted() -> None:
    assert found(WithOutputEmbeddings(), ["to_words"]) == ["to_words"]


def test_all_linear_includes_attention() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "up": nn.Linear(4, 4)})
    selection = select(Census.of(model), "all-linear", None)
    assert [site.fqn for site in selection.sites] == ["attention.in_proj_weight", "attention.out_proj", "up"]
    assert selection.skipped == {}


# What is refused


REFUSED: list[tuple[str, Any, str]] = [
    (
        "regex-of-nothing",
        "q_prj",
        "'q_prj' matches no layer or weight that can be adapted; the nearest names are q_proj, ",
    ),
    ("regex-by-search", "attention", "'attention' matches no layer or weight that can be adapted"),
    (
        "name-of-nothing",
        ["q_prj"],
        "'q_prj' matches no layer or weight that can be adapted; the nearest names are q_proj, ",
    ),
    ("name-of-nothing-beside-one", ["v_proj", "q_prj"], "'q_prj' matches no layer or weight that can be adapted"),
    (
        "path-of-nothing",
        ["layers.2.up"],
        "'layers.2.up' matches no layer or weight that can be adapted; the nearest names are layers.1.up, layers.0.up",
    ),
    ("a-norm", ["norm"], "'norm' matches no layer or weight that can be adapted"),
    ("a-norm-beside-one", ["norm", "up"], "'norm' matches no layer or weight that can be adapted"),
    ("norms-by-regex", r".*\.norm", "matches no layer or weight that can be adapted"),
    ("an-embedding", ["embed"], "embed is of type EmbeddingBag, for which there is no adapter layer"),
    ("an-embedding-by-regex", "embed|head", "embed is of type EmbeddingBag, for which there is no adapter layer"),
    ("everything", ".*", "embed is of type EmbeddingBag, for which there is no adapter layer: narrow the pattern"),
    (
        "callable-of-nothing",
        nothing,
        "the callable nothing matches no layer or weight that can be adapted; the model has",
    ),
]


@pytest.mark.parametrize(("pattern", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_a_pattern_that_means_no_linear_layer_is_refused(pattern: Any, message: str) -> None:
    with pytest.raises(TargetError, match=re.escape(message)):
        find_targets(Model(), pattern)


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        (["q_prj"], "exclude='q_prj' matches no layer or weight; the nearest names are q_proj"),
        (["q_proj", "k_proj"], "exclude='k_proj' matches no layer or weight"),
        (["nrm"], "exclude='nrm' matches no layer or weight; the nearest names are norm"),
        (["embd", "layers.0"], "exclude='embd' matches no layer or weight; the nearest names are embed"),
        ("proj", "exclude='proj' matches no layer or weight"),
        (r"layers\.0", "exclude='layers\\\\.0' matches no layer or weight"),
    ],
    ids=["name", "one-of-two", "a-norm", "an-embedding", "regex-by-search", "regex-of-a-module"],
)
def test_an_exclude_that_matches_nothing_is_refused(exclude: Any, message: str) -> None:
    with pytest.raises(TargetError, match=re.escape(message)):
        find_targets(Model(), None, exclude)


@pytest.mark.parametrize("pattern", ["(", ["q", 3], 7], ids=str)
@pytest.mark.parametrize("name", ["targets", "exclude"])
def test_a_pattern_that_is_none_is_refused(name: str, pattern: Any) -> None:
    patterns = {"targets": None, "exclude": None, name: pattern}
    with pytest.raises(ConfigError, match=f"configure RandLoRA: {name}"):
        find_targets(Model(), patterns["targets"], patterns["exclude"])


def test_excluding_every_layer_is_refused() -> None:
    with pytest.raises(TargetError, match="the names up, without the excluded: no layer is left to adapt"):
        find_targets(Model(), ["up"], ["up"])


@pytest.mark.parametrize("model", [nn.Linear(2, 2), Conv1D(2, 2)], ids=["Linear", "Conv1D"])
def test_the_model_itself_cannot_be_a_target(model: nn.Module) -> None:
    with pytest.raises(TargetError, match=f"itself is a layer .{type(model).__name__}. .*wrap it in a module"):
        find_targets(model)


def test_finding_targets_leaves_no_trace() -> None:
    model = Model()
    before = [(fqn, id(module), sorted(vars(module))) for fqn, module in model.named_modules()]
    find_targets(model, ".*proj", ["v_proj"])
    assert [(fqn, id(module), sorted(vars(module))) for fqn, module in model.named_modules()] == before


@pytest.fixture(autouse=True, scope="module")
def _kinds() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        yield


def test_a_weight_that_other_code_reads_is_found_by_its_name_and_its_last_component() -> None:
    model = nn.ModuleDict({"first": mixed(), "second": mixed()})
    assert quiet_plan(model, targets=["up_proj"]).targets == ("first.experts.up_proj", "second.experts.up_proj")
    assert quiet_plan(model, targets=["second.experts.up_proj"]).targets == ("second.experts.up_proj",)
    assert quiet_plan(model, targets=r".*\.up_proj").targets == ("first.experts.up_proj", "second.experts.up_proj")
    with pytest.raises(TargetError, match=r'did you mean targets=\["up_proj"\]'):
        quiet_plan(model, targets="up_proj")
    with pytest.raises(TargetError, match=r"nearest names are up_proj"):
        quiet_plan(model, targets=["up_prjo"])


NO_LAYER = "for which there is no adapter layer"
OF_NO_KIND: list[tuple[str, Any, str]] = [
    ("name", ["odd.table"], rf"odd\.table is a parameter of Odd with shape \(3, 5\), {NO_LAYER}: narrow the pattern, "),
    ("beside-others", ["up", "stack"], rf"odd\.stack is a parameter of Odd with shape \(2, 3, 4\), {NO_LAYER}"),
    ("regex", r"up|odd\.table", rf"odd\.table is a parameter of Odd .*, {NO_LAYER}"),
    ("of-an-owner", r"experts\..*", rf"experts\.router is a parameter of Experts .*, {NO_LAYER}"),
    ("module", ["odd"], rf"odd is of type Odd, {NO_LAYER}: .* or register one with randlora\.layers\.register_layer"),
    ("last-component", "table", rf"'table' matches .*, only odd\.table \(a parameter of Odd .*, {NO_LAYER}: register"),
    ("vector", ["scale"], r"only odd\.scale \(a parameter of Odd with shape \(7,\), not a matrix\)"),
    ("of-a-layer", ["up.weight"], r"only up\.weight \(a parameter of up, which is the name to give\)"),
    ("in-a-named-module", ["experts", "router"], rf"experts\.router is a parameter of Experts .*, {NO_LAYER}"),
]


@pytest.mark.parametrize(("targets", "message"), [row[1:] for row in OF_NO_KIND], ids=[row[0] for row in OF_NO_KIND])
def test_a_parameter_that_no_kind_serves_is_refused_by_name_and_type(targets: Any, message: str) -> None:
    model = mixed()
    with untouched(model), pytest.raises(TargetError, match=message):
        randlora.inject(model, r=2, targets=targets)


def test_a_module_that_is_refused_stands_for_its_parameters() -> None:
    with pytest.raises(TargetError, match=r"^cannot find the targets: odd is of type Odd, .*$"):
        quiet_plan(mixed(), targets=r"odd.*")


def test_a_parameter_that_no_kind_serves_can_be_excluded() -> None:
    report = quiet_plan(mixed(), targets=r"experts\..*", exclude=["router"])
    assert report.targets == ("experts.up_proj", "experts.down_proj")

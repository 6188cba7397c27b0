"""What a rule selects and what cannot be adapted: every matrix is adapted, skipped or said to be left out, once."""

import json
import re
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import randlora
from randlora.errors import TargetError
from randlora.layers.linear import LinearAdapter
from randlora.report import Report
from randlora.targets.left_out import LeftOut
from tests.kit import fill, on_one_line, untouched
from tests.models import library

pytestmark = pytest.mark.filterwarnings("ignore:the default adapts only:UserWarning")
plan = partial(randlora.plan, r=2)
RULES = (None, "all-linear", "all")
ATTENTION = ("attention.in_proj_weight", "attention.out_proj")
HEAD = "the output head"
NO_LAYER = "for which there is no adapter layer"


class Held(nn.Module):
    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


class Odd(Held):
    def __init__(self) -> None:
        super().__init__(table=(3, 5), stack=(2, 3, 4), scale=(7,))


class Experts(Held):
    def __init__(self) -> None:
        super().__init__(up_proj=(2, 8, 6), down_proj=(2, 6, 8), router=(4, 6))


def kernel() -> nn.Module:
    return nn.Conv1d(4, 6, 1, bias=False)


def groups(report: Report) -> dict[str, LeftOut]:
    return {group.kind or group.owner or "": group for group in report.left_out if group.reason is None}


def mixed() -> nn.ModuleDict:
    return nn.ModuleDict({
        "attention": nn.MultiheadAttention(4, 2),
        "up": nn.Linear(4, 6),
        "kernel": kernel(),
        "experts": Experts(),
        "odd": Odd(),
        "head": nn.Sequential(kernel(), nn.Linear(6, 3)),
    })


def of_type(model_type: str | None, **layers: nn.Module) -> nn.ModuleDict:
    model = nn.ModuleDict(layers)
    model.__dict__["config"] = SimpleNamespace(model_type=model_type)
    return model


def names_of(fqn: str) -> set[str]:
    owner, _, attribute = fqn.rpartition(".")
    computed_from = attribute.removesuffix("_g").removesuffix("_v") == "weight" or ".parametrizations." in fqn
    return {fqn, owner.split(".parametrizations.")[0]} if computed_from else {fqn}


def assert_every_matrix_is_told_of_once(model: nn.Module, report: Report) -> None:
    total = sum(parameter.numel() for parameter in model.parameters())
    places: dict[Tensor, set[str]] = {}
    for fqn, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim >= 2:
            places.setdefault(parameter, set()).update(names_of(fqn))
    left = 0
    for matrix, names in places.items():
        is_left = [group for group in report.left_out if names & set(group.fqns)]
        told = [names & set(report.targets), names & set(report.skipped), *is_left]
        assert sum(map(bool, told)) == 1, (names, told)
        left += matrix.numel() * bool(is_left)
    assert left == sum(group.parameters for group in report.left_out)
    assert left / total == pytest.approx(sum(group.share for group in report.left_out))


def test_all_linear_is_linear_layers_and_attention_and_all_is_every_kind() -> None:
    heads = {"head.1": HEAD, "head.0": HEAD}
    report = plan(mixed(), targets="all-linear")
    assert report.targets == plan(mixed()).targets == (*ATTENTION, "up")
    assert report.skipped == heads
    report = plan(mixed(), targets="all")
    assert report.targets == (*ATTENTION, "up", "kernel", "experts.up_proj", "experts.down_proj")
    assert report.skipped == heads
    assert report.rule == "all layers and weights that can be adapted but the output head"
    rows = [(row.kind, row.count, row.in_features, row.out_features) for row in report.rows]
    assert rows[3:] == [("convolution", 1, 4, 6), ("experts", 2, 6, 8), ("experts", 2, 8, 6)]
    named: list[tuple[Any, Any]] = [(["up_proj"], None), (["experts.up_proj"], None), (r".*\.up_proj", None)]
    for targets, exclude in [*named, (r"experts\..*", ["router", "down_proj"])]:
        report = plan(mixed(), targets=targets, exclude=exclude)
        assert report.targets == ("experts.up_proj",)
        assert (report.left_out, report.warning) == ((), "")  # nothing is told of what the user described


UNKNOWN = 'all linear layers (no output head recognized: train_also=["out"] would train the last one whole)'
ADAPTED: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (("first", "out"), {}, UNKNOWN),
    (("first", "out"), {"targets": "all"}, UNKNOWN.replace("linear layers", "layers and weights that can be adapted")),
    (("first", "out"), {"train_also": ["out"]}, "all linear layers"),
    (("first", "out"), {"exclude": ["out"]}, "all linear layers, without the excluded"),
    (("first", "out"), {"exclude": ["first"]}, "all linear layers, without the excluded"),
    (("out",), {"targets": "all-linear"}, "all linear layers"),
    (("first", "lm_head"), {}, "all linear layers but the output head"),
]


@pytest.mark.parametrize(("names", "options", "rule"), ADAPTED, ids=str)
def test_a_head_that_is_not_recognized_is_told_with_how_to_train_it_whole(
    names: tuple[str, ...], options: dict[str, Any], rule: str
) -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
    report = plan(model, **options)
    assert report.rule == rule
    if rule == UNKNOWN:
        assert report.targets == names
        told = re.findall("train_also=[^ ]*", on_one_line(report))
        assert plan(model, train_also=json.loads(told[0].partition("=")[2])).targets == ("first",)


def test_a_report_says_what_is_left_out_and_how_much_of_the_model_that_is() -> None:
    report = plan(mixed(), targets="all-linear")
    total = sum(parameter.numel() for parameter in mixed().parameters())
    register = "register one with randlora.layers.register_layer (docs/extending.md)"
    said = [
        "left out: head.1, head.0 (the output head)",
        f'left out: 1 convolution, {24 / total:.2%} of the weights: targets="all" adapts it',
        f'left out: 2 expert tensors, {192 / total:.2%} of the weights: targets="all" adapts them',
        f"no adapter layer for 3 parameters of Experts, Odd, {63 / total:.2%} of the weights: {register}",
    ]
    assert " ".join(said) in on_one_line(report)
    fqns = ("experts.up_proj", "experts.down_proj")
    assert groups(report)["experts"] == LeftOut("experts", None, fqns, 192, 192 / total, "all", None)


def test_presets_adapt_heads_they_name_and_what_is_excluded_or_trained_also_is_told_as_such() -> None:
    head = nn.ModuleDict({"query_key_value": nn.Linear(4, 12), "up": nn.Linear(4, 8)})
    report = plan(of_type("bloom", head=head, up=nn.Linear(4, 8)))
    assert (report.targets, report.skipped) == (("head.query_key_value",), {"head.up": HEAD})
    assert [(group.kind, group.fqns, group.targets) for group in report.left_out] == [("linear", ("up",), "all-linear")]
    report = plan(mixed(), targets="all-linear", exclude=["up", "experts"])
    reasons = {group.fqns: group.reason for group in report.left_out}
    assert reasons["up",] == reasons["experts.up_proj", "experts.down_proj"] == reasons["experts.router",] == "excluded"
    assert reasons["kernel",] is None
    assert on_one_line(report).count("of the weights (excluded)") == 3
    report = plan(mixed(), targets="all-linear", train_also=["odd.table", "kernel", "head.0", "head.1.bias"])
    assert groups(report)["Experts, Odd"].fqns == ("experts.router", "odd.stack")
    assert "convolution" not in groups(report)
    assert report.skipped == {"head.1": HEAD}
    types = [type(f"Odd{index}", (Odd,), {}) for index in range(9)]  # of which four are named and the rest counted
    model = nn.Sequential(nn.Linear(4, 4), *(kind() for kind in types))
    told = "no adapter layer for 18 parameters of Odd0, Odd1, Odd2, Odd3 and 5 more, "
    assert on_one_line(plan(model, targets="all")).count(told) == 1


# What cannot be adapted


def linear_with(weight: nn.Parameter | None) -> nn.Module:
    layer = nn.Linear(4, 6)
    layer.register_parameter("weight", weight)
    return layer


def of_dtype(dtype: torch.dtype) -> nn.Module:
    return linear_with(nn.Parameter(torch.ones(6, 4).to(dtype), requires_grad=False))


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings(action="ignore"):
        layer: nn.Module = torch.nn.utils.weight_norm(nn.Linear(4, 6))
    return layer


weight_norm = torch.nn.utils.parametrizations.weight_norm
UNSOUND: dict[str, Callable[[], nn.Module]] = {
    "integers": lambda: of_dtype(torch.int8),
    "normed": lambda: weight_norm(nn.Linear(4, 6)),
    "normed_of_old": old_weight_norm,
    "normed_kernel": lambda: weight_norm(kernel()),
}
FLOATING = "expected a floating dtype of 16 bits or more: dequantize it first"
COMPUTED = "computes its weight from other parameters: remove the parametrization first"
UNFIT: list[tuple[Callable[[], nn.Module], str]] = [
    (UNSOUND["integers"], f"has a weight of torch.int8, {FLOATING}"),
    (lambda: of_dtype(torch.float8_e4m3fn), f"has a weight of torch.float8_e4m3fn, {FLOATING}"),
    (lambda: nn.LazyLinear(3), "has no shape yet: run one forward pass first"),
    (UNSOUND["normed"], COMPUTED),
    (old_weight_norm, COMPUTED),
    (lambda: linear_with(None), COMPUTED),
]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize(("make", "reason"), UNFIT)
def test_all_skips_with_the_reason_what_all_linear_and_names_refuse(make: Any, reason: str) -> None:
    model = nn.ModuleDict({"up": nn.Linear(4, 6), "unfit": make()})
    report = plan(model, targets="all")
    assert report.targets == ("up",)
    assert report.skipped["unfit"] == reason
    for targets in ("all-linear", ["unfit"]):
        with untouched(model), pytest.raises(TargetError, match=f"unfit {reason}"):
            randlora.inject(model, r=1, targets=targets)
    with pytest.raises(TargetError, match=rf"no layer is left to adapt; .*; skipped: unfit \({reason[:20]}"):
        plan(nn.ModuleDict({"unfit": make()}), targets="all")


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("rule", [None, "all-linear", "all"])
def test_a_rule_skips_a_layer_without_entries_and_names_refuse_it(rule: str | None) -> None:
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "out": nn.Linear(8, 0), "into": nn.Linear(0, 8)})
    report = randlora.plan(model, r=4, targets=rule)
    assert (report.targets, report.skipped) == (("body",), {"out": "has no entries", "into": "has no entries"})
    with untouched(model), pytest.raises(TargetError, match=r"out \(Linear\) has no entries: exclude it"):
        randlora.inject(model, r=4, targets=["body", "out"])


@pytest.mark.parametrize("how", ["parameter", "storage", "on meta"])
def test_a_weight_tied_to_another_is_skipped_by_all_and_refused_by_name_and_a_tied_bias_is_neither(how: str) -> None:
    with torch.device("meta" if how == "on meta" else "cpu"):
        model = nn.ModuleDict({"kernel": kernel(), "up": nn.Linear(4, 6), "head": nn.Linear(4, 6)})
        model["a"], model["b"] = nn.Linear(6, 4), nn.Linear(6, 4)
    weight = model.get_parameter("kernel.weight")
    model["head"].weight = nn.Parameter(weight.detach()) if how == "storage" else weight
    model["a"].bias = model["b"].bias
    report = plan(model, targets="all")
    assert report.targets == ("up", "a", "b")
    assert report.skipped == {"head": HEAD, "kernel": "tied to head.weight"}
    tied = r"the weight of kernel is tied to head\.weight: untie it, or exclude the layer"
    with untouched(model), pytest.raises(TargetError, match=tied):
        randlora.inject(model, r=2, targets=["kernel"])
    model["b"].weight, model["c"] = model["a"].weight, UNSOUND["normed"]()
    three = r"3 problems:\n.* c computes its weight.*\n.*weight of a is tied to b.weight.*\n.*b is tied to a.weight"
    with untouched(model), pytest.raises(TargetError, match=three):
        randlora.inject(model, r=1, targets=[*"abc"])


def test_where_the_default_finds_nothing_the_error_says_what_there_is() -> None:
    told = r"no layer is left to adapt; .*; skipped: head \(the output head\); left out: 1 convolution, .* of the "
    told += r'weights: targets="all" adapts it; no adapter layer for 2 parameters of Odd'
    with pytest.raises(TargetError, match=told):
        plan(nn.ModuleDict({"kernel": kernel(), "odd": Odd(), "head": nn.Linear(6, 3)}))
    with pytest.raises(TypeError, match="Misnamed has kind='conv': expected one of linear, attention, convolution"):
        randlora.layers.register_layer(Odd)(type("Misnamed", (LinearAdapter,), {"kind": "conv"}))


OF_NO_KIND: list[tuple[Any, str]] = [
    (["odd.table"], rf"odd\.table is a parameter of Odd with shape \(3, 5\), {NO_LAYER}: narrow the pattern, "),
    (["up", "stack"], rf"odd\.stack is a parameter of Odd with shape \(2, 3, 4\), {NO_LAYER}"),
    (r"experts\..*", rf"experts\.router is a parameter of Experts .*, {NO_LAYER}"),
    (["odd"], rf"odd is of type Odd, {NO_LAYER}: .* or register one with randlora\.layers\.register_layer"),
    (r"odd.*", r"^cannot find the targets: odd is of type Odd, .*$"),  # which stands for its parameters
    ("table", rf"table. matches .*, only odd\.table \(a parameter of Odd .*, {NO_LAYER}\)"),
    (["scale"], rf"only odd\.scale \(a parameter of Odd with shape \(7,\), {NO_LAYER}\)"),
    (["up.weight"], r"only up\.weight \(a parameter of up, which is the name to give\)"),
]


@pytest.mark.parametrize(("targets", "message"), OF_NO_KIND)
def test_a_parameter_that_no_kind_serves_is_refused_by_name_and_type(targets: Any, message: str) -> None:
    model = mixed()
    with untouched(model), pytest.raises(TargetError, match=message):
        randlora.inject(model, r=2, targets=targets)


def test_a_default_that_adapts_only_a_head_warns_at_the_line_that_asked_and_nothing_else_does() -> None:
    with torch.device("meta"):
        resnet = library("torchvision").models.resnet18()
        beside_a_table = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(1000, 1000))
    for verb in (randlora.plan, randlora.inject):
        with pytest.warns(UserWarning, match="the default adapts only fc, 4.38% of the weights") as caught:
            report = verb(resnet, r=8)
        assert caught[0].filename == __file__
        assert report.warning in str(caught[0].message)
        assert all(str(group) in str(caught[0].message) for group in report.left_out)
        assert f"warning: {report.warning}" in on_one_line(report)
        assert sum(group.share for group in report.left_out) == pytest.approx(0.9553, abs=1e-3)
    with pytest.warns(UserWarning, match=r"the default adapts only 0, 1, 0\.00% of the weights: give"):
        randlora.plan(beside_a_table, r=2)
    model = nn.Sequential(kernel(), nn.Linear(6, 2))
    given = r'the default adapts only 1, .*: give targets="all"; left'
    with untouched(model), warnings.catch_warnings(action="error"), pytest.raises(UserWarning, match=given):
        randlora.inject(model, r=2)
    for options in ({"targets": "all-linear"}, {"targets": ["1"]}, {"exclude": ["0"]}):
        assert randlora.plan(model, **options).warning == ""
    for layers in ([nn.Linear(6, 2)], [nn.Linear(6, 2), nn.Tanh(), nn.LayerNorm(2)], [nn.Linear(6, 2), kernel()]):
        assert randlora.plan(nn.Sequential(*layers), r=2).warning == ""


# Every matrix, once

SOUND: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 6),
    "norm": lambda: nn.LayerNorm(4),
    "odd": Odd,
    "rare": type("Rare", (Odd,), {}),
    "kernel": kernel,
    "experts": Experts,
    "torchs_attention": lambda: nn.MultiheadAttention(4, 2),
    "recurrent": lambda: nn.GRU(4, 4),
    "nested": lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(kernel(), Odd())),
}


@st.composite
def models(draw: st.DrawFn, leaves: dict[str, Any]) -> nn.ModuleDict:
    model = of_type(draw(st.sampled_from([None, "bloom"])), first=nn.Linear(4, 4))
    for place, name in enumerate(draw(st.lists(st.sampled_from(sorted(leaves)), max_size=6))):
        model[f"{name}_{place}"] = leaves[name]()
    if draw(st.booleans()):
        model["head"] = leaves[draw(st.sampled_from(["linear", "odd", "kernel", "experts"]))]()
    kernels = [name for name in model if isinstance(model[name], nn.Conv1d) and "weight" in model[name]._parameters]
    if draw(st.booleans()):
        model["again"] = model[draw(st.sampled_from(sorted(model)))]
    if draw(st.booleans()) and kernels:
        model["tied"] = Odd()
        model["tied"].table = model[draw(st.sampled_from(kernels))].weight
    if model.__dict__["config"].model_type:
        model["query_key_value"] = nn.Linear(4, 12)
    return model


@given(models(SOUND), st.sampled_from(RULES), st.none() | st.sampled_from([["first"], ["odd_0", "first"], r".*_0"]))
def test_every_matrix_of_a_model_is_adapted_or_skipped_or_left_out_once_and_wider_rules_adapt_what_is_promised(
    model: nn.ModuleDict, rule: str | None, exclude: Any
) -> None:
    try:
        report = plan(model, targets=rule, exclude=exclude)
    except TargetError as error:  # nothing there to exclude, or nothing else to adapt, or tied by all-linear
        assert re.search("exclude=|no layer is left", str(error))  # noqa: PT017  # most models are fine
        return
    assert_every_matrix_is_told_of_once(model, report)
    for wider in ("all-linear", "all"):
        promised = [group for group in report.left_out if group.targets == wider]
        more = plan(model, targets=wider, exclude=exclude) if promised else report
        assert all(set(group.fqns) <= set(more.targets) for group in promised)


@given(models(SOUND | UNSOUND))
def test_all_skips_what_cannot_be_adapted_and_tells_of_it(model: nn.ModuleDict) -> None:
    report = plan(model, targets="all")
    assert_every_matrix_is_told_of_once(model, report)
    for group in report.left_out:
        assert group.kind is None
        assert f"parameter{'s' * (len(group.fqns) > 1)} of" in str(group)
    randlora.eject(fill(model) if randlora.inject(model, r=2, targets="all", stream="portable") else model)

"""What a rule selects, and that every matrix of a model is adapted, skipped or said to be left out, once."""

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora.errors import TargetError
from randlora.layers import registry
from randlora.targets.left_out import LeftOut, lines
from tests.kit import fill, on_one_line, untouched
from tests.left_out_models import (
    RULES,
    UNSOUND,
    Attention,
    Experts,
    Kernel,
    KernelAdapter,
    Odd,
    Rare,
    assert_every_matrix_is_told_of_once,
    groups,
    integers,
    mixed,
    old_weight_norm,
    quiet_plan,
    register,
)
from tests.transformers_zoo import TASKS, classes, tiny


@pytest.fixture(autouse=True, scope="module")
def _kinds() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        yield


def is_up(fqn: str, module: nn.Module) -> bool:
    return fqn == "up"


def test_all_linear_is_linear_layers_and_attention_and_all_is_every_kind() -> None:
    report = quiet_plan(mixed(), targets="all-linear")
    assert report.targets == quiet_plan(mixed()).targets == ("attention.in_proj", "up")
    assert report.skipped == {"head.1": "the output head", "head.0": "the output head"}
    report = quiet_plan(mixed(), targets="all")
    assert report.targets == ("attention.in_proj", "up", "kernel", "experts.up_proj", "experts.down_proj")
    assert report.skipped == {"head.1": "the output head", "head.0": "the output head"}
    assert report.rule == "all layers and weights that can be adapted but the output head"


def test_a_report_has_a_row_for_each_kind_and_shape() -> None:
    model = nn.ModuleDict({"kernel": Kernel(), "up": nn.Linear(4, 6), "more": nn.Linear(4, 6), "experts": Experts()})
    report = quiet_plan(model, targets="all")
    assert [(row.kind, row.count, row.in_features, row.out_features) for row in report.rows] == [
        ("convolution", 1, 4, 6),
        ("linear", 2, 4, 6),
        ("experts", 1, 6, 8),
        ("experts", 1, 8, 6),
    ]
    assert str(report).splitlines()[3:5] == [
        "       kind  count  in  out  r  num_bases  rank  trainable",
        "convolution      1   4    6  2          2     4         12",
    ]
    assert "kind" not in str(quiet_plan(model, targets=["up"]))


def test_a_report_says_what_is_left_out_and_how_much_of_the_model_that_is() -> None:
    report = quiet_plan(mixed(), targets="all-linear")
    total = sum(parameter.numel() for parameter in mixed().parameters())
    adds = 'targets="all" adapts them and trains 48 more parameters'
    register = "register one with randlora.layers.register_layer"
    lines = [
        "left out: head.1, head.0 (the output head)",
        f'left out: 1 convolution, {24 / total:.2%} of the weights: targets="all" adapts it',
        f"left out: 2 expert tensors, {96 / total:.2%} of the weights: {adds}",
        f"no adapter layer for 2 parameters of Odd, {39 / total:.2%} of the weights: {register}",
        f"no adapter layer for 1 parameter of Experts, {24 / total:.2%} of the weights: {register}",
    ]
    assert " ".join(lines) in on_one_line(report)
    experts = groups(report)["experts"]
    assert experts == LeftOut(
        "experts", None, ("experts.up_proj", "experts.down_proj"), 96, 96 / total, 48, "all", None
    )
    only = quiet_plan(mixed(), targets=["experts.up_proj", "experts.down_proj"])
    assert only.trainable_parameters == experts.trainable


class Stacked(KernelAdapter):
    """Three matrices of one weight, each with its own Λ and Γ."""

    @classmethod
    def shape_of(cls, owner: nn.Module, config: randlora.RandLoRAConfig) -> Any:
        return 3 if config.experts == "each" else 1, *owner.get_parameter("weight").shape


def test_of_a_stack_of_matrices_every_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_layers", dict(registry._layers))
    randlora.layers.register_layer(Kernel)(Stacked)
    model = nn.Sequential(nn.Linear(4, 4), Kernel())
    for options, matrices in (({}, 3), ({"experts": "shared"}, 1)):
        [group] = quiet_plan(model, targets="all-linear", **options).left_out
        assert group.trainable == matrices * 2 * (2 + 4)
        linear, stack = quiet_plan(model, targets="all", **options).rows
        assert (linear.kind, stack.kind, stack.count) == ("linear", "convolution", matrices)
        assert stack.trainable == group.trainable


def test_a_preset_adapts_what_it_names_in_a_head_too() -> None:
    model = nn.ModuleDict({"head": nn.ModuleDict({"query_key_value": nn.Linear(4, 12), "up": nn.Linear(4, 8)})})
    model.__dict__["config"] = SimpleNamespace(model_type="bloom")
    report = quiet_plan(model)
    assert (report.targets, report.skipped) == (("head.query_key_value",), {"head.up": "the output head"})


def test_a_preset_leaves_out_other_linear_layers_and_the_head() -> None:
    model = nn.ModuleDict({"query_key_value": nn.Linear(4, 12), "up": nn.Linear(4, 8), "lm_head": nn.Linear(4, 5)})
    model.__dict__["config"] = SimpleNamespace(model_type="bloom")
    report = quiet_plan(model)
    assert report.skipped == {"lm_head": "the output head"}
    assert [(group.kind, group.fqns, group.targets) for group in report.left_out] == [("linear", ("up",), "all-linear")]


@pytest.mark.parametrize("targets", [["up"], "up", is_up, ["kernel", "up"]], ids=["list", "regex", "callable", "two"])
def test_of_targets_that_the_user_described_nothing_is_told(targets: Any) -> None:
    report = quiet_plan(mixed(), targets=targets)
    assert (report.left_out, report.warning) == ((), "")


def test_what_the_user_excluded_is_told_as_such() -> None:
    report = quiet_plan(mixed(), targets="all-linear", exclude=["up", "experts"])
    reasons = {group.fqns: group.reason for group in report.left_out}
    assert reasons["up",] == reasons["experts.up_proj", "experts.down_proj"] == reasons["experts.router",] == "excluded"
    assert reasons["kernel",] is None
    assert "of the weights (excluded)" in str(report)


def test_what_is_trained_with_the_adapter_is_not_left_out() -> None:
    report = quiet_plan(mixed(), targets="all-linear", train_also=["odd.table", "kernel", "head.0", "head.1.bias"])
    assert groups(report)["Odd"].fqns == ("odd.stack",)
    assert "convolution" not in groups(report)
    assert report.skipped == {"head.1": "the output head"}


def test_of_many_types_without_an_adapter_layer_three_are_named_and_the_rest_counted() -> None:
    types = [type(f"Odd{index}", (Odd,), {}) for index in range(9)]
    model = nn.Sequential(nn.Linear(4, 4), *(kind() for kind in types))
    told = [line for line in str(quiet_plan(model, targets="all")).splitlines() if "no adapter layer" in line]
    assert len(told) == 4
    assert told[-1].startswith("no adapter layer for 12 parameters of Odd3, Odd4, Odd5, Odd6 and 2 more, ")


def test_a_weight_tied_to_the_head_is_skipped_by_all_and_an_error_if_named() -> None:
    model = nn.ModuleDict({"kernel": Kernel(), "up": nn.Linear(4, 6), "head": nn.Linear(4, 6)})
    model["head"].weight = model["kernel"].weight
    report = quiet_plan(model, targets="all")
    assert report.targets == ("up",)
    assert report.skipped == {"head": "the output head", "kernel": "tied to head.weight"}
    with untouched(model), pytest.raises(TargetError, match=r"the weight of kernel is tied to head\.weight"):
        randlora.inject(model, r=2, targets=["kernel"])


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (integers, "has a weight of torch.int8"),
        (lambda: nn.LazyLinear(3), "has no shape yet"),
        (UNSOUND["normed"], "computes its weight from other parameters"),
        (old_weight_norm, "computes its weight from other parameters"),
    ],
    ids=["integers", "lazy", "parametrized", "weight-norm"],
)
def test_all_skips_with_the_reason_what_all_linear_refuses(make: Any, reason: str) -> None:
    model = nn.ModuleDict({"up": nn.Linear(4, 6), "unfit": make()})
    report = quiet_plan(model, targets="all")
    assert report.targets == ("up",)
    assert report.skipped["unfit"].startswith(reason)
    with pytest.raises(TargetError, match=f"unfit {reason}"):
        quiet_plan(model, targets="all-linear")
    with pytest.raises(TargetError, match=rf"no layer is left to adapt; .*; skipped: unfit \({reason}"):
        quiet_plan(nn.ModuleDict({"unfit": make()}), targets="all")


def test_where_the_default_finds_nothing_the_error_says_what_there_is() -> None:
    model = nn.ModuleDict({"kernel": Kernel(), "odd": Odd(), "head": nn.Linear(6, 3)})
    with pytest.raises(TargetError, match="no layer is left to adapt") as caught:
        quiet_plan(model)
    told = str(caught.value).split("; ")
    assert "skipped: head (the output head)" in told
    assert any(
        re.fullmatch(r'left out: 1 convolution, .* of the weights: targets="all" adapts it', part) for part in told
    )
    assert any(part.startswith("no adapter layer for 2 parameters of Odd") for part in told)


def test_a_kind_that_there_is_not_cannot_be_registered() -> None:
    class Misnamed(KernelAdapter):
        kind = "conv"

    with pytest.raises(TypeError, match="Misnamed has kind='conv': expected one of linear, attention, convolution"):
        randlora.layers.register_layer(Kernel)(Misnamed)


def test_the_card_of_a_saved_adapter_says_what_is_left_out(tmp_path: Any) -> None:
    model = mixed()
    report = randlora.inject(model, r=2, targets="all-linear", train_also=["odd"])
    randlora.save(fill(model), tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert all(str(group).removeprefix("left out: ") in card for group in report.left_out)
    assert "| left out | head.1, head.0 (the output head); 1 convolution, " in card
    randlora.remove(model, "default")
    randlora.inject(model, r=2, targets=["up"])
    randlora.save(fill(model), tmp_path / "named")
    assert "left out" not in (tmp_path / "named" / "README.md").read_text(encoding="utf-8")


# Defaults that adapt next to nothing


def test_a_default_that_adapts_only_a_head_warns_at_the_line_that_asked() -> None:
    model = torchvision.models.resnet18()
    for verb in (randlora.plan, randlora.inject):
        with pytest.warns(UserWarning, match="the default adapts only fc, 4.38% of the weights") as caught:
            report = verb(model, r=8)
        assert caught[0].filename == __file__
        assert report.warning in str(caught[0].message)
        assert all(str(group) in str(caught[0].message) for group in report.left_out)
        assert f"warning: {report.warning}" in on_one_line(report)
        assert sum(group.share for group in report.left_out) == pytest.approx(0.9553, abs=1e-3)
        assert sum(len(group.fqns) for group in report.left_out) == 20
    assert_every_matrix_is_told_of_once(torchvision.models.resnet18(), report)


def test_a_warning_that_is_an_error_changes_nothing() -> None:
    model = nn.Sequential(Kernel(), nn.Linear(6, 2))
    with untouched(model), pytest.raises(UserWarning, match=r'the default adapts only 1, .*: give targets="all"; left'):
        randlora.inject(model, r=2)


def test_a_default_of_less_than_a_ten_thousandth_warns() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(1000, 1000))
    with pytest.warns(UserWarning, match=r"the default adapts only 0, 1, 0\.00% of the weights: give"):
        randlora.plan(model, r=2)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (nn.Sequential(Kernel(), nn.Linear(6, 2)), {"targets": "all-linear"}),
        (nn.Sequential(Kernel(), nn.Linear(6, 2)), {"targets": ["1"]}),
        (nn.Sequential(nn.Linear(6, 2)), {}),
        (nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.LayerNorm(2)), {}),
        (nn.Sequential(Kernel(), nn.Linear(6, 2)), {"exclude": ["0"]}),
        (nn.Sequential(nn.Linear(6, 2), Kernel()), {}),
    ],
    ids=["all-linear", "named", "alone", "no-matrix-beside", "excluded", "not-the-last"],
)
def test_what_was_asked_for_and_defaults_that_adapt_the_body_do_not_warn(
    model: nn.Module, options: dict[str, Any]
) -> None:
    assert randlora.plan(model, r=2, **options).warning == ""  # warnings are errors here


SOUND: dict[str, Any] = {
    "linear": lambda: nn.Linear(4, 6),
    "norm": lambda: nn.LayerNorm(4),
    "odd": Odd,
    "rare": Rare,
    "kernel": Kernel,
    "experts": Experts,
    "attention": Attention,
    "torchs_attention": lambda: nn.MultiheadAttention(4, 2),
    "recurrent": lambda: nn.GRU(4, 4),
    "nested": lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(Kernel(), Odd())),
}


@st.composite
def models(draw: st.DrawFn, leaves: dict[str, Any]) -> nn.ModuleDict:
    """Models of some of these modules, of which some are in two places, tied to another, or the head."""
    model = nn.ModuleDict({"first": nn.Linear(4, 4)})
    for place, name in enumerate(draw(st.lists(st.sampled_from(sorted(leaves)), max_size=6))):
        model[f"{name}_{place}"] = leaves[name]()
    if draw(st.booleans()):
        model["head"] = draw(st.sampled_from([lambda: nn.Linear(4, 5), Odd, Kernel, Experts]))()
    names = sorted(model)
    if draw(st.booleans()):
        model["again"] = model[draw(st.sampled_from(names))]
    if draw(st.booleans()):
        model["tied"] = Odd()
        kernels = [name for name in names if isinstance(model[name], Kernel) and "weight" in model[name]._parameters]
        model["tied"].table = model[draw(st.sampled_from(kernels))].weight if kernels else model["tied"].table
    model.__dict__["config"] = SimpleNamespace(model_type=draw(st.sampled_from([None, "bloom"])))
    if model.__dict__["config"].model_type:
        model["query_key_value"] = nn.Linear(4, 12)
    return model


@given(models(SOUND), st.sampled_from(RULES), st.none() | st.sampled_from([["first"], ["odd_0", "first"], r".*_0"]))
def test_every_matrix_of_a_model_is_adapted_or_skipped_or_left_out_once(
    model: nn.ModuleDict, rule: str | None, exclude: Any
) -> None:
    try:
        report = quiet_plan(model, targets=rule, exclude=exclude)
    except TargetError as error:  # nothing there to exclude, or nothing else to adapt, or tied by all-linear
        assert re.search("exclude=|no layer is left", str(error))  # noqa: PT017  # most models are fine
        return
    assert_every_matrix_is_told_of_once(model, report)


@given(models(SOUND | UNSOUND))
def test_all_skips_what_cannot_be_adapted_and_tells_of_it(model: nn.ModuleDict) -> None:
    report = quiet_plan(model, targets="all")
    assert_every_matrix_is_told_of_once(model, report)
    assert not [group for group in report.left_out if group.kind is not None]
    for group in report.left_out:
        assert f"parameter{'s' * (len(group.fqns) > 1)} of" in str(group)
    randlora.inject(model, r=2, targets="all", stream="portable")
    randlora.eject(model)


@given(models(SOUND), st.sampled_from(RULES[:2]))
def test_targets_all_adapts_what_a_report_says_that_it_adapts(model: nn.ModuleDict, rule: str | None) -> None:
    report = quiet_plan(model, targets=rule)
    for wider in ("all-linear", "all"):
        more = quiet_plan(model, targets=wider)
        promised = [group for group in report.left_out if group.targets == wider]
        for group in promised:
            assert set(group.fqns) <= set(more.targets)
        if promised and wider == "all":
            added = sum(group.trainable for group in report.left_out)
            assert more.trainable_parameters == report.trainable_parameters + added


# Real models


def tiny_mixtral() -> transformers.MixtralForCausalLM:
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    return transformers.MixtralForCausalLM(config)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_of_a_mixtral_every_matrix_is_told_of(rule: str | None) -> None:
    model = tiny_mixtral()
    report = quiet_plan(model, targets=rule)
    assert_every_matrix_is_told_of_once(model, report)
    assert report.skipped["lm_head"] == "the output head"
    experts = [fqn for fqn, _ in model.named_parameters() if ".experts." in fqn]
    assert len(experts) == 4
    if rule == "all":
        assert set(experts) <= set(report.targets)
        return
    group = groups(report)["experts"]
    assert group.fqns == tuple(experts)
    assert 0.5 < group.share < 1
    more = f'targets="all" adapts them and trains {group.trainable:,} more'
    assert f"{group.share:.2%} of the weights: {more}" in on_one_line(report)
    only = quiet_plan(model, targets=["gate_up_proj", "down_proj"])
    assert (only.targets, only.trainable_parameters) == (group.fqns, group.trainable)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_of_torchs_encoder_every_matrix_is_told_of(rule: str | None) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 3)
    assert_every_matrix_is_told_of_once(model, quiet_plan(model, targets=rule))


def lacks_targets(model: nn.Module, rule: str | None) -> bool:
    try:
        quiet_plan(model, targets=rule)
    except TargetError as error:
        return re.search("no layer is left|is tied to", str(error)) is not None
    return False


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_of_every_class_of_transformers_every_matrix_is_told_of_in_a_few_lines(task: str) -> None:
    seen = 0
    for of_task, model_type, name in classes():
        model = tiny(model_type, name) if of_task == task else None
        if model is None:
            continue
        for rule in (rule for rule in RULES if not lacks_targets(model, rule)):
            report = quiet_plan(model, targets=rule)
            assert_every_matrix_is_told_of_once(model, report)
            assert len(lines(report.left_out)) <= 8, name
            seen += 1
    assert seen > 20

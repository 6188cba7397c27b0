"""What "all" and "all-linear" select, what reports say that they leave out, and defaults that warn."""

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import randlora
from randlora.errors import TargetError
from randlora.layers import registry
from randlora.targets.left_out import LeftOut
from tests.kit import fill, on_one_line, untouched
from tests.left_out_models import (
    UNSOUND,
    Experts,
    Kernel,
    KernelAdapter,
    Odd,
    assert_every_matrix_is_told_of_once,
    groups,
    integers,
    mixed,
    old_weight_norm,
    quiet_plan,
    register,
)


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

"""Every matrix of a model is adapted, skipped or left out, once, and the shares add up."""

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora.errors import TargetError
from randlora.targets.left_out import lines
from tests.kit import on_one_line
from tests.left_out_models import (
    RULES,
    UNSOUND,
    Attention,
    Experts,
    Kernel,
    Odd,
    Rare,
    assert_every_matrix_is_told_of_once,
    groups,
    quiet_plan,
    register,
)
from tests.transformers_zoo import TASKS, classes, tiny


@pytest.fixture(autouse=True, scope="module")
def _kinds() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        yield


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

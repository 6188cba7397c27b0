"""Names of modules as targets, what is excluded before it is refused, and answers to names that mean nothing."""

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from randlora.errors import ConfigError, TargetError
from randlora.targets.select import find_targets, select
from randlora.targets.walk import Census
from tests.walk_models import LINEAR, Model, found


def suffixes(fqn: str) -> list[str]:
    parts = fqn.split(".")
    return [".".join(parts[start:]) for start in range(len(parts)) if fqn]


def nothing(fqn: str, module: nn.Module) -> bool:
    return False


# Names of modules


class Attention(nn.Module):
    """Two layers under timm's names, and a matrix that is no weight, as Swin has."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.proj = nn.Linear(4, 4)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))


def vision_transformer() -> nn.Module:
    """Build what has timm's names: but the projection of patches is of a type without an adapter layer."""
    blocks = nn.ModuleList(nn.ModuleDict({"attn": Attention(), "norm": nn.LayerNorm(4)}) for _ in range(2))
    return nn.ModuleDict({"patch_embed": nn.ModuleDict({"proj": nn.Bilinear(3, 4, 2)}), "blocks": blocks})


IN_BLOCKS = [f"blocks.{index}.attn.{name}" for index in (0, 1) for name in ("qkv", "proj")]


@pytest.mark.parametrize(
    ("targets", "exclude"),
    [
        (["qkv", "proj"], ["patch_embed.proj"]),
        (["qkv", "proj"], ["patch_embed"]),
        (["qkv", "proj"], r"patch_embed\..*"),
        (["qkv", "proj"], lambda _, module: isinstance(module, nn.Bilinear)),
        (r".*\.(qkv|proj)", ["patch_embed.proj"]),
        (lambda fqn, _: fqn.endswith(("qkv", "proj")), ["patch_embed.proj"]),
        (["patch_embed.proj", "qkv", "proj"], ["patch_embed"]),
    ],
    ids=["name", "module", "regex", "callable", "of-a-regex", "of-a-callable", "an-entry-of-its-own"],
)
def test_what_is_excluded_is_not_refused(targets: Any, exclude: Any) -> None:
    with pytest.raises(TargetError, match=r'Bilinear, for which .* exclude=\["patch_embed\.proj"\]'):
        find_targets(vision_transformer(), targets)
    assert found(vision_transformer(), targets, exclude) == IN_BLOCKS


def test_what_a_named_module_holds_beside_linear_layers_is_left_out_with_the_reason() -> None:
    model = nn.ModuleDict({"body": vision_transformer(), "attention": nn.MultiheadAttention(4, 2)})
    selection = select(Census.of(model), ["body"], None)
    assert [site.fqn for site in selection.sites] == [f"body.{fqn}" for fqn in IN_BLOCKS]
    assert selection.skipped == {"body.patch_embed.proj": "of type Bilinear, for which there is no adapter layer"}
    assert select(Census.of(model), ["body"], ["patch_embed"]).skipped == {}


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        (
            "stem",
            nn.Sequential(nn.Bilinear(2, 2, 1)),
            "targets='stem' matches no layer or weight that can be adapted, only stem (Sequential)",
        ),
        (
            "norms",
            nn.Sequential(nn.LayerNorm(2)),
            "targets='norms' matches no layer or weight that can be adapted, only norms (Sequential)",
        ),
    ],
    ids=["bilinear", "norms"],
)
def test_a_named_module_without_layers_to_adapt_is_refused(name: str, module: nn.Module, message: str) -> None:
    model = nn.ModuleDict({"up": nn.Linear(2, 2), name: module})
    with pytest.raises(TargetError, match=re.escape(message)):
        find_targets(model, ["up", name])


def test_a_layer_that_cannot_be_adapted_is_refused_by_its_name_and_left_out_of_its_module() -> None:
    model = nn.ModuleDict({"body": nn.ModuleDict({"mix": nn.Bilinear(2, 2, 1), "up": nn.Linear(2, 2)})})
    assert found(model, ["body"]) == ["body.up"]
    with pytest.raises(TargetError, match=r"body\.mix is of type Bilinear"):
        find_targets(model, ["body", "mix"])


def test_the_names_of_a_preset_are_those_of_layers() -> None:
    model = nn.ModuleDict({"q": nn.ModuleDict({"inner": nn.Linear(2, 2)}), "v": nn.Linear(2, 2)})
    model.__dict__["config"] = SimpleNamespace(model_type="t5")  # q, v
    assert found(model) == ["v"]
    assert found(model, ["q", "v"]) == ["q.inner", "v"]


NAMES = sorted({name for fqn, _ in Model().named_modules() for name in suffixes(fqn)})
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


# Answers


@pytest.mark.parametrize(
    ("targets", "meant"),
    [
        ("q_proj", '["q_proj"]'),
        ("attention.q_proj", '["attention.q_proj"]'),
        ("q_proj|v_proj", '["q_proj", "v_proj"]'),
        ("(q_proj|v_proj)", '["q_proj", "v_proj"]'),
        ("q_proj, v_proj", '["q_proj", "v_proj"]'),
        (["q_proj,v_proj"], '["q_proj", "v_proj"]'),
        ("attention", '["attention"]'),
        (r"layers\.0", '["layers.0"]'),
        ([r".*\.q_proj"], r'r".*\.q_proj"'),
        *[(word, '"all-linear"') for word in ("all_linear", "all linear", "alllinear", "ALL-LINEAR", "All_Linear")],
        (["all-linear"], '"all-linear"'),
        (["all_linear", "up"], '"all-linear"'),
    ],
    ids=str,
)
def test_what_was_probably_meant_is_suggested(targets: Any, meant: str) -> None:
    with pytest.raises(TargetError, match=re.escape(f"did you mean targets={meant}?")):
        find_targets(Model(), targets)


@pytest.mark.parametrize("exclude", ["proj", "norm", r"layers\.0", "attention.proj|up"])
def test_what_was_probably_meant_to_be_excluded_is_suggested(exclude: str) -> None:
    meant = '", "'.join(exclude.replace("\\", "").split("|"))
    with pytest.raises(TargetError, match=re.escape(f'did you mean exclude=["{meant}"]?')):
        find_targets(Model(), None, exclude)


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


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.Bilinear(1, 1, 1), nn.Tanh()),
            "; the model has no layer or weight that can be adapted, only Bilinear, Tanh",
        ),
        (nn.Sequential(), "; the model has no submodules"),
    ],
    ids=["other-modules", "nothing"],
)
@pytest.mark.parametrize(
    "targets", ["q", ["q"], "all-linear", nothing], ids=["regex", "name", "all-linear", "callable"]
)
def test_of_a_model_without_linear_layers_it_is_told_what_it_has(model: nn.Module, message: str, targets: Any) -> None:
    with pytest.raises(TargetError, match=re.escape(message)):
        find_targets(model, targets)


def test_of_many_refused_modules_five_are_named_and_the_rest_counted() -> None:
    model = nn.Sequential(*(nn.Bilinear(1, 1, 1) for _ in range(560)))
    with pytest.raises(TargetError, match="560 problems") as caught:
        find_targets(model, ".*")
    assert len(str(caught.value).splitlines()) == 7
    assert str(caught.value).endswith("and 555 more")


def test_what_was_meant_is_guessed_for_the_names_that_are_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    guessed = []

    def suggestion(_: str, entry: str, *args: Any, **options: Any) -> str:
        guessed.append(entry)
        return "a guess"

    monkeypatch.setattr("randlora.targets.left_out.suggestion", suggestion)
    names = [f"unheard-of.{index}" for index in range(560)]
    with pytest.raises(TargetError, match="560 problems") as caught:
        find_targets(Model(), names)
    assert guessed == names[:5]
    assert str(caught.value).count("a guess") == 5


def test_mistakes_in_targets_and_in_exclude_are_named_at_once() -> None:
    with pytest.raises(TargetError, match="2 problems") as caught:
        find_targets(Model(), ["q_prj"], ["v_prj"])
    assert "targets='q_prj'" in str(caught.value)
    assert "exclude='v_prj'" in str(caught.value)

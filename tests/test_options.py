"""r and alpha by pattern: which targets a pattern is for, and what is said of those that fit none."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import randlora
from randlora import RandLoRAConfig
from randlora.errors import TargetError
from randlora.options import LayerOptions
from randlora.targets.options import listed, options_listed, ranks_of_others, resolve
from tests import models

TARGETS = ("layers.0.attn.q_proj", "layers.0.mlp.up_proj", "layers.1.attn.q_proj", "layers.1.attn.in_proj_weight")


def ranks(r: Any, fqns: Any = TARGETS) -> list[int]:
    """Return the rank of each target."""
    found, problems = resolve(RandLoRAConfig(r=r), fqns)
    assert problems == []
    return [found[fqn].r for fqn in fqns]


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("q_proj", [1, 0, 1, 0]),
        ("layers.0.attn.q_proj", [1, 0, 0, 0]),
        ("attn.q_proj", [1, 0, 1, 0]),
        ("attn", [1, 0, 1, 1]),
        ("layers.1", [0, 0, 1, 1]),
        ("1", [0, 0, 1, 1]),
        ("layers.1.attn.in_proj_weight", [0, 0, 0, 1]),
        (r"layers\.\d\.attn\..*", [1, 0, 1, 1]),
        (r".*_proj", [1, 1, 1, 0]),
        (r".*", [1, 1, 1, 1]),
        (r".*\.(q|up)_proj", [1, 1, 1, 0]),
    ],
    ids=str,
)
def test_a_pattern_is_a_name_a_suffix_a_module_or_else_a_regex_in_full(pattern: str, meant: list[int]) -> None:
    rest = {} if all(meant) else {".*": 7}
    assert ranks({pattern: 1, **rest}) == [1 if is_meant else 7 for is_meant in meant]


def test_a_name_of_a_target_is_no_regex() -> None:
    """As a regex, "a.0" matches "axa.0b" too, but not where it is the name of another target."""
    assert ranks({"a.0": 1, ".*": 2}, ["a.0", "a10", "b.a.0"]) == [1, 2, 1]
    assert ranks({"a.0": 1, ".*": 2}, ["a10", "b"]) == [1, 2]


def test_the_first_pattern_that_matches_applies() -> None:
    assert ranks({"layers.1": 4, "q_proj": 8, ".*": 16}) == [8, 16, 4, 4]
    assert ranks({"q_proj": 8, "layers.1": 4, ".*": 16}) == [8, 16, 8, 4]


def test_a_pattern_for_all_others_may_find_none_left() -> None:
    assert ranks({"q_proj": 8, "attn": 4, "mlp|.*mlp.*": 2, ".*": 16}) == [8, 2, 8, 4]
    assert ranks({".*": 4, "q_proj": 4}) == [4, 4, 4, 4]


def test_alpha_has_patterns_of_its_own_and_is_20_r_of_each_layer_without() -> None:
    r = {"attn": 4, ".*": 16}
    both, _ = resolve(RandLoRAConfig(r=r, alpha={"layers.0": 2, ".*": 3.5}), TARGETS)
    assert [*both.values()] == [(4, 2.0), (16, 2.0), (4, 3.5), (4, 3.5)]
    assert [own.scaling for own in both.values()] == [0.5, 0.125, 0.875, 0.875]
    default, _ = resolve(RandLoRAConfig(r=r), TARGETS)
    assert [*default.values()] == [(4, 80.0), (16, 320.0), (4, 80.0), (4, 80.0)]


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no-pattern": (
        {"r": {"q_proj": 4}},
        ["r= has no pattern for model.layers.0.self_attn.k_proj, ", " and 8 more: add '.*' as the last"],
    ),
    "misspelled": ({"r": {"q_prj": 4, ".*": 8}}, ["r={'q_prj': …} matches no target; the nearest names are q_proj"]),
    "module": (
        {"alpha": {"layers.0.mpl": 4, ".*": 8}},
        ["alpha={'layers.0.mpl': …} matches no target; the nearest names are model.layers.0.mlp"],
    ),
    "no-target": ({"r": {"lm_head": 4, ".*": 8}}, ["r={'lm_head': …} matches no target"]),
    "part-of-a-name": ({"r": {"proj": 4, ".*": 8}}, ["r={'proj': …} matches no target; the nearest names are"]),
    "no-regex": ({"r": {"q_proj(": 4, ".*": 8}}, ["r={'q_proj(': …} is no name", "no regular expression: missing )"]),
    "shadowed": ({"r": {".*": 4, "q_proj": 8}}, ["r={'q_proj': …} matches only what '.*' took", "put it before '.*'"]),
    "shadowed-alpha": (
        {"alpha": {"mlp": 4, ".*": 8, "self_attn": 2}},
        ["alpha={'self_attn': …}", "put it before '.*'"],
    ),
    "both": ({"r": {"x": 4, ".*": 8}, "alpha": {"q_proj": 1}}, ["2 problems", "r={'x': …}", "alpha= has no pattern"]),
}


@pytest.mark.parametrize(("options", "said"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("verb", [randlora.plan, randlora.inject])
def test_what_fits_nothing_is_named_before_the_model_changes(verb: Any, options: Any, said: list[str]) -> None:
    model = models.llama()
    with pytest.raises(TargetError) as refused:
        verb(model, targets="all-linear", **options)
    for words in said:
        assert words in str(refused.value)
    assert randlora.adapters(model) == []


parts = st.sampled_from(["a", "b", "0", "a.b"])
fqns = st.lists(st.lists(parts, min_size=1, max_size=3).map(".".join), min_size=1, max_size=6, unique=True)


@given(fqns, st.data())
def test_options_listed_by_fqn_are_those_of_each_target_in_whichever_way_they_are_read(
    names: list[str], data: st.DataObject
) -> None:
    """A target's name may be a suffix of another's, or that of a module that another is inside."""
    draw = st.builds(LayerOptions, st.sampled_from([2, 4]), st.sampled_from([1.0, 2.5]))
    options = {fqn: data.draw(draw) for fqn in names}
    config = listed(RandLoRAConfig(r={".*": 1}, alpha={".*": 1}), options)
    assert options_listed(config, names) == options
    assert resolve(config, names) == (options, [])


def test_weights_that_are_left_out_would_have_the_r_of_their_pattern_or_of_the_last() -> None:
    config = RandLoRAConfig(r={"attn": 4, "mlp": 8})
    assert ranks_of_others(config, ["0.attn.q", "head"]) == {"0.attn.q": 4, "head": 8}
    assert ranks_of_others(RandLoRAConfig(r=2), ["head"]) == {"head": 2}


def test_one_value_for_all_is_listed_as_a_number() -> None:
    config = RandLoRAConfig(r={"a": 4, ".*": 4}, alpha={"a": 2, ".*": 2})
    single = listed(config, {"a": LayerOptions(4, 2.0), "b": LayerOptions(4, 2.0)})
    assert (single.r, single.alpha) == (4, 2.0)

"""Patterns over names: a regex matches the whole, a list whole components from the end, a callable what it likes."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from randlora.targets.match import (
    as_list,
    has_suffix,
    is_regex_of,
    matches,
    matches_name,
    nearest_names,
    suggestion,
    unmatched,
)

LAYER = nn.Linear(1, 1)
components = st.lists(st.sampled_from(["q", "proj", "q_proj", "0", "10", "q+"]), min_size=1, max_size=4)


@given(components, components)
def test_a_suffix_is_the_last_whole_components(fqn: list[str], suffix: list[str]) -> None:
    assert has_suffix(".".join(fqn), ".".join(suffix)) == (fqn[-len(suffix) :] == suffix)


@pytest.mark.parametrize(
    ("fqn", "suffix", "expected"),
    [
        ("a.q_proj", "q_proj", True),
        ("a.q_proj", "a.q_proj", True),
        ("q_proj", "q_proj", True),
        ("a.q_proj", "proj", False),
        ("a.q_proj", "_proj", False),
        ("a.q_proj", ".q_proj", False),
        ("ba.q_proj", "a.q_proj", False),
        ("a.q_proj", "a", False),
        ("a.q_proj.b", "q_proj", False),
        ("a.10", "0", False),
        ("a.q_proj", ".*", False),
        ("q_proj", "a.q_proj", False),
    ],
)
def test_a_list_entry_is_no_substring_and_no_regex(fqn: str, suffix: str, expected: bool) -> None:
    assert matches_name([suffix], fqn) is expected
    assert matches_name((suffix, "something.else"), fqn) is expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.b.q_proj", True),
        (".*", True),
        (r".*\.(q|v)_proj", True),
        ("q_proj", False),
        ("a", False),
        (r"a\.b", False),
        (".*b", False),
        ("a.b.q_proj|x", True),
        ("x|a.b", False),
        ("", False),
    ],
)
def test_a_regex_must_match_the_whole_name(pattern: str, expected: bool) -> None:
    assert matches_name(pattern, "a.b.q_proj") is expected
    assert matches(pattern, "a.b.q_proj", LAYER) is expected


@given(components.map(".".join), components.map(".".join))
def test_an_escaped_name_is_the_regex_of_itself_alone(name: str, other: str) -> None:
    assert matches(re.escape(name), other, LAYER) == (name == other)


def test_a_callable_is_given_the_name_and_the_module() -> None:
    seen = []

    def pattern(fqn: str, module: nn.Module) -> bool:
        seen.append((fqn, module))
        return isinstance(module, nn.Linear)

    assert matches(pattern, "a.b", LAYER) is True
    assert matches(pattern, "a.c", nn.Tanh()) is False
    assert seen[0] == ("a.b", LAYER)
    assert [fqn for fqn, _ in seen] == ["a.b", "a.c"]


@pytest.mark.parametrize(("answer", "expected"), [(1, True), (0, False), (None, False), ("yes", True)], ids=repr)
def test_a_callables_answer_is_taken_as_a_truth_value(answer: object, expected: bool) -> None:
    assert matches(lambda *_: answer, "a", LAYER) is expected  # type: ignore[arg-type]


NAMES = ["a.q_proj", "a.v_proj", "b.q_proj"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (["q_proj", "v_proj"], []),
        (["b.q_proj", "v_proj", "a.q_proj"], []),
        (["q_proj", "k_proj", "a"], ["k_proj", "a"]),
        (("b.q_proj",), []),
        (("b.v_proj",), ["b.v_proj"]),
        (r".*\.q_proj", []),
        ("q_proj", ["q_proj"]),
        (lambda *_: False, []),
    ],
    ids=["all-match", "backwards", "some", "whole-name", "no-such-name", "regex", "regex-that-misses", "callable"],
)
def test_unmatched_names_each_entry_that_matches_nothing(pattern: object, expected: list[str]) -> None:
    assert unmatched(pattern, iter(NAMES)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("q_prj", "q_proj, v_proj"),
        ("b.q_prj", "b.q_proj, a.q_proj, a.v_proj"),
        ("xyzzy", "q_proj, v_proj"),
        ("zz.zz", "a.q_proj, a.v_proj, b.q_proj"),
    ],
    ids=["a-word", "a-path", "nothing-like-it", "no-path-like-it"],
)
def test_nearest_names_are_words_for_a_word_and_paths_for_a_path(entry: str, expected: str) -> None:
    assert nearest_names(entry, NAMES) == expected


def test_nearest_names_are_at_most_five() -> None:
    assert len(nearest_names("layer.1", [f"layer.{index}" for index in range(20)]).split(", ")) == 5


paths = components.map(".".join)


@given(paths | st.text(max_size=6), st.lists(paths, max_size=8))
def test_nearest_names_exist_and_are_never_what_was_written(entry: str, fqns: list[str]) -> None:
    near = nearest_names(entry, fqns)
    names = near.split(", ") if near else []
    assert all(any(has_suffix(fqn, name) for fqn in fqns) for name in names)
    assert entry not in names
    assert bool(names) == bool(set(fqns) - {entry})


def test_names_that_end_with_what_was_written_are_the_nearest() -> None:
    assert set(nearest_names("q_proj", [*NAMES, "proj_q"]).split(", ")) == {"a.q_proj", "b.q_proj"}


def test_where_nothing_is_like_it_the_common_names_are_listed() -> None:
    assert nearest_names("xyzzy", [*NAMES, "a", "b"], common=NAMES) == "q_proj, v_proj"
    assert nearest_names("zz.zz", [*NAMES, "a", "b"], common=["b.q_proj"]) == "b.q_proj"


@given(st.lists(paths, min_size=1, max_size=4), st.sampled_from(["|", ",", ", ", " "]), st.data())
def test_names_joined_in_a_string_are_taken_for_a_list_where_all_of_them_are_there(
    fqns: list[str], separator: str, data: st.DataObject
) -> None:
    names = [".".join(fqn.split(".")[-data.draw(st.integers(1, 4)) :]) for fqn in fqns]
    assert as_list(separator.join(names), fqns) == json.dumps(names)
    assert as_list(separator.join(name.replace(".", "\\.") for name in names), fqns) == json.dumps(names)
    assert as_list(separator.join([*names, "unheard-of"]), fqns) is None


@pytest.mark.parametrize("regex", ["", "|", ".*", "q_.*", "a."], ids=repr)
def test_a_regex_that_is_no_name_is_taken_for_no_list(regex: str) -> None:
    assert as_list(regex, NAMES) is None


@pytest.mark.parametrize(("entry", "expected"), [(".*q_proj", True), ("q_proj", False), ("(", False), ("*", False)])
def test_a_name_that_is_a_regex_of_something_is_told(entry: str, expected: bool) -> None:
    assert is_regex_of(entry, NAMES) is expected


@given(paths | st.text(max_size=6), st.lists(paths, max_size=6))
def test_a_suggestion_never_is_what_was_written(entry: str, fqns: list[str]) -> None:
    said = suggestion("targets", entry, fqns)
    assert repr(entry) not in said
    near = said.removeprefix("the nearest names are ").split(", ") if said else []
    assert not {"none", entry} & set(near)
    assert ("did you mean targets=[" in said) == (as_list(entry, fqns) is not None)

"""Errors: kinds a caller can catch, and one message for all problems."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from randlora.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    MergeError,
    OptionError,
    RandLoRAError,
    TargetError,
    raise_collected,
)

KINDS = [
    (ConfigError, ValueError),
    (OptionError, TypeError),
    (OptionError, ConfigError),
    (TargetError, ValueError),
    (CheckpointError, ValueError),
    (AdapterError, RuntimeError),
    (MergeError, RuntimeError),
]


@pytest.mark.parametrize(("error", "builtin"), KINDS, ids=lambda kind: kind.__name__)
def test_every_error_is_one_of_ours_and_one_of_pythons(error: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(error, RandLoRAError)
    assert issubclass(error, builtin)


def test_no_problems_raise_nothing() -> None:
    raise_collected(ConfigError, [], doing="inject")


def test_one_problem_is_one_line() -> None:
    with pytest.raises(TargetError, match=r"^cannot inject: no such layer$"):
        raise_collected(TargetError, ["no such layer"], doing="inject")


def test_several_problems_are_counted_and_listed_in_order() -> None:
    with pytest.raises(MergeError) as caught:
        raise_collected(MergeError, ["one", "two", "three"], doing="merge")
    assert str(caught.value) == "cannot merge, 3 problems:\n  - one\n  - two\n  - three"


@given(st.integers(2, 1000), st.sampled_from([(TargetError, 5), (ConfigError, 100), (OptionError, 100)]))
def test_however_many_problems_there_are_five_or_all_options_are_shown_and_the_rest_counted(
    count: int, kind: tuple[type[RandLoRAError], int]
) -> None:
    error, most = kind
    problems = [f"problem {index}" for index in range(count)]
    with pytest.raises(error) as caught:
        raise_collected(error, problems, doing="inject")
    first, *lines = str(caught.value).splitlines()
    assert first == f"cannot inject, {count} problems:"
    assert lines[:most] == [f"  - {problem}" for problem in problems[:most]]
    assert lines[most:] == ([f"  - and {count - most} more"] if count > most else [])

"""Errors: kinds a caller can catch, and one message for all problems."""

import pytest

from randlora.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    MergeError,
    RandLoRAError,
    TargetError,
    raise_collected,
)

KINDS = [
    (ConfigError, ValueError),
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

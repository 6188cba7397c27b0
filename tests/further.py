"""What of a table of values stands for the others: `make slow` runs what repeats a law for further values."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch

STANDS_FOR_OTHERS: dict[str, tuple[object, ...]] = {
    "basis": ("dense",),
    "compute": ("auto",),
    "dtype": (torch.float32,),
    "form": ("dense", "block(2,4)"),
    "kind": (
        *("Linear", "NF4-double"),
        *("Conv2d-groups", "ConvTranspose2d", "Embedding", "attention-in_proj-split", "experts-down-square-batched"),
    ),
    "shape": ((5, 7), (24, 40)),
}
"""By the name of a parameter the values, or their names, that are the usual ones, or one of each family."""

REPEATS_OTHERS = (
    *("NF4", "FP4-double"),
    *("Conv2d-stride", "ConvTranspose3d"),
    *("attention-k_proj", "experts-gate_up", "Linear-other-forward"),
)
"""Values of ``kind`` of which every part is in another one too."""


def further(*values: object) -> Any:
    """Make a set of parameters that only `make slow` runs, for others of the same table stand for it."""
    return pytest.param(*values, marks=pytest.mark.slow)


def leave_to_slow(items: Sequence[pytest.Item]) -> None:
    """Mark as slow what repeats a law over a product of tables."""
    functions: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("product"):
            functions[item.nodeid.partition("[")[0]].append(item)
    for function in functions.values():
        parameters: list[dict[str, Any]] = [item.callspec.params for item in function]  # type: ignore[attr-defined]
        for item, is_further in zip(function, which_are_further(parameters), strict=True):
            if is_further:
                item.add_marker(pytest.mark.slow)


def which_are_further(tests: Sequence[dict[str, Any]]) -> list[bool]:
    """Say which tests of a function repeat its law, by their parameters.

    A test does so whose kind repeats others, and one that crosses two values for which others stand. But each kind that
    does not repeat others, and each value of every other parameter, is in a test that is none of these.
    """
    repeats = [name_of(test.get("kind")) in REPEATS_OTHERS for test in tests]
    if all(repeats):
        repeats = [False] * len(tests)
    crossed = [sum(map(_has_one_that_stands_for_it, test, test.values())) for test in tests]
    is_further = [False] * len(tests)
    seen: set[tuple[str, int]] = set()
    for index in sorted(range(len(tests)), key=lambda index: (repeats[index], crossed[index])):
        kept = {name: value for name, value in tests[index].items() if name != "kind" or not repeats[index]}
        values = {(name, id(value)) for name, value in kept.items()}
        is_further[index] = (repeats[index] or crossed[index] > 1) and values <= seen
        seen |= values
    return is_further


def _has_one_that_stands_for_it(parameter: str, value: Any) -> bool:
    return parameter in STANDS_FOR_OTHERS and name_of(value) not in STANDS_FOR_OTHERS[parameter]


def name_of(value: Any) -> Any:
    """Return what a value is called in the tables."""
    name = getattr(value, "name", getattr(value, "__name__", value))
    return name if isinstance(name, str | int | tuple | torch.dtype) else None

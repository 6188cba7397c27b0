"""The list of the active parameters, which compiled code reads, follows every change of their dictionary."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import randlora

CHANGES: dict[str, Callable[[Any, nn.Parameter], object]] = {
    "__delitem__": lambda values, _: values.__delitem__("b"),
    "__ior__": lambda values, new: values.__ior__({"b": new}),
    "__setitem__": lambda values, new: values.__setitem__("b", new),
    "clear": lambda values, _: values.clear(),
    "pop": lambda values, _: values.pop("b"),
    "popitem": lambda values, _: [values.popitem() for _ in range(2)],
    "setdefault": lambda values, new: (dict.pop(values, "b"), values.setdefault("b", new)),
    "update": lambda values, new: values.update(b=new),
}
"""What changes a dictionary, by the names of its methods."""


def adapted(*names: str) -> nn.Module:
    """Make a layer with adapters."""
    model = nn.Sequential(nn.Linear(8, 12))
    for name in names:
        randlora.inject(model, r=4, targets=["0"], name=name)
    return model[0]


@pytest.mark.parametrize("method", CHANGES)
def test_the_list_of_parameters_follows_its_dictionary(method: str) -> None:
    held: Any = adapted("b", "a", "c")._modules["randlora_lambda"]
    held.randlora_seat(["c", "b"])
    slots, values, before = held.randlora_slots, held._parameters, list(held.randlora_slots)
    CHANGES[method](values, nn.Parameter(torch.randn(4, 2)))
    assert held.randlora_slots is slots
    assert all(slot is values.get(name) for slot, name in zip(slots, ["c", "b"], strict=True))
    assert any(slot is not old for slot, old in zip(slots, before, strict=True))


def test_every_method_that_changes_a_dictionary_is_known() -> None:
    reading = {"copy", "fromkeys", "get", "items", "keys", "values", "__contains__", "__getitem__", "__iter__"}
    reading |= {"__len__", "__reversed__", "__or__", "__ror__", "__class_getitem__"}
    methods = set(vars(dict)) - set(vars(object)) - reading
    assert methods == set(CHANGES)


def test_parameters_are_named_wherever_that_is_asked() -> None:
    found: dict[str, Any] = {"held": adapted("a")._modules["randlora_lambda"]}
    exec("names = list(dict(held.named_parameters()))", found)  # by code of no module
    assert found["names"] == ["a"]

"""Ejecting gives every parameter the flag back that it had, under whatever name and in whatever copy of the model."""

import contextlib
import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize, prune

import randlora
from tests.kit import bits

Change = Callable[[nn.Module], nn.Module | None]


def moved(model: nn.Module) -> None:
    model.add_module("elsewhere", model._modules.pop("1"))


def exchanged(model: nn.Module) -> None:
    held = model._modules
    held["3"], held["4"] = held["4"], held["3"]


def pruned(model: nn.Module) -> None:
    prune.random_unstructured(model.get_submodule("5"), "weight", amount=0.5)


def parametrized(model: nn.Module) -> None:
    parametrize.register_parametrization(model.get_submodule("6"), "weight", nn.Identity())


def assigned(model: nn.Module) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def copied(model: nn.Module, by: Callable[[nn.Module], nn.Module]) -> nn.Module | None:
    """Return a copy, or nothing if torch cannot make one, as of a pruned model that is trained."""
    with contextlib.suppress(RuntimeError):
        return by(model)
    return None


RENAMES: dict[str, Change] = {
    "move": moved,
    "exchange": exchanged,
    "prune": pruned,
    "parametrize": parametrized,
}
REPLACES: dict[str, Change] = {"assign": assigned, "copy": lambda model: copied(model, copy.deepcopy)}
OTHERS: dict[str, Change] = {
    "thaw": lambda model: model.requires_grad_(True) and None,
    "pickle": lambda model: copied(model, lambda each: pickle.loads(pickle.dumps(each))),
}


def some_of(changes: dict[str, Change], *, repeat: bool) -> st.SearchStrategy[list[str]]:
    unique: Any = None if repeat else lambda name: name if name in RENAMES else object()
    return st.lists(st.sampled_from([*changes]), max_size=6, unique_by=unique)


@pytest.mark.medium
@settings(max_examples=60)
@given(
    flags=st.lists(st.booleans(), min_size=14, max_size=14),
    changes=some_of(RENAMES | OTHERS, repeat=False) | some_of(REPLACES | OTHERS, repeat=True),
)
def test_flags_come_back_to_the_parameters_they_were_of(flags: list[bool], changes: list[str]) -> None:
    """Not if a parameter is replaced or copied and renamed, as it then has nothing that tells which it was."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(7)))
    parameters = [*model.parameters()]
    for parameter, flag in zip(parameters, flags, strict=True):
        parameter.requires_grad = flag
    of_value = {bits(parameter): parameter.requires_grad for parameter in parameters}
    randlora.inject(model, r=2, targets=["0", "2"], train_also=["1.bias"])
    for name in changes:
        model = (RENAMES | REPLACES | OTHERS)[name](model) or model
    randlora.eject(model)
    found = {bits(parameter): parameter.requires_grad for parameter in model.parameters()}
    assert found == of_value


def test_parameters_that_were_replaced_are_freed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    randlora.inject(model, r=2, targets=["0"])
    before = weakref.ref(model[1].weight)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    gc.collect()
    assert before() is None


def test_a_model_that_torch_swaps_parameters_of_is_converted_and_keeps_its_flags() -> None:
    """As torch does with tensors of other classes, such as those of a sharded or a quantized model."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.requires_grad = False
    flags = {fqn: parameter.requires_grad for fqn, parameter in model.named_parameters()}
    randlora.inject(model, r=2, targets=["0"])
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    randlora.eject(model)
    assert {fqn: parameter.requires_grad for fqn, parameter in model.named_parameters()} == flags
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_models_that_share_a_layer_both_give_its_flags_back() -> None:
    shared = nn.Linear(8, 8)
    models = [nn.Sequential(nn.Linear(8, 8), shared) for _ in range(2)]
    for model in models:
        randlora.inject(model, r=2, targets=["0"])
    for model in models:
        randlora.eject(model)
    assert all(parameter.requires_grad for model in models for parameter in model.parameters())
    assert not any(vars(parameter) for parameter in shared.parameters()), "no mark is left"

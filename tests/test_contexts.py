"""Verbs inside of `merged` and `disabled` blocks, in any nesting: each works or raises an error of ours."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora.errors import MergeError, RandLoRAError
from tests.kit import all_bits, fill, untouched

LEAVES: dict[str, Callable[[nn.Module], object]] = {
    "merge": randlora.merge,
    "merge reversibly": lambda model: randlora.merge(model, reversible=True),
    "unmerge": randlora.unmerge,
    "eject": randlora.eject,
    "remove": lambda model: randlora.remove(model, "a"),
    "inject": lambda model: randlora.inject(model, r=2, name="a", targets=["0"], train_also=["1"]),
    "activate": lambda model: randlora.activate(model, ["a"], trainable=True),
    "nothing active": lambda model: randlora.activate(model, []),
}
BLOCKS: dict[str, Callable[[nn.Module], AbstractContextManager[object]]] = {
    "merged": randlora.merged,
    "disabled": randlora.disabled,
}
Program = str | tuple[str, list["Program"]]
programs: st.SearchStrategy[Program] = st.recursive(
    st.sampled_from([*LEAVES, "raise"]),
    lambda inner: st.tuples(st.sampled_from([*BLOCKS]), st.lists(inner, min_size=1, max_size=4)),
    max_leaves=8,
)


class BodyError(Exception):
    """Raised in a block."""


def run(model: nn.Module, program: Program) -> None:
    if program == "raise":
        raise BodyError
    if isinstance(program, str):
        try:
            LEAVES[program](model)
        except RandLoRAError:
            return
        return
    name, inner = program
    entered = False
    try:
        with BLOCKS[name](model):
            entered = True
            for each in inner:
                run(model, each)
    except RandLoRAError:
        assert not entered, "leaving a block raises nothing"


@pytest.mark.medium
@settings(max_examples=60)
@given(st.lists(programs, min_size=1, max_size=4))
def test_blocks_end_as_they_should_whatever_is_called_inside(program: list[Program]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    base, flags = all_bits(model.state_dict()), {name: p.requires_grad for name, p in model.named_parameters()}
    randlora.inject(model, r=2, targets=["0"], name="a", train_also=["1"])
    fill(model, "a")
    has_raised = False
    for each in program:
        try:
            run(model, each)
        except BodyError:
            has_raised = True
    assert has_raised or not any(each == "raise" for each in program)
    permanently = any("'merge'" in repr(each) or each == "merge" for each in program)
    if randlora.adapters(model):
        assert not randlora.state.adapted_root(model)[1].is_disabled
        randlora.eject(model)
    if not permanently:
        assert all_bits(model.state_dict()) == base
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def test_an_exception_in_a_block_is_not_hidden_by_leaving_it() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    randlora.inject(model, r=2)
    with pytest.raises(BodyError):
        run(model, ("merged", ["unmerge", "merge", "raise"]))


def test_nothing_of_a_state_dict_is_loaded_into_a_merged_model() -> None:
    inner = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    model = nn.Sequential(nn.Sequential(nn.LayerNorm(8), inner))
    randlora.inject(model, r=2, targets="all-linear")
    targets = [nn.Sequential(model), model, model[0], inner, inner[1]]
    states = [{name: value + 1 for name, value in target.state_dict().items()} for target in targets]
    with randlora.merged(model), randlora.merged(copy.deepcopy(model)):
        for target, state in zip(targets, states, strict=True):
            with untouched(model), pytest.raises(MergeError, match="cannot load a state dict"):
                target.load_state_dict(state)
    for target, state in zip(targets, states, strict=True):
        target.load_state_dict(state)
    assert not any(module._load_state_dict_pre_hooks for module in model.modules())


@pytest.mark.parametrize("bias", [False, True])
def test_what_unmerging_drops_does_not_require_grad(bias: bool) -> None:
    """An optimizer of ``model.parameters()`` would train it, for nothing: here a's copy of a weight that b adapts."""
    model = nn.Sequential(nn.Linear(8, 8, bias=bias), nn.Linear(8, 8))
    randlora.inject(model, r=2, name="a", targets=["1"], train_also=["0"])
    randlora.inject(model, r=2, name="b", targets=["0"])
    randlora.activate(model, ["a", "b"])
    trained = set(randlora.trainable_parameters(model))
    assert model[0].weight in trained
    with randlora.merged(model):
        assert trained == set(randlora.trainable_parameters(model))
        assert trained >= {parameter for parameter in model.parameters() if parameter.requires_grad}
        assert not model[0].weight.requires_grad
        assert not bias or model[0].bias in trained
    assert model[0].weight.requires_grad
    randlora.merge(model)
    assert all(parameter.requires_grad for parameter in model.parameters())

"""Verbs inside of `merged` and `disabled` blocks, in any nesting: each works or raises an error of ours."""

import contextlib
import copy
import pickle
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora.errors import AdapterError, MergeError, RandLoRAError
from randlora.serving import routed
from tests.kit import all_bits, fill, untouched
from tests.laws import TOKENS, Mixed

LEAVES: dict[str, Callable[[nn.Module], object]] = {
    "merge": randlora.merge,
    "merge reversibly": lambda model: randlora.merge(model, reversible=True),
    "unmerge": randlora.unmerge,
    "eject": randlora.eject,
    "remove": lambda model: randlora.remove(model, "a"),
    "inject": lambda model: randlora.inject(model, r=2, name="a", targets=["0"], train_also=["1"]),
    "activate": lambda model: randlora.activate(model, ["a"]),
    "set_trainable": lambda model: randlora.set_trainable(model, "a"),
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
@settings(max_examples=30)
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


def test_blocks_that_threads_enter_at_once_end_with_the_last_and_restore_every_bit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    randlora.inject(model, r=2, targets=["0"], train_also=["1"])
    fill(model)
    x = torch.randn(3, 8)
    before = all_bits(model.state_dict())
    with randlora.disabled(model):
        expected = model(x)

    def enter(barrier: threading.Barrier) -> list[torch.Tensor]:
        barrier.wait()
        outputs = []
        for _ in range(50):
            with randlora.disabled(model):
                outputs.append(model(x))
        return outputs

    with ThreadPoolExecutor(4) as pool:
        barrier = threading.Barrier(4)
        outputs = [output for thread in [pool.submit(enter, barrier) for _ in range(4)] for output in thread.result()]
    assert all(torch.equal(output, expected) for output in outputs)
    assert all_bits(model.state_dict()) == before
    assert all_bits(dict(model.named_parameters())) == before
    assert not randlora.state.adapted_root(model)[1].is_disabled


def test_blocks_of_disabled_that_overlap_end_with_the_last() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    randlora.inject(model, r=2, targets=["0"], train_also=["1"])
    fill(model)
    x, first, second = torch.ones(1, 8), randlora.disabled(model), randlora.disabled(model)
    plain = model(x)
    first.__enter__()
    second.__enter__()
    inside = model(x)
    first.__exit__(None, None, None)
    assert torch.equal(model(x), inside)
    second.__exit__(None, None, None)
    assert torch.equal(model(x), plain)


def test_a_block_of_merged_in_another_thread_is_refused_and_may_run_the_model() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    randlora.inject(model, r=2, name="a")
    randlora.inject(model, r=2, name="b", seed=1)
    fill(model, "a")
    fill(model, "b")
    before = all_bits(model.state_dict())

    def enter() -> None:
        with randlora.merged(model):
            pytest.fail("the block was entered")

    with randlora.merged(model), ThreadPoolExecutor(1) as pool:
        inside, x = model(torch.ones(1, 8)), torch.ones(1, 8)
        assert torch.equal(pool.submit(lambda: model(x)).result(), inside)
        with pytest.raises(MergeError, match="another thread or task has an open block"):
            pool.submit(enter).result()
        assert torch.equal(model(x), inside)
        randlora.activate(model, ["a", "b"])
        with randlora.merged(model):
            assert [info.is_merged for info in randlora.adapters(model)] == [True, True]
        assert [info.is_merged for info in randlora.adapters(model)] == [True, False]
    assert all_bits(model.state_dict()) == before
    with ThreadPoolExecutor(1) as pool, pytest.raises(pytest.fail.Exception, match="entered"):
        pool.submit(enter).result()
    assert all_bits(model.state_dict()) == before


@pytest.mark.medium
@settings(max_examples=40)
@given(name=st.sampled_from([*BLOCKS]), share=st.floats(0, 1, exclude_max=True))
def test_an_interrupt_at_any_call_leaves_no_block_open(name: str, share: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    randlora.inject(model, r=2, targets=["0"], train_also=["1"])
    fill(model)

    def block() -> None:
        with BLOCKS[name](model):
            pass

    block()
    counted = Interrupt(None)
    counted.during(block)
    with untouched(model), contextlib.suppress(KeyboardInterrupt):
        Interrupt(1 + int(share * counted.calls)).during(block)


class Interrupt:
    """Raises `KeyboardInterrupt` as the k-th function of this library is called; with `None` at none.

    Python handles signals where a function begins, and where a loop goes on; closing a generator, it drops them.
    """

    def __init__(self, k: int | None) -> None:
        self.k, self.calls = k, 0

    def trace(self, frame: FrameType, event: str, arg: object) -> None:  # noqa: ARG002
        if frame.f_globals.get("__name__", "").startswith("randlora.") and frame.f_code.co_name != "<genexpr>":
            self.calls += 1
            if self.calls == self.k:
                raise KeyboardInterrupt

    def during(self, call: Callable[[], None]) -> None:
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            call()
        finally:
            sys.settrace(before)


@pytest.mark.parametrize("change", ["load", "replace"])
def test_what_is_put_into_a_model_while_disabled_becomes_its_own(change: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    randlora.inject(model, r=2, targets=["0"], train_also=["1"])
    fill(model)
    trained, new = all_bits(model[1].state_dict()), nn.Linear(8, 4)
    with randlora.disabled(model):
        if change == "load":
            model[1].load_state_dict(new.state_dict(), assign=True)
        else:
            model[1] = new
    assert all_bits(model[1].state_dict()) == trained
    randlora.eject(model)
    assert all_bits(model[1].state_dict()) == all_bits(new.state_dict())


def test_a_module_of_another_shape_put_into_a_model_while_disabled_is_said(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    randlora.inject(model, r=2, targets=["0"], train_also=["1"])
    with randlora.disabled(model):
        model[1] = nn.Linear(8, 6)
    assert model(torch.ones(1, 8)).shape == (1, 6)
    assert any("shape of 1.weight" in problem for problem in randlora.adapters(model)[0].problems)
    with pytest.raises(RandLoRAError, match=r"shape of 1\.weight, which adapter 'default' trains, was 4 x 8"):
        randlora.save(model, tmp_path)
    randlora.eject(model)
    assert model[1].weight.shape == (6, 8)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("made", COPIES.values(), ids=COPIES)
def test_a_copy_made_while_disabled_is_inactive_and_not_disabled_for_ever(made: Callable[..., nn.Module]) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), torch.randn(3, 8)
    base = model(x)
    randlora.inject(model, r=2, targets=["0"], name="a", train_also=["1"])
    fill(model, "a")
    active = model(x)
    with randlora.disabled(model), randlora.disabled(model):
        copied = made(model)
    assert torch.equal(copied(x), base)
    assert torch.equal(model(x), active)
    assert [info.is_active for info in randlora.adapters(copied)] == [False]
    with randlora.disabled(copied):
        assert torch.equal(copied(x), base)
    randlora.activate(copied, "a")
    assert torch.equal(copied(x), active)


@pytest.mark.parametrize("block", [randlora.disabled, lambda model: routed(model, ["b"] * len(TOKENS))])
def test_a_block_that_is_refused_leaves_a_merged_copy_merged(block: Any) -> None:
    model = Mixed()
    randlora.inject(model, r=4, name="a", targets=["q"], train_also=["up"])
    randlora.inject(model, r=4, name="b", targets=["up"])
    fill(model, "b")
    randlora.activate(model, ["a", "b"])
    randlora.merge(model, reversible=True)
    with untouched(model), pytest.raises(AdapterError, match="while the adapters are merged"), block(model):
        pass

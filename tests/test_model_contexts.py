"""Blocks of `merged` and `disabled` in threads and under interrupts; `tests.state_machine` calls all verbs in them."""

import contextlib
import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import randlora
from randlora.errors import MergeError, RandLoRAError
from tests.kit import all_bits, fill, untouched

X = torch.linspace(-1, 1, 24).view(3, 8)


def adapted(second: nn.Module | None = None) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 8), second or nn.LayerNorm(8))
    randlora.inject(model, r=2, targets=["0"], train_also=["1"], name="a")
    return fill(model, "a")


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


def test_blocks_of_disabled_that_overlap_end_with_the_last_and_restore_every_bit() -> None:
    model, barrier = adapted(), threading.Barrier(4)
    plain = model(X)
    one, other = randlora.disabled(model), randlora.disabled(model)
    with untouched(model):
        one.__enter__()
        other.__enter__()
        expected = model(X)
        one.__exit__(None, None, None)
        assert torch.equal(model(X), expected)
        other.__exit__(None, None, None)
    assert torch.equal(model(X), plain)

    def outputs(_: int) -> list[Tensor]:
        barrier.wait()
        found = []
        for _ in range(50):
            with randlora.disabled(model):
                found.append(model(X))
        return found

    with untouched(model), ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(output, expected) for found in pool.map(outputs, range(4)) for output in found)


def test_a_block_of_merged_in_another_thread_is_refused_and_may_run_the_model() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    for seed, name in enumerate("ab"):
        randlora.inject(model, r=2, name=name, seed=seed)
        fill(model, name)
    before = all_bits(model.state_dict())

    def enter() -> None:
        with randlora.merged(model):
            pytest.fail("the block was entered")

    with randlora.merged(model), ThreadPoolExecutor(1) as pool:
        inside = model(X)
        assert torch.equal(pool.submit(lambda: model(X)).result(), inside)
        with pytest.raises(MergeError, match="another thread or task has an open block"):
            pool.submit(enter).result()
        assert torch.equal(model(X), inside)
        randlora.activate(model, ["a", "b"])
        with randlora.merged(model):
            assert [info.is_merged for info in randlora.adapters(model)] == [True, True]
        assert [info.is_merged for info in randlora.adapters(model)] == [True, False]
    with ThreadPoolExecutor(1) as pool, pytest.raises(pytest.fail.Exception, match="entered"):
        pool.submit(enter).result()
    assert all_bits(model.state_dict()) == before


@pytest.mark.medium
@settings(max_examples=30)
@given(block=st.sampled_from([randlora.merged, randlora.disabled]), share=st.floats(0, 1, exclude_max=True))
def test_an_interrupt_at_any_call_leaves_no_block_open(block: Any, share: float) -> None:
    """Python handles signals where a function begins, and where a loop goes on; closing a generator, it drops them."""
    model = adapted()

    def interrupted(k: int | None) -> int:
        """Open the block, raise as the k-th function of the library is called, and return how many were."""
        calls = 0

        def trace(frame: FrameType, event: str, arg: object) -> None:
            nonlocal calls
            if frame.f_globals.get("__name__", "").startswith("randlora.") and frame.f_code.co_name != "<genexpr>":
                calls += 1
                if calls == k:
                    raise KeyboardInterrupt

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with contextlib.suppress(KeyboardInterrupt), block(model):
                pass
        finally:
            sys.settrace(before)
        return calls

    with untouched(model):
        interrupted(None)
        interrupted(1 + int(share * interrupted(None)))


def test_a_module_put_into_a_model_while_disabled_becomes_its_own_and_must_have_the_shape(tmp_path: Path) -> None:
    for out_features in (4, 6):
        model, new = adapted(nn.Linear(8, 4)), nn.Linear(8, out_features)
        trained = all_bits(model[1].state_dict())
        with randlora.disabled(model):
            model[1] = new
        assert model(X).shape == (3, out_features)
        if out_features == 4:
            assert all_bits(model[1].state_dict()) == trained
        else:
            assert any("shape of 1.weight" in problem for problem in randlora.adapters(model)[0].problems)
            with pytest.raises(RandLoRAError, match=r"shape of 1\.weight, which adapter 'a' trains, was 4 x 8"):
                randlora.save(model, tmp_path)
        randlora.eject(model)
        assert all_bits(model[1].state_dict()) == all_bits(new.state_dict())


def test_a_copy_made_while_disabled_is_inactive_and_not_disabled_for_ever() -> None:
    model = adapted()
    active = model(X)
    with randlora.disabled(model), randlora.disabled(model):
        copies, base = (copy.deepcopy(model), pickle.loads(pickle.dumps(model))), model(X)
    assert torch.equal(model(X), active)
    for twin in copies:
        assert torch.equal(twin(X), base)
        assert [info.is_active for info in randlora.adapters(twin)] == [False]
        randlora.activate(twin, "a")
        assert torch.equal(twin(X), active)

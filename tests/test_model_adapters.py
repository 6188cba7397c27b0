"""Several adapters of one model, by name and by layer, and blocks of `with`; `tests.state_machine` has their orders."""

import contextlib
import copy
import pickle
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import randlora
from randlora.errors import AdapterError, ConfigError, MergeError, RandLoRAError, TargetError
from randlora.state import adapted_root, is_adapted
from tests.kit import adapt, fill, on_one_line, same_bits, untouched
from tests.laws import TOKENS, Mixed

TARGETS = ["q", "up", "down"]


def mixed(*names: str, **options: Any) -> Mixed:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mixed()
    for seed, name in enumerate(names):
        randlora.inject(model, **{"r": 3, "targets": TARGETS, "seed": seed, "stream": "portable", **options}, name=name)
        fill(model, name, seed=seed, spread=0.3)
    return model


def test_bases_that_do_not_fit_come_beside_the_first_and_the_report_says_so() -> None:
    others: list[dict[str, Any]] = [{"seed": 1}, {"stream": "torch"}, {"r": 2}, {"basis": "block"}]
    for other in others:
        model = mixed("a")
        (first,) = bank = adapted_root(model)[1].bank
        options: dict[str, Any] = {"r": 3, "stream": "portable", "name": "b", **other}
        planned = randlora.plan(model, **options)
        assert str(randlora.inject(model, **options)) == str(planned)
        assert len(bank) == 2
        said = f"cannot be shared: {first.spec}, {first.nbytes:,} bytes"
        assert f"its bases are additional: those of the other adapters {said}" in on_one_line(planned)
        randlora.remove(model, "b")
        assert [*bank] == [first]


def test_deltas_are_summed_in_the_order_of_their_activation() -> None:
    """The order is part of the sum's bits, and must not be that of a set, which changes from process to process."""
    model = mixed(*(names := ["a", "b", "c", "d", "e"]))
    randlora.activate(model, names)
    expected = torch.zeros(12, 12)
    for name in names:
        expected = expected + randlora.delta_weight(model, "q", name=name)
    assert same_bits(randlora.delta_weight(model, "q"), expected)


CALLS: list[Callable[[nn.Module], object]] = [randlora.merge, randlora.eject, lambda m: randlora.save(m, "nowhere")]
CALLS += [lambda model: randlora.activate(model, "default"), lambda model: randlora.disabled(model).__enter__()]


def test_adapters_belong_to_the_module_they_were_added_to_and_a_wrapper_shows_them() -> None:
    options: dict[str, Any] = {"r": 2, "targets": "all-linear"}
    model, whole, part = (nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))) for _ in range(3))
    randlora.inject(whole, **options)
    randlora.inject(part[1], **options)
    randlora.inject(model, **options)
    model.append(copy.deepcopy(model[0]))
    refused = [(each, call) for each in (model[1], model) for call in CALLS]
    refused += [(each, lambda each: randlora.inject(each, **options, name="b")) for each in (whole[1], part)]
    for each, call in refused:
        with untouched(model), pytest.raises(AdapterError, match="were added to a different module"):
            call(each)
    around = nn.Sequential(nn.Sequential(one := Mixed(), other := Mixed()))
    assert not is_adapted(around)
    randlora.inject(one, r=4)
    assert (is_adapted(around), adapted_root(around)[0]) == (True, one)
    randlora.inject(other, r=4)
    with pytest.raises(AdapterError, match=r"several submodules have adapters \(0\.0, 0\.1\): call this"):
        randlora.merge(around)


def test_an_adapter_prints_as_its_options_and_state_and_what_the_model_has_no_more() -> None:
    model = mixed("a")
    adapt(model, r=3, targets=["q"], train_also=["norm"], name="b", values=1)

    def assert_listed(first: str, second: str = "inactive, frozen") -> None:
        also = "also trained: norm.weight, norm.bias"
        expected = [f"'a': r=3, alpha=60, 3 layers, {first}", f"'b': r=3, alpha=60, 1 layer, {second}\n{also}"]
        assert [str(info) for info in randlora.adapters(model)] == expected
        one_line = [f"<adapter {said.partition(chr(10))[0]}>" for said in expected]
        assert repr(randlora.adapters(model)) == f"[{', '.join(one_line)}]"

    assert_listed("active, trainable")
    randlora.activate(model, {"a": np.float32(-0.25)})
    assert_listed("active with the factor -0.25, trainable")
    randlora.activate(model, {"a": {"q": 1, ".*": 0}})
    assert_listed("active with a factor for each layer, trainable")
    randlora.set_trainable(model, ["a"], False)
    randlora.activate(model, "b")
    assert_listed("inactive, frozen", "active, frozen")
    randlora.merge(model, reversible=True)
    assert_listed("inactive, frozen", "active, frozen, merged")
    model.up = nn.Linear(5, 7)
    info = randlora.adapters(model)[0]
    assert on_one_line(info).endswith(" ".join(info.problems[0].split()))  # type: ignore[arg-type]
    named = nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"x\ny": nn.LayerNorm(8)}))
    randlora.inject(named, r=2, targets=["0"], train_also=["1"])
    assert str(randlora.adapters(named)[0]).endswith("\nalso trained: 1.x\\ny.weight, 1.x\\ny.bias")


def test_a_way_to_compute_serves_adapters_that_come_later_and_ends_with_them() -> None:
    model = mixed("a")
    randlora.set_compute(model, "factored")
    randlora.inject(model, r=4, name="other")
    assert adapted_root(model)[1].compute == "factored"
    randlora.eject(model)
    for call in (randlora.set_compute, lambda plain: list(randlora.trainable_parameters(plain))):
        with pytest.raises(AdapterError, match="the model has no adapter: call"):
            call(model)
    randlora.inject(model, r=4)
    assert adapted_root(model)[1].compute == "auto"


def test_a_layer_that_is_left_out_is_neither_trained_nor_merged_into() -> None:
    model = mixed("a", "b")
    randlora.activate(model, {"a": {"q": 0.5, ".*": 0.0}, "b": {"q": 0.0, ".*": 1.0}})
    model(TOKENS).square().sum().backward()
    trained = {fqn for fqn, each in model.named_parameters() if each.grad is not None}
    assert trained == {"q.randlora_lambda.a", "q.randlora_gamma.a"}
    with untouched(model):
        assert randlora.merge(model, adapters=["a"], reversible=True).targets == ("q",)
        for other in (1.0, {"q": 0.5, ".*": 1.0}):
            with untouched(model), pytest.raises(AdapterError, match="cannot activate others while the adapters"):
                randlora.activate(model, {"a": other, "b": 1.0})
        report = randlora.merge(model, adapters=["b"], reversible=True)
        assert report.targets == ("up", "down")
        assert str(report).startswith("merged b with a factor for each layer (2 of 3 are not 0) into 2 layers")
        assert (randlora.unmerge(model, ["a"]), randlora.unmerge(model)) == (("q",), ("up", "down"))


ACTIVATIONS: list[tuple[Any, str]] = [
    ("c", "no adapter named 'c': it has a, elsewhere"),
    (["a", "c"], "no adapter named 'c'"),
    (["a", "a"], r"each adapter can be named once, got \['a', 'a'\]"),
    ({"a": float("nan")}, "factor of 'a' must be a finite number, got nan"),
    ({"a": True}, "must be a finite number, got True"),
    ({"a": -1e16}, r"factor of 'a' must be at most 1e\+15 in size, got -1e\+16"),
    ({"a": {"(": 0.5, ".*": 1.0}}, r"'\(': …} is neither the name of a target nor a regular expression"),
    ({"a": {"q": 0.5}}, r"names\['a'\]= has no pattern for up, down: add '\.\*' as the last"),
    ({"a": {"dwon": 0.5, ".*": 1.0}}, r"names\['a'\]={'dwon': …} matches no target"),
    ({"a": {".*": 0.5, "q": 1.0}}, "matches only what '.*' took: put it before"),
    ({"a": {".*": float("inf")}}, r"the factor of 'a' in '\.\*' must be a finite number"),
    ({"a": {1: 1.0}}, "the factor of 'a' must have patterns of layers as keys, got 1"),
    ({"a": {}}, r"names\['a'\]= has no pattern for q, up, down"),
]
wrong: Any = partial  # for arguments of types that are refused
REFUSED: list[tuple[Callable[[nn.Module], object], type[RandLoRAError], str]] = [
    *((wrong(randlora.activate, names=names), AdapterError, said) for names, said in ACTIVATIONS),
    (wrong(randlora.remove, name="x"), AdapterError, "no adapter named 'x': it has a, elsewhere"),
    *((wrong(randlora.set_trainable, names=x), AdapterError, "has no adapter n") for x in ("x", ["a", "x"], [3], 3)),
    (wrong(randlora.set_trainable, names="a", trainable=None), ConfigError, "trainable must be"),
    (wrong(randlora.set_compute, compute="fast"), ConfigError, "one of auto, factored, materialized, got 'fast'"),
    (wrong(randlora.delta_weight, fqn="dwn"), TargetError, "'dwn' is not adapted; the nearest.* are down"),
]


def test_what_cannot_be_named_activated_or_trained_is_refused() -> None:
    model = mixed("a")
    randlora.inject(model, r=3, name="elsewhere", targets=["head"], active=False)
    for call, error, message in REFUSED:
        with untouched(model), pytest.raises(error, match=message):
            call(model)


def adapted() -> Mixed:
    return mixed("a", train_also=["norm"])


class LoadsItself(nn.Linear):
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: object) -> None:  # noqa: ARG002
        with torch.no_grad():
            self.weight.copy_(state_dict[f"{prefix}weight"])


@pytest.mark.parametrize("kind", [nn.Linear, LoadsItself])
def test_nothing_of_a_state_dict_is_loaded_into_a_merged_model(kind: type[nn.Linear]) -> None:
    inner = nn.Sequential(nn.LayerNorm(8), kind(8, 8, bias=False))
    model = nn.Sequential(nn.Sequential(nn.LayerNorm(8), inner))
    randlora.inject(model, r=2, targets="all-linear")
    targets = [nn.Sequential(model), model, model[0], inner, inner[1]]
    states = [{name: value + 1 for name, value in target.state_dict().items()} for target in targets]
    with randlora.merged(model), randlora.merged(copy.deepcopy(model)):
        for target, state in zip(targets, states, strict=True):
            with untouched(model), pytest.raises(MergeError, match="cannot load a state dict"):
                target.load_state_dict(state, strict=kind is nn.Linear)
    for target, state in zip(targets, states, strict=True):
        target.load_state_dict(state, strict=kind is nn.Linear)


def test_blocks_of_disabled_that_overlap_end_with_the_last_and_restore_every_bit() -> None:
    model, barrier = adapted(), threading.Barrier(4)
    plain = model(TOKENS)
    one, other = randlora.disabled(model), randlora.disabled(model)
    with untouched(model):
        one.__enter__()
        other.__enter__()
        expected = model(TOKENS)
        one.__exit__(None, None, None)
        assert torch.equal(model(TOKENS), expected)
        other.__exit__(None, None, None)
    assert torch.equal(model(TOKENS), plain)

    def outputs(_: int) -> list[Tensor]:
        barrier.wait()
        found = []
        for _ in range(50):
            with randlora.disabled(model):
                found.append(model(TOKENS))
        return found

    with untouched(model), ThreadPoolExecutor(4) as pool:
        found = torch.stack([output for each in pool.map(outputs, range(4)) for output in each])
    assert torch.equal(found, expected.expand(200, *expected.shape))


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
        interrupted(None)  # draws the bases, once
        calls = interrupted(None)
        assert calls > 50
        k = 1 + int(share * calls)
        assert interrupted(k) == k, "it was raised elsewhere, or not at all"


def test_a_copy_made_while_disabled_is_inactive_and_not_disabled_for_ever() -> None:
    model = adapted()
    active = model(TOKENS)
    with randlora.disabled(model), randlora.disabled(model):
        copies, base = (copy.deepcopy(model), pickle.loads(pickle.dumps(model))), model(TOKENS)
    assert torch.equal(model(TOKENS), active)
    for twin in copies:
        assert torch.equal(twin(TOKENS), base)
        assert [info.is_active for info in randlora.adapters(twin)] == [False]
        randlora.activate(twin, "a")
        assert torch.equal(twin(TOKENS), active)

"""Merging some adapters while others stay active on top: in any order, undone in any order, bit for bit."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

import randlora
from randlora.errors import AdapterError, MergeError
from tests.kit import Bits, all_bits, assert_unchanged, bits, fill, same_bits, snapshot, untouched
from tests.laws import TOKENS, Mixed, assert_close
from tests.layer_kinds import LayerKind, every_mergeable_kind_and_dtype, every_quantized_kind
from tests.read_kinds import ReadKind, every_read_kind

FACTORS = {"a": 1.0, "b": -0.7, "c": 0.4}
SUBSETS = [frozenset(subset) for size in range(4) for subset in itertools.combinations(FACTORS, size)]
ORDERS = [*itertools.permutations(map(frozenset, FACTORS))]
PATHS = [
    [
        *itertools.accumulate(merging, frozenset.union, initial=frozenset[str]()),
        *itertools.accumulate(unmerging, frozenset.difference, initial=frozenset(FACTORS)),
    ]
    for merging, unmerging in itertools.product(ORDERS, ORDERS)
]
"""Which adapters are merged, step by step: one more at a time, then one fewer, in all orders."""


def with_three(model: nn.Module, **options: Any) -> nn.Module:
    for seed, name in enumerate(FACTORS):
        randlora.inject(model, name=name, **{"r": 3, "alpha": 4 + seed, "stream": "portable", "seed": seed, **options})
        fill(model, name, seed=seed)
    randlora.activate(model, FACTORS)
    return model


def step(model: nn.Module, now: Iterable[str], wanted: frozenset[str], **options: Any) -> None:
    """Merge and unmerge adapters one by one until those wanted are merged."""
    for name in wanted.difference(now):
        assert randlora.merge(model, adapters=[name], reversible=True, **options).adapters == {name: FACTORS[name]}
    for name in frozenset(now) - wanted:
        randlora.unmerge(model, name)
    assert {info.name for info in randlora.adapters(model) if info.is_merged} == wanted


def values(model: nn.Module) -> dict[str, Bits]:
    """Take down the weights that the model computes with, without Λ and Γ, which stay."""
    return all_bits({name: value for name, value in model.named_parameters() if "randlora" not in name})


def at_once(model: nn.Module, **options: Any) -> dict[frozenset[str], dict[str, Bits]]:
    """Return the weights with each subset of the adapters merged, from merging it in one call."""
    found = {}
    for subset in SUBSETS:
        if subset:
            randlora.merge(model, adapters=subset, reversible=True, **options)
        found[subset] = values(model)
        if subset:
            randlora.unmerge(model)
    return found


def test_every_order_of_merging_and_unmerging_gives_the_same_bits() -> None:
    model = with_three(Mixed(torch.bfloat16), targets=["q", "up"])
    randlora.inject(model, r=3, targets=["down"], name="elsewhere")
    before, expected = snapshot(model), at_once(model)
    assert len({str(each) for each in expected.values()}) == len(SUBSETS)
    now: frozenset[str] = frozenset()
    for path in PATHS:
        for wanted in path:
            step(model, now, wanted)
            now = wanted
            assert values(model) == expected[wanted]
        assert_unchanged(model, before)


@every_mergeable_kind_and_dtype
def test_a_layer_of_any_kind_computes_the_sum_and_gets_back_every_bit(kind: LayerKind, dtype: torch.dtype) -> None:
    model = with_three(nn.Sequential(kind.build(9, 14, True, dtype)))
    x = torch.randn(5, 9).to(dtype)
    before, expected, wanted = snapshot(model), at_once(model), model(x)
    now: frozenset[str] = frozenset()
    for merged in PATHS[0] if kind.is_quantized else PATHS[3]:
        step(model, now, merged)
        now = merged
        assert values(model) == expected[merged]
        if not kind.is_quantized:
            assert_close(model(x), wanted, dtype)
    assert_unchanged(model, before)
    assert same_bits(model(x), wanted)


@every_read_kind
def test_a_weight_that_is_read_is_the_sum_and_gets_back_every_bit(kind: ReadKind) -> None:
    dtype = kind.dtypes[0]
    model = with_three(kind.model(dtype), **{**kind.adapter_options, "alpha": 5})
    before, expected, wanted = snapshot(model), at_once(model), kind.run(model, dtype)
    now: frozenset[str] = frozenset()
    for merged in PATHS[7]:
        step(model, now, merged)
        now = merged
        assert values(model) == expected[merged]
        assert_close(kind.run(model, dtype), wanted, dtype)
    assert_unchanged(model, before)


@every_quantized_kind
def test_a_quantized_layer_that_is_dequantized_comes_back_too(kind: LayerKind) -> None:
    model = with_three(nn.Sequential(kind.build(9, 14, True, kind.exact)))
    x = torch.randn(5, 9).to(kind.exact)
    with torch.no_grad():
        options: dict[str, Any] = {"quantized": "dequantize", "dtype": torch.float32}
        before, expected = snapshot(model), at_once(model, **options)
        wanted = model(x)
        for merged in ({"a"}, {"a", "b"}, {"b"}, {"b", "c"}, {"c"}):
            now = {info.name for info in randlora.adapters(model) if info.is_merged}
            step(model, now, frozenset(merged), **options)
            assert values(model) == expected[frozenset(merged)]
            assert type(model[0]).__name__ == "AdaptedLinear"  # type: ignore[index]
            if not kind.rounds_inputs:
                torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
        with untouched(model), pytest.raises(MergeError, match="others are merged with different options"):
            randlora.merge(model, reversible=True)
        randlora.unmerge(model, "c")
    assert_unchanged(model, before)


def test_what_stays_on_top_is_trained_as_without_a_merge() -> None:
    model = with_three(Mixed(torch.float64), train_also=None)
    randlora.set_trainable(model, ["b", "c"])
    randlora.set_trainable(model, "a", trainable=False)
    grads = []
    for merged in ([], ["a"]):
        if merged:
            randlora.merge(model, adapters=merged, reversible=True)
        trained = [each for each in model.parameters() if each.requires_grad]
        grads.append(torch.autograd.grad(model(TOKENS).square().sum(), trained))
    for found, expected in zip(*grads, strict=True):
        assert_close(found, expected, torch.float64)


def test_a_dtype_changed_while_some_are_merged_loses_no_bit_of_the_original() -> None:
    model = with_three(Mixed())
    own = {name: bits(value) for name, value in model.state_dict().items() if name.endswith("weight")}
    randlora.merge(model, adapters="a", reversible=True)
    model.to(torch.bfloat16)
    randlora.merge(model, adapters="b", reversible=True)
    assert model.get_parameter("q.weight").dtype == torch.bfloat16
    model.to(torch.float32)
    randlora.unmerge(model, "a")
    randlora.unmerge(model, "b")
    assert {name: own[name] for name in ("q.weight", "up.weight", "down.weight")} == {
        name: bits(model.state_dict()[name]) for name in ("q.weight", "up.weight", "down.weight")
    }


def test_a_block_merges_the_rest_and_leaves_what_was_merged() -> None:
    model = with_three(Mixed())
    randlora.merge(model, adapters="b", reversible=True)
    before = values(model)
    with randlora.merged(model) as report:
        assert report.adapters == {"a": 1.0, "c": 0.4}
        everything = values(model)
        with randlora.merged(model):
            assert values(model) == everything
        assert values(model) == everything
    assert values(model) == before
    with randlora.merged(model):
        randlora.unmerge(model, "a")
        assert {info.name for info in randlora.adapters(model) if info.is_merged} == {"b", "c"}
    assert values(model) == before
    with pytest.raises(ZeroDivisionError), randlora.merged(model):
        raise ZeroDivisionError
    assert values(model) == before
    randlora.eject(model)


def test_what_is_active_on_top_can_be_switched_if_what_is_merged_is_named_too() -> None:
    model = with_three(Mixed(torch.float64))
    randlora.activate(model, {"a": 1.0, "c": 0.5})
    expected = model(TOKENS)
    randlora.activate(model, {"a": 1.0, "b": 2.0})
    randlora.merge(model, adapters="a", reversible=True)
    merged = values(model)
    randlora.activate(model, {"a": 1.0, "c": 0.5})
    randlora.set_trainable(model, ["a", "c"])
    assert values(model) == merged
    assert_close(model(TOKENS), expected, torch.float64)
    for others in ({"b": 1.0}, {"a": 2.0, "b": 1.0}, dict[str, float]()):
        with untouched(model), pytest.raises(AdapterError, match="while the adapters are merged"):
            randlora.activate(model, others)
    randlora.unmerge(model)
    assert {info.name: info.weight for info in randlora.adapters(model)} == {"a": 1.0, "b": None, "c": 0.5}
    assert_close(model(TOKENS), expected, torch.float64)


def test_a_parameter_trained_beside_stays_with_its_adapter() -> None:
    model = Mixed()
    randlora.inject(model, r=3, targets=["q"], name="a", train_also=["head"])
    randlora.inject(model, r=3, targets=["up"], name="b", train_also=["q.weight"])
    randlora.inject(model, r=3, targets=["down"], name="c")
    fill(model, "a"), fill(model, "b", seed=1)
    randlora.activate(model, ["a", "b"])
    before, expected = snapshot(model), model(TOKENS)
    with untouched(model), pytest.raises(MergeError, match=r"'b' would not be merged, but trains a copy of q\.weight"):
        randlora.merge(model, adapters="a", reversible=True)
    randlora.merge(model, adapters="b", reversible=True)
    assert_close(model(TOKENS), expected, torch.float32)
    randlora.merge(model, adapters="a", reversible=True)
    assert_close(model(TOKENS), expected, torch.float32)
    merged = values(model)
    randlora.activate(model, ["a", "b", "c"])
    assert values(model) == merged
    randlora.activate(model, ["a", "b"])
    assert_close(model(TOKENS), expected, torch.float32)
    randlora.unmerge(model, "b")
    randlora.unmerge(model, "a")
    assert_unchanged(model, before)
    randlora.activate(model, "b")
    randlora.merge(model, adapters="b", reversible=True)
    with untouched(model), pytest.raises(AdapterError, match="activate adapters with train_also"):
        randlora.activate(model, ["a", "b"])


def test_what_is_not_merged_is_not_left_out_of_a_saved_model() -> None:
    model = with_three(Mixed())
    randlora.merge(model, adapters=["a", "c"], reversible=True)
    with untouched(model), pytest.raises(MergeError, match="b is active and not merged, as others are"):
        randlora.merged_tensors(model)
    randlora.merge(model, reversible=True)
    assert {name for name, _ in randlora.merged_tensors(model)} == {*Mixed().state_dict()}


def test_a_call_that_makes_no_sense_is_refused() -> None:
    model = with_three(Mixed())
    randlora.inject(model, r=3, name="idle")
    calls: list[tuple[Any, dict[str, Any], str]] = [
        ("x", {}, "no adapter named 'x'"),
        ([3], {}, "no adapter named 3"),
        ([[]], {}, r"no adapter named \[\]"),
        (3, {}, "no adapter named 3"),
        ([], {}, "adapters is empty"),
        ("idle", {}, "'idle' is not active"),
        ("a", {"reversible": False}, "b, c, idle would be lost: save and remove other adapters"),
    ]
    for names, options, message in calls:
        with untouched(model), pytest.raises(MergeError, match=message):
            randlora.merge(model, adapters=names, **{"reversible": True, **options})
    randlora.merge(model, adapters="a", reversible=True)
    with untouched(model), pytest.raises(MergeError, match="'a' is merged already"):
        randlora.merge(model, adapters=["a", "b"], reversible=True)
    with untouched(model), pytest.raises(MergeError, match="'b' is not merged: a is"):
        randlora.unmerge(model, ["a", "b"])
    with untouched(model), pytest.raises(MergeError, match=r"\[\] is not merged: a is"):
        randlora.unmerge(model, [[]])  # type: ignore[list-item]
    for verb in (randlora.disabled, lambda model: randlora.serving.routed(model, ["b"])):
        with untouched(model), pytest.raises(AdapterError, match="while the adapters are merged"), verb(model):
            pass
    diagonal = model.get_submodule("q.randlora_lambda").get_parameter("b")
    with torch.no_grad():
        kept = diagonal.clone()
        diagonal.fill_(float("nan"))
        with untouched(model), pytest.raises(MergeError, match="would not be finite"):
            randlora.merge(model, adapters="b", reversible=True)
        diagonal.copy_(kept)
    randlora.merge(model, adapters=["b", "c"], reversible=True)
    with untouched(model), pytest.raises(MergeError, match="merged already"):
        randlora.merge(model, reversible=True)

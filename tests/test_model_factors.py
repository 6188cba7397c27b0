"""Adapters that act in some layers only, or with another factor in each."""

from typing import Any

import pytest
import torch
from torch import nn

import randlora
from randlora.errors import AdapterError, MergeError
from randlora.integrations.transformers import Reference
from tests.kit import all_bits, assert_unchanged, fill, same_bits, snapshot, untouched
from tests.laws import TOKENS, Mixed, assert_close
from tests.layer_kinds import LayerKind, every_mergeable_kind

BY_LAYER = {"0": -0.7, "1": 0.0, "2": 1.0}


def mixed(*names: str) -> Mixed:
    model = Mixed()
    for seed, name in enumerate(names or ["a"]):
        randlora.inject(model, r=3, name=name, targets=["q", "up", "down"], seed=seed, stream="portable")
        fill(model, name, seed=seed)
    return model


def weights(model: nn.Module) -> dict[str, Any]:
    """Take down the values that the model computes with, without Λ and Γ."""
    return all_bits({fqn: value for fqn, value in model.named_parameters() if "randlora" not in fqn})


@every_mergeable_kind
def test_a_layer_computes_what_it_does_if_all_have_its_factor(kind: LayerKind) -> None:
    dtype = kind.dtypes[-1]
    model = nn.Sequential(*(kind.build(9, 9, True, dtype) for _ in BY_LAYER))
    for seed, name in enumerate("ab"):
        randlora.inject(model, r=3, name=name, targets=[*BY_LAYER], stream="portable", seed=seed)
        fill(model, name, seed=seed)
    x = torch.randn(5, 9).to(dtype)
    expected: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for fqn, factor in BY_LAYER.items():
        randlora.activate(model, {"b": 0.3} | ({"a": factor} if factor else {}))
        expected[fqn] = model.get_submodule(fqn)(x)
        with randlora.merged(model):
            merged |= {own: value for own, value in weights(model).items() if own.startswith(fqn)}
    randlora.activate(model, {"b": 0.3, "a": BY_LAYER})
    before = snapshot(model)
    for fqn, output in expected.items():
        assert same_bits(model.get_submodule(fqn)(x), output)
    randlora.merge(model, reversible=True)
    assert weights(model) == merged
    randlora.unmerge(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("layers", ["q|up", ["q", "up"], ("up", "q.?")])
def test_layers_are_named_by_patterns(layers: Any) -> None:
    model = mixed("a", "b")
    randlora.inject(model, r=3, name="wide", targets=["q", "head"], active=False)
    randlora.activate(model, {"a": 0.5, "b": {"up": 2.0, ".*": 0.25}, "wide": 1}, layers=layers)
    assert {info.name: info.weight for info in randlora.adapters(model)} == {
        "a": {"q": 0.5, "up": 0.5, "down": 0.0},
        "b": {"q": 0.25, "up": 2.0, "down": 0.0},
        "wide": {"q": 1.0, "head": 0.0},
    }
    deltas = {fqn: randlora.delta_weight(model, fqn) for fqn in ("up", "down")}
    a, b = (randlora.delta_weight(model, "up", name=name) for name in "ab")
    assert not deltas["down"].any()
    assert_close(deltas["up"], 0.5 * a + 2 * b, torch.float32)
    randlora.activate(model, {"a": {"up": 0.5, ".*": 0.5}})
    assert randlora.adapters(model)[0].weight == 0.5
    randlora.activate(model, "a", layers=".*")
    assert randlora.adapters(model)[0].weight == 1.0


def test_parameters_trained_beside_have_no_factor_and_a_layer_that_is_left_out_is_not_trained() -> None:
    model = Mixed()
    randlora.inject(model, r=3, name="a", targets=["q", "up"], train_also=["q.bias"])
    copied = fill(model, "a").q.bias
    randlora.activate(model, "a", layers=["up"])
    assert model.q.bias is copied
    assert same_bits(dict(randlora.merged_tensors(model))["q.bias"], copied)
    model(TOKENS).square().sum().backward()
    trained = {fqn for fqn, each in model.named_parameters() if each.grad is not None}
    assert trained == {"up.randlora_lambda.a", "up.randlora_gamma.a", "q.bias"}
    model.q.weight = nn.Parameter(torch.empty_like(model.q.weight, device="meta"), requires_grad=False)
    with pytest.raises(MergeError, match=r"q\.weight"):
        randlora.merged_tensors(model)


@pytest.mark.parametrize(
    ("names", "layers", "message"),
    [
        ("a", "(", "layers: '\\(' is neither the name of a target nor a regular expression"),
        ("a", [], "layers is empty"),
        ("a", {"q": 0.5}, "layers takes only names: give numbers as factors"),
        (["a", "elsewhere"], ["dwon"], "^cannot activate: layers: 'dwon' matches no target; the nearest.* down"),
        ("a", ["q", None], "expected layers to be names or patterns of layers, got None"),
        (["a", "elsewhere"], ["q"], "'elsewhere' adapts none of the layers that layers= names: leave it out"),
        ({"a": {"q": 0.5}}, None, r"names\['a'\]= has no pattern for up, down: add '\.\*' as the last"),
        ({"a": {"dwon": 0.5, ".*": 1.0}}, None, r"names\['a'\]={'dwon': …} matches no target"),
        ({"a": {".*": 0.5, "q": 1.0}}, None, "matches only what '.*' took: put it before"),
        ({"a": {".*": float("inf")}}, None, r"the factor of 'a' in '\.\*' must be a finite number, got inf"),
        ({"a": {1: 1.0}}, None, "the factor of 'a' must have patterns of layers as keys, got 1"),
        ({"a": {}}, None, r"names\['a'\]= has no pattern for q, up, down"),
    ],
)
def test_what_names_no_layers_is_refused(names: Any, layers: Any, message: str) -> None:
    model = mixed()
    randlora.inject(model, r=3, name="elsewhere", targets=["head"], active=False)
    with untouched(model), pytest.raises(AdapterError, match=message):
        randlora.activate(model, names, layers=layers)


def test_a_layer_that_is_left_out_is_not_merged_into() -> None:
    model = mixed("a", "b")
    randlora.activate(model, {"a": {"q": 0.5, ".*": 0.0}, "b": {"q": 0.0, ".*": 1.0}})
    before, held = snapshot(model), dict(model.named_parameters())

    def changed() -> list[str]:
        return [fqn for fqn, each in model.named_parameters() if each is not held[fqn]]

    assert randlora.merge(model, adapters=["a"], reversible=True).targets == ("q",)
    assert changed() == ["q.weight"]
    for other in (1.0, {"q": 0.5, ".*": 1.0}):
        with untouched(model), pytest.raises(AdapterError, match="cannot activate others while the adapters"):
            randlora.activate(model, {"a": other, "b": 1.0})
    with pytest.raises(MergeError, match="b is active and not merged"):
        next(iter(randlora.merged_tensors(model)))
    report = randlora.merge(model, adapters=["b"], reversible=True)
    assert report.targets == ("up", "down")
    assert str(report).startswith("merged b with a factor for each layer (2 of 3 are not 0) into 2 layers")
    assert randlora.unmerge(model, ["a"]) == ("q",)
    assert changed() == ["up.weight", "down.weight"]
    randlora.unmerge(model)
    assert_unchanged(model, before)


def test_a_layer_that_was_away_follows_when_it_is_back() -> None:
    model = mixed()
    up = model.up
    model.up = nn.Identity()  # type: ignore[assignment]
    randlora.activate(model, {"a": {"q": 1.0, ".*": 0.0}})
    model.up = up
    found = model(TOKENS)
    randlora.activate(model, "a", layers=["q"])
    assert same_bits(model(TOKENS), found)


def test_a_reference_leaves_the_layers_of_others_as_they_are() -> None:
    model = mixed("sft", "dpo")
    by_layer = {"sft": {"q": 0.5, "up": 0.0, "down": 1.0}, "dpo": {"q": 0.0, "up": 1.0, "down": 1.0}}
    randlora.activate(model, {"sft": by_layer["sft"]})
    alone = model(TOKENS)
    randlora.activate(model, by_layer)
    both = model(TOKENS)
    assert same_bits(Reference(lambda: model, ["dpo"])(TOKENS), alone)
    assert {info.name: info.weight for info in randlora.adapters(model)} == by_layer
    assert same_bits(model(TOKENS), both)

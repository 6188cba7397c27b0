"""Adapters that act in some layers only, or with another factor in each."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import randlora
from randlora.errors import AdapterError, MergeError
from randlora.integrations.transformers import Reference
from tests.kit import all_bits, assert_unchanged, bits, fill, same_bits, snapshot, untouched
from tests.laws import TOKENS, Mixed, assert_close
from tests.layer_kinds import LayerKind, every_mergeable_kind_and_dtype
from tests.read_kinds import ReadKind, every_read_kind

BY_LAYER = {"0": -0.7, "1": 0.0, "2": 1.0}


def mixed(*names: str) -> nn.Module:
    model = Mixed()
    for seed, name in enumerate(names or ["a"]):
        randlora.inject(model, r=3, name=name, targets=["q", "up", "down"], seed=seed, stream="portable")
        fill(model, name, seed=seed)
    return model


def weights(model: nn.Module) -> dict[str, Any]:
    """Take down the values that the model computes with, without Λ and Γ."""
    return all_bits({fqn: value for fqn, value in model.named_parameters() if "randlora" not in fqn})


@every_mergeable_kind_and_dtype
def test_a_layer_computes_what_it_does_if_all_have_its_factor(kind: LayerKind, dtype: torch.dtype) -> None:
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


@every_read_kind
def test_a_weight_that_is_read_is_the_one_with_its_factor(kind: ReadKind) -> None:
    dtype = kind.dtypes[0]
    model = nn.Sequential(kind.model(dtype)[0], nn.Linear(3, 3, dtype=dtype))
    options = kind.adapter_options
    randlora.inject(model, name="a", **{**options, "targets": [*options["targets"], "1"]})
    fill(model, "a")

    def found(factor: Any) -> tuple[Any, ...]:
        randlora.activate(model, {"a": factor})
        output = kind.run(nn.Sequential(model[0]), dtype)
        delta = randlora.delta_weight(model, kind.target)
        with randlora.merged(model):
            return bits(output), bits(delta), bits(model.get_parameter(kind.parameter_fqn))

    with randlora.disabled(model):
        plain = kind.run(nn.Sequential(model[0]), dtype)
        weight = bits(model.get_parameter(kind.parameter_fqn))
    assert found({kind.target: 0.4, ".*": -2.0}) == found(0.4)
    output, delta, merged = found({kind.target: 0.0, ".*": -2.0})
    assert output == bits(plain)
    assert merged == weight
    assert delta != found(0.4)[1]


@pytest.mark.parametrize("layers", ["q|up", ["q", "up"], ["q", "u."], ("up", "q")])
def test_layers_are_named_by_patterns(layers: Any) -> None:
    model = mixed("a", "b")
    randlora.activate(model, {"a": 0.5, "b": {"up": 2.0, ".*": 0.25}}, layers=layers)
    assert {info.name: info.weight for info in randlora.adapters(model)} == {
        "a": {"q": 0.5, "up": 0.5, "down": 0.0},
        "b": {"q": 0.25, "up": 2.0, "down": 0.0},
    }
    deltas = {fqn: randlora.delta_weight(model, fqn) for fqn in ("q", "up", "down")}
    own = {(fqn, name): randlora.delta_weight(model, fqn, name=name) for fqn in deltas for name in "ab"}
    assert not deltas["down"].any()
    assert_close(deltas["q"], 0.5 * own["q", "a"] + 0.25 * own["q", "b"], torch.float32)
    assert_close(deltas["up"], 0.5 * own["up", "a"] + 2 * own["up", "b"], torch.float32)


@pytest.mark.parametrize("zero", [0.0, {".*": 0}, {"q": -0.0, ".*": 0.0}])
def test_an_adapter_with_the_factor_0_in_all_layers_does_not_act(zero: Any) -> None:
    model, plain = mixed(), Mixed()
    plain.load_state_dict(model.state_dict(), strict=False)
    randlora.activate(model, {"a": zero})
    randlora.set_trainable(model, "a")
    output = model(TOKENS)
    assert same_bits(output, plain(TOKENS))
    assert not output.requires_grad
    assert randlora.adapters(model)[0].is_active
    with untouched(model):
        assert randlora.merge(model, reversible=True).targets == ()
        assert all_bits(dict(randlora.merged_tensors(model))) == all_bits(plain.state_dict())
        randlora.unmerge(model)
    assert randlora.merge(model).targets == ()
    assert all_bits(model.state_dict()) == all_bits(plain.state_dict())


def test_what_is_returned_is_a_copy() -> None:
    model = mixed("a", "b")
    randlora.activate(model, {"a": {"q": 0.5, ".*": 1.0}})
    wanted, delta = model(TOKENS), randlora.delta_weight(model, "q")
    report = randlora.merge(model, reversible=True)
    found: Any = randlora.adapters(model)[0].weight
    found["down"] = report.adapters["a"]["q"] = 0.0  # type: ignore[index]
    with pytest.raises(AdapterError, match="cannot activate others while the adapters are merged"):
        randlora.activate(model, {"a": found, "b": 1.0})
    randlora.unmerge(model)
    assert same_bits(model(TOKENS), wanted)
    assert same_bits(randlora.delta_weight(model, "q"), delta)


def test_parameters_trained_beside_have_no_factor() -> None:
    model = Mixed()
    randlora.inject(model, r=3, name="a", targets=["q", "up"], train_also=["q.bias"])
    with torch.no_grad():
        model.q.bias.add_(1.0)
    copied = model.q.bias
    randlora.activate(model, "a", layers=["up"])
    assert model.q.bias is copied
    assert same_bits(dict(randlora.merged_tensors(model))["q.bias"], copied)


def test_a_value_that_is_not_here_is_missed_in_a_layer_that_is_left_out() -> None:
    model: Any = mixed()
    randlora.activate(model, "a", layers=["q"])
    model.up.weight = nn.Parameter(torch.empty_like(model.up.weight, device="meta"), requires_grad=False)
    with pytest.raises(MergeError, match=r"up\.weight"):
        randlora.merged_tensors(model)


def test_one_factor_for_all_layers_is_a_number() -> None:
    model = mixed()
    randlora.activate(model, {"a": {"up": 0.5, ".*": 0.5}})
    assert randlora.adapters(model)[0].weight == 0.5
    randlora.activate(model, "a", layers=".*")
    assert randlora.adapters(model)[0].weight == 1.0


@pytest.mark.parametrize(
    ("names", "layers", "message"),
    [
        ("a", ["dwon"], r"layers: 'dwon' matches no target; the nearest names are down"),
        ("a", "(", "layers: '\\(' is neither the name of a target nor a regular expression"),
        ("a", [], "layers is empty"),
        ("a", {"q": 0.5}, "layers takes only names: give numbers as factors"),
        (
            ["a", "elsewhere"],
            ["dwon"],
            "^cannot activate: layers: 'dwon' matches no target; the nearest.* down",
        ),
        ("a", 3, "expected layers to be names or patterns of layers, got 3"),
        ("a", ["q", None], "expected layers to be names or patterns of layers, got None"),
        (["a", "elsewhere"], ["q"], "'elsewhere' adapts none of the layers that layers= names: leave it out"),
        ({"a": {"q": 0.5}}, None, r"names\['a'\]= has no pattern for up, down: add '\.\*' as the last"),
        ({"a": {"dwon": 0.5, ".*": 1.0}}, None, r"names\['a'\]={'dwon': …} matches no target"),
        ({"a": {".*": 0.5, "q": 1.0}}, None, "matches only what '.*' took: put it before"),
        ({"a": {".*": float("inf")}}, None, r"the factor of 'a' in '\.\*' must be a finite number, got inf"),
        ({"a": {".*": "1"}}, None, r"the factor of 'a' in '\.\*' must be a finite number"),
        ({"a": {1: 1.0}}, None, "the factor of 'a' must have patterns of layers as keys, got 1"),
        ({"a": {}}, None, r"names\['a'\]= has no pattern for q, up, down"),
    ],
)
def test_what_names_no_layers_is_refused(names: Any, layers: Any, message: str) -> None:
    model = mixed()
    randlora.inject(model, r=3, name="elsewhere", targets=["head"], active=False)
    with untouched(model), pytest.raises(AdapterError, match=message):
        randlora.activate(model, names, layers=layers)


def test_a_layer_of_some_of_the_adapters_is_named() -> None:
    model = mixed()
    randlora.inject(model, r=3, name="wide", targets=["q", "head"], active=False)
    randlora.activate(model, ["a", "wide"], layers=["q", "head"])
    assert [info.weight for info in randlora.adapters(model)] == [
        {"q": 1.0, "up": 0.0, "down": 0.0},
        1.0,
    ]


def test_a_layer_that_is_left_out_is_not_trained() -> None:
    model = mixed()
    randlora.activate(model, "a", layers=["q"])
    randlora.set_trainable(model, "a")
    model(TOKENS).square().sum().backward()
    assert {fqn for fqn, each in model.named_parameters() if each.grad is not None} == {
        "q.randlora_lambda.a",
        "q.randlora_gamma.a",
    }


def test_a_layer_that_is_left_out_is_not_merged_into() -> None:
    model = mixed("a", "b")
    randlora.activate(model, {"a": {"q": 0.5, ".*": 0.0}, "b": {"q": 0.0, ".*": 1.0}})
    before, held = snapshot(model), dict(model.named_parameters())
    assert randlora.merge(model, adapters=["a"], reversible=True).targets == ("q",)
    assert [fqn for fqn, each in model.named_parameters() if each is not held[fqn]] == ["q.weight"]
    report = randlora.merge(model, adapters=["b"], reversible=True)
    assert report.targets == ("up", "down")
    assert str(report).startswith("merged b with a factor for each layer (2 of 3 are not 0) into 2 layers")
    assert randlora.unmerge(model, ["a"]) == ("q",)
    assert [fqn for fqn, each in model.named_parameters() if each is not held[fqn]] == ["up.weight", "down.weight"]
    randlora.unmerge(model)
    assert_unchanged(model, before)


def test_what_is_merged_keeps_its_layers() -> None:
    model = mixed("a", "b")
    by_layer = {"q": 0.5, "up": 0.0, "down": 1.0}
    randlora.activate(model, {"a": by_layer})
    randlora.merge(model, reversible=True)
    for other in (1.0, {"q": 0.5, ".*": 1.0}):
        with (
            untouched(model),
            pytest.raises(AdapterError, match="cannot activate others while the adapters"),
        ):
            randlora.activate(model, {"a": other, "b": 1.0})
    randlora.activate(model, {"a": by_layer, "b": {"up": 1.0, ".*": 0.0}})
    merged = dict(randlora.merged_tensors(randlora_merged_copy(model)))
    with pytest.raises(MergeError, match="b is active and not merged"):
        next(iter(randlora.merged_tensors(model)))
    randlora.merge(model, reversible=True)
    assert all_bits(dict(randlora.merged_tensors(model))) == all_bits(merged)


def randlora_merged_copy(model: nn.Module) -> nn.Module:
    """Return a copy with nothing merged, of which `merged_tensors` merges all that is active."""
    twin = copy.deepcopy(model)
    randlora.unmerge(twin)
    return twin


@pytest.mark.parametrize("by", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_a_copy_has_the_same_layers_and_none_from_within_disabled(by: Any) -> None:
    model = mixed()
    randlora.activate(model, {"a": {"q": 0.5, ".*": 0.0}})
    twin = by(model)
    assert randlora.adapters(twin) == randlora.adapters(model)
    assert same_bits(twin(TOKENS), model(TOKENS))
    with randlora.disabled(model):
        plain, twin = model(TOKENS), by(model)
    assert same_bits(twin(TOKENS), plain)
    assert [info.weight for info in randlora.adapters(twin)] == [None]
    randlora.activate(twin, {"a": {"q": 0.5, ".*": 0.0}})
    assert same_bits(twin(TOKENS), model(TOKENS))


def test_a_layer_that_was_away_follows_when_it_is_back() -> None:
    model = mixed()
    randlora.activate(model, "a", layers=["q"])
    wanted, up = model(TOKENS), model.up
    randlora.activate(model, "a")
    model.up = nn.Identity()
    randlora.activate(model, {"a": {"q": 1.0, ".*": 0.0}})
    model.up = up
    assert same_bits(model(TOKENS), wanted)


def test_a_routed_row_is_that_of_the_adapter_alone() -> None:
    model = mixed()
    wanted = model(TOKENS)
    randlora.activate(model, {"a": {"q": 0.5, ".*": 0.0}})
    alone = model(TOKENS)
    with randlora.serving.routed(model, ["a", None] * 4 + ["a"]):
        assert_close(model(TOKENS)[::2], wanted[::2], torch.float32)
    assert same_bits(model(TOKENS), alone)


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

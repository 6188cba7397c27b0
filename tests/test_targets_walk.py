"""The walk over a model, why layers cannot be adapted, and patterns over names."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import randlora
from randlora.bases.spec import drawn_dims, sliced_dims
from randlora.config import RandLoRAConfig
from randlora.errors import TargetError
from randlora.targets.match import (
    as_list,
    has_suffix,
    is_regex_of,
    matches,
    nearest_names,
)
from randlora.targets.obstacles import obstacles
from randlora.targets.select import find_targets
from randlora.targets.site import shapes_of
from randlora.targets.walk import Census
from tests.laws import adapter_layer
from tests.walk_models import LINEAR, Model, found

# Walking


names = st.sampled_from(["a", "b", "0"])
trees: st.SearchStrategy[Any] = st.recursive(
    st.none(), lambda inner: st.dictionaries(names, inner, max_size=3), max_leaves=12
)


def build(tree: dict[str, Any] | None) -> nn.Module:
    return nn.Linear(2, 2) if tree is None else nn.ModuleDict({name: build(inner) for name, inner in tree.items()})


@given(trees)
def test_walking_comes_past_every_module_under_its_name_parents_first(tree: Any) -> None:
    model = build(tree)
    named = [(fqn, module) for fqn, module in model.named_modules() if fqn]
    census = Census.of(model)
    assert [(visit.fqn, visit.module) for visit in census.visits] == named
    assert census.adapted == ()


@given(trees.filter(bool))
def test_walking_an_adapted_model_sees_it_as_it_was_before(tree: Any) -> None:
    model = nn.ModuleDict({"top": build(tree), "more": nn.Linear(2, 2), "layer": nn.Linear(2, 2)})
    plain = Census.of(model)
    before = [(visit.fqn, visit.module) for visit in plain.visits]
    parameters = [(held.fqn, id(held.parameter)) for held in plain.parameters]
    randlora.inject(model, r=1, targets="all-linear", exclude="layer")
    census = Census.of(model)
    assert [(visit.fqn, visit.module) for visit in census.visits] == before
    assert [(held.fqn, id(held.parameter)) for held in census.parameters] == parameters
    assert {site.fqn for site in census.adapted} == {
        fqn for fqn, module in before if isinstance(module, nn.Linear) and fqn != "layer"
    }


def test_own_parameters_come_once_for_every_place() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model[1].weight = model[0].bias
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    listed = Census.of(model).parameters
    assert [fqn for fqn, *_ in listed] == ["scale", "0.weight", "0.bias", "1.weight", "1.bias"]
    assert [fqn for fqn, *_ in listed] == [fqn for fqn, _ in model.named_parameters(remove_duplicate=False)]
    assert all(module._parameters[attribute] is parameter for _, module, attribute, parameter in listed)


# Shared and nested layers


@pytest.mark.parametrize("pattern", [["a"], ["inner.b"], "inner.b", ["a", "b"], None], ids=str)
def test_a_layer_used_in_two_places_is_found_by_either_name_and_called_by_its_first(pattern: Any) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "inner": nn.ModuleDict()})
    inner = model["inner"]
    assert isinstance(inner, nn.ModuleDict)
    inner["b"] = model["a"]
    (site,) = find_targets(model, pattern)
    assert (site.fqn, site.owner) == ("a", model["a"])


def test_a_layer_in_a_container_used_in_two_places_is_one_target() -> None:
    block = nn.Sequential(nn.Linear(2, 2))
    (site,) = find_targets(nn.ModuleDict({"a": block, "b": block}))
    assert site.owner is block[0]


def test_a_site_tells_what_adapts_it() -> None:
    model = Model()
    plain = find_targets(model, ["up"])
    assert [site.adapter_layer for site in plain] == [None, None]
    randlora.inject(model, r=2, targets=["up"])
    sites = find_targets(model, ["up", "proj"])
    assert [site.adapter_layer is not None for site in sites] == [False, True, False, True]
    assert [site.owner for site in sites if site.adapter_layer] == [site.owner for site in plain]
    assert adapter_layer(model.get_submodule("layers.0.up")) is sites[1].adapter_layer


# Dims


sides = st.tuples(st.integers(1, 30), st.integers(1, 30))


def linear_model(shapes: list[tuple[int, int]], conv1d: bool) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(Conv1D(out, in_) if conv1d else nn.Linear(in_, out) for out, in_ in shapes))


@given(st.lists(sides, min_size=1, max_size=5), st.booleans())
def test_dims_are_those_that_peft_draws_and_those_that_layers_slice(
    shapes: list[tuple[int, int]], conv1d: bool
) -> None:
    sites = find_targets(linear_model(shapes, conv1d))
    assert [site.shape for site in sites] == shapes
    largest = (0, 0)
    for out, in_ in shapes:  # as PEFT 0.21.2 goes through them
        largest = (max(largest[0], out), max(largest[1], in_))
    drawn, used = drawn_dims(shapes), sliced_dims(shapes)
    assert drawn == (max(largest), min(largest))
    assert used == (max(max(shape) for shape in shapes), max(min(shape) for shape in shapes))
    assert drawn[0] >= used[0]
    assert drawn[1] >= used[1]


# Obstacles


def problems(model: nn.Module, pattern: Any = None) -> list[str]:
    return obstacles(Census.of(model), find_targets(model, pattern), 0.0)


def test_a_plain_model_has_no_obstacles() -> None:
    assert problems(Model(), "all-linear") == []


def tied_parameter() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "up": nn.Linear(3, 4)})
    model["up"].weight = model["embed"].weight
    return model


def tied_storage() -> nn.Module:
    model = tied_parameter()
    weight = model.get_parameter("embed.weight")
    model.get_submodule("up").weight = nn.Parameter(weight.detach())
    assert model.get_parameter("up.weight") is not weight
    return model


def tied_on_meta() -> nn.Module:
    with torch.device("meta"):
        return tied_parameter()


@pytest.mark.parametrize("make", [tied_parameter, tied_storage, tied_on_meta], ids=lambda make: make.__name__)
def test_a_weight_tied_to_another_module_is_refused_and_both_are_named(make: Callable[[], nn.Module]) -> None:
    message = "the weight of up is tied to embed.weight: untie it, or exclude the layer"
    assert problems(make(), ["up"]) == [message]
    with pytest.raises(TargetError, match=re.escape(message)):
        randlora.inject(make(), r=1, targets=["up"])


def test_two_targets_of_one_weight_are_both_refused() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    assert problems(model, ["a", "b"]) == [
        "the weight of a is tied to b.weight: untie it, or exclude the layer",
        "the weight of b is tied to a.weight: untie it, or exclude the layer",
    ]


def test_a_layer_used_in_two_places_is_not_tied_to_itself() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3)})
    model["b"] = model["a"]
    assert problems(model) == []


def test_a_tied_bias_and_tied_weights_outside_the_targets_are_no_obstacle() -> None:
    model = nn.ModuleDict({
        "a": nn.Linear(3, 3),
        "b": nn.Linear(3, 3),
        "x": nn.Embedding(2, 2),
        "y": nn.Embedding(2, 2),
    })
    model["b"].bias = model["a"].bias
    model["y"].weight = model["x"].weight
    assert problems(model) == []


def parametrized() -> nn.Module:
    layer: nn.Module = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    return layer


def computed() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.register_parameter("weight", None)
    return layer


@pytest.mark.parametrize("make", [parametrized, computed], ids=lambda make: make.__name__)
def test_a_layer_that_computes_its_parameters_is_refused(make: Callable[[], nn.Module]) -> None:
    message = "layer computes its weight from other parameters: remove the parametrization first"
    assert problems(nn.ModuleDict({"layer": make()})) == [message]
    with pytest.raises(TargetError, match=message):
        randlora.inject(nn.ModuleDict({"layer": make(), "norm": nn.LayerNorm(3)}), r=1, train_also=["norm"])


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_layer_without_a_shape_is_refused_until_it_has_one() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(TargetError, match="0 has no shape yet: run one forward pass first"):
        randlora.inject(model, r=1)
    model(torch.ones(1, 2))
    assert problems(model) == []


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn], ids=str)
def test_a_weight_of_integers_or_of_bytes_is_refused(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].weight = nn.Parameter(torch.ones(3, 3).to(dtype), requires_grad=False)
    assert problems(model) == [
        f"0 has a weight of {dtype}, expected a floating dtype of 16 bits or more: dequantize it first"
    ]


def test_all_obstacles_are_named_at_once() -> None:
    model = nn.ModuleDict({"a": parametrized(), "b": nn.Linear(3, 3), "embed": nn.Embedding(3, 3)})
    model["b"].weight = model["embed"].weight
    with pytest.raises(TargetError, match="2 problems") as caught:
        randlora.inject(model, r=1, targets=["a", "b"])
    assert "a computes its weight" in str(caught.value)
    assert "the weight of b is tied to embed.weight" in str(caught.value)


# Weights that are elsewhere


def emptied(model: nn.Module) -> nn.Module:
    """Leave every parameter empty with its shape beside it, as DeepSpeed's ZeRO-3 does between forwards."""
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    return model


def test_shapes_are_read_beside_a_weight_that_is_empty() -> None:
    model = nn.Sequential(nn.Linear(7, 3), Conv1D(5, 3))
    expected = shapes_of(find_targets(model), RandLoRAConfig())
    assert expected == {"0": (3, 7), "1": (5, 3)}
    assert shapes_of(find_targets(emptied(model)), RandLoRAConfig()) == expected
    assert all(isinstance(size, int) for shape in expected.values() for size in shape)


def test_empty_weights_are_not_taken_for_tied_ones() -> None:
    assert problems(emptied(nn.Sequential(nn.Linear(7, 3), nn.Linear(3, 3), Conv1D(5, 3)))) == []


def test_a_model_on_the_meta_device_has_the_same_targets() -> None:
    with torch.device("meta"):
        model = Model()
    assert found(model) == LINEAR
    assert problems(model) == []


LAYER = nn.Linear(1, 1)
components = st.lists(st.sampled_from(["q", "proj", "q_proj", "0", "10", "q+"]), min_size=1, max_size=4)


@given(components, components)
def test_a_suffix_is_the_last_whole_components(fqn: list[str], suffix: list[str]) -> None:
    assert has_suffix(".".join(fqn), ".".join(suffix)) == (fqn[-len(suffix) :] == suffix)


@given(components.map(".".join), components.map(".".join))
def test_an_escaped_name_is_the_regex_of_itself_alone(name: str, other: str) -> None:
    assert matches(re.escape(name), other, LAYER) == (name == other)


def test_where_nothing_is_like_it_the_common_names_are_listed() -> None:
    names = ["a.q_proj", "a.v_proj", "b.q_proj"]
    assert nearest_names("xyzzy", [*names, "a", "b"], common=names) == "q_proj, v_proj"
    assert nearest_names("zz.zz", [*names, "a", "b"], common=["b.q_proj"]) == "b.q_proj"


@pytest.mark.parametrize(("entry", "expected"), [(".*q_proj", True), ("q_proj", False), ("(", False), ("*", False)])
def test_a_name_that_is_a_regex_of_something_is_told(entry: str, expected: bool) -> None:
    assert is_regex_of(entry, ["a.q_proj", "b.q_proj"]) is expected


def test_nearest_names_are_at_most_five_and_alike_if_any_is() -> None:
    assert nearest_names("gate", ["zzzz", "gxxe"]) == "gxxe"
    assert len(nearest_names("layer.1", [f"layer.{index}" for index in range(20)]).split(", ")) == 5


paths = components.map(".".join)


@given(paths | st.text(max_size=6), st.lists(paths, max_size=8))
def test_nearest_names_exist_and_are_never_what_was_written(entry: str, fqns: list[str]) -> None:
    near = nearest_names(entry, fqns)
    names = near.split(", ") if near else []
    assert all(any(has_suffix(fqn, name) for fqn in fqns) for name in names)
    assert entry not in names
    assert bool(names) == bool(set(fqns) - {entry})


@given(st.lists(paths, min_size=1, max_size=4), st.sampled_from(["|", ",", ", ", " "]), st.data())
def test_names_joined_in_a_string_are_taken_for_a_list_where_all_of_them_are_there(
    fqns: list[str], separator: str, data: st.DataObject
) -> None:
    names = [".".join(fqn.split(".")[-data.draw(st.integers(1, 4)) :]) for fqn in fqns]
    assert as_list(separator.join(names), fqns) == json.dumps(names)
    assert as_list(separator.join(name.replace(".", "\\.") for name in names), fqns) == json.dumps(names)
    assert as_list(separator.join([*names, "unheard-of"]), fqns) is None

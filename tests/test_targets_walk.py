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
from randlora.targets.census import Census, shapes_of
from randlora.targets.match import as_list, has_suffix, matches, nearest_names
from randlora.targets.obstacles import obstacles
from randlora.targets.select import find_targets
from tests.walk_models import LINEAR, Model, found

names = st.sampled_from(["a", "b", "0"])
trees: st.SearchStrategy[Any] = st.recursive(
    st.none(), lambda inner: st.dictionaries(names, inner, max_size=3), max_leaves=12
)


def build(tree: dict[str, Any] | None) -> nn.Module:
    return nn.Linear(2, 2) if tree is None else nn.ModuleDict({name: build(inner) for name, inner in tree.items()})


@given(trees.filter(bool))
def test_a_walk_comes_past_every_module_under_its_name_and_sees_an_adapted_model_as_it_was(tree: Any) -> None:
    model = nn.ModuleDict({"top": build(tree), "more": nn.Linear(2, 2), "layer": nn.Linear(2, 2)})
    named = [(fqn, module) for fqn, module in model.named_modules() if fqn]
    plain = Census.of(model)
    assert [(visit.fqn, visit.module) for visit in plain.visits] == named
    assert plain.adapted == ()
    parameters = [(held.fqn, id(held.parameter)) for held in plain.parameters]
    randlora.inject(model, r=1, targets="all-linear", exclude="layer")
    census = Census.of(model)
    assert [(visit.fqn, visit.module) for visit in census.visits] == named
    assert [(held.fqn, id(held.parameter)) for held in census.parameters] == parameters
    linear = {fqn for fqn, module in named if isinstance(module, nn.Linear)}
    assert {site.fqn for site in census.adapted} == linear - {"layer"}
    assert {site.fqn for site in find_targets(model, "all-linear") if site.adapter_layer} == linear - {"layer"}


def test_own_parameters_come_once_for_every_place() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model[1].weight = model[0].bias
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    listed = Census.of(model).parameters
    assert [fqn for fqn, *_ in listed] == ["scale", "0.weight", "0.bias", "1.weight", "1.bias"]
    assert [fqn for fqn, *_ in listed] == [fqn for fqn, _ in model.named_parameters(remove_duplicate=False)]
    assert all(module._parameters[attribute] is parameter for _, module, attribute, parameter in listed)


def test_a_layer_in_a_container_used_in_two_places_is_one_target_and_not_tied_to_itself() -> None:
    block = nn.Sequential(nn.Linear(2, 2))
    model = nn.ModuleDict({"a": block, "b": block})
    (site,) = find_targets(model)
    assert site.owner is block[0]
    assert problems(model) == []


sides = st.tuples(st.integers(1, 30), st.integers(1, 30))


@given(st.lists(sides, min_size=1, max_size=5), st.booleans())
def test_dims_are_those_that_peft_draws_and_those_that_layers_slice(
    shapes: list[tuple[int, int]], conv1d: bool
) -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(Conv1D(out, in_) if conv1d else nn.Linear(in_, out) for out, in_ in shapes))
    assert [site.shape for site in find_targets(model)] == shapes
    largest = (0, 0)
    for out, in_ in shapes:  # as PEFT 0.21.2 goes through them
        largest = (max(largest[0], out), max(largest[1], in_))
    assert drawn_dims(shapes) == (max(largest), min(largest))
    assert sliced_dims(shapes) == (max(max(shape) for shape in shapes), max(min(shape) for shape in shapes))


# Obstacles


def problems(model: nn.Module, pattern: Any = None) -> list[str]:
    return obstacles(Census.of(model), find_targets(model, pattern), 0.0)


def tied_parameter() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "up": nn.Linear(3, 4)})
    model["up"].weight = model["embed"].weight
    return model


def tied_storage() -> nn.Module:
    model = tied_parameter()
    model.get_submodule("up").weight = nn.Parameter(model.get_parameter("embed.weight").detach())
    return model


def tied_on_meta() -> nn.Module:
    with torch.device("meta"):
        return tied_parameter()


def normed() -> nn.Module:
    return nn.ModuleDict({"up": torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))})


def without_a_weight() -> nn.Module:
    model = nn.ModuleDict({"up": nn.Linear(3, 3)})
    model.get_submodule("up").register_parameter("weight", None)
    return model


def lazy() -> nn.Module:
    return nn.ModuleDict({"up": nn.LazyLinear(3)})


def of_dtype(dtype: torch.dtype) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = nn.ModuleDict({"up": nn.Linear(3, 3)})
        model.get_submodule("up").weight = nn.Parameter(torch.ones(3, 3).to(dtype), requires_grad=False)
        return model

    return make


TIED = "the weight of up is tied to embed.weight: untie it, or exclude the layer"
COMPUTED = "up computes its weight from other parameters: remove the parametrization first"


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tied_parameter, TIED),
        (tied_storage, TIED),
        (tied_on_meta, TIED),
        (normed, COMPUTED),
        (without_a_weight, COMPUTED),
        (lazy, "up has no shape yet: run one forward pass first"),
        (of_dtype(torch.int8), "up has a weight of torch.int8, expected a floating dtype of 16 bits or more: dequ"),
        (of_dtype(torch.float8_e4m3fn), "up has a weight of torch.float8_e4m3fn, expected a floating dtype of 16 bits"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_weight_that_cannot_be_adapted_is_refused_with_the_reason(
    make: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(TargetError, match=re.escape(message)):
        randlora.inject(make(), r=1, targets=["up"])


def test_all_obstacles_are_named_at_once_and_of_two_targets_of_one_weight_both() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": normed()["up"]})  # type: ignore[index]
    model["b"].weight = model["a"].weight
    with pytest.raises(TargetError, match="3 problems") as caught:
        randlora.inject(model, r=1, targets=[*"abc"])
    for said in ("weight of a is tied to b.weight", "weight of b is tied to a.weight", "c computes its weight"):
        assert said in str(caught.value)


def test_a_tied_bias_tied_weights_outside_the_targets_and_models_on_meta_are_no_obstacle() -> None:
    model = nn.ModuleDict({name: nn.Linear(3, 3) for name in "ab"} | {name: nn.Embedding(2, 2) for name in "xy"})
    model["b"].bias = model["a"].bias
    model["y"].weight = model["x"].weight
    assert problems(model) == []
    with torch.device("meta"):
        meta = Model()
    assert found(meta) == LINEAR
    assert problems(meta) == []


def test_shapes_are_read_beside_weights_that_are_empty_as_between_forwards_of_zero_3() -> None:
    model = nn.Sequential(nn.Linear(7, 3), nn.Linear(3, 3), Conv1D(5, 3))
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    assert shapes_of(find_targets(model), RandLoRAConfig()) == {"0": (3, 7), "1": (3, 3), "2": (5, 3)}
    assert problems(model) == []  # they are not taken for tied ones


# Names

LAYER = nn.Linear(1, 1)
components = st.lists(st.sampled_from(["q", "proj", "q_proj", "0", "10", "q+"]), min_size=1, max_size=4)
paths = components.map(".".join)


@given(components, components)
def test_a_suffix_is_the_last_whole_components_and_an_escaped_name_the_regex_of_itself(
    fqn: list[str], suffix: list[str]
) -> None:
    name, other = ".".join(fqn), ".".join(suffix)
    assert has_suffix(name, other) == (fqn[-len(suffix) :] == suffix)
    assert matches(re.escape(name), other, LAYER) == (name == other)


def test_nearest_names_are_at_most_five_and_alike_if_any_is_else_the_common_ones() -> None:
    names = ["a.q_proj", "a.v_proj", "b.q_proj"]
    assert nearest_names("xyzzy", [*names, "a", "b"], common=names) == "q_proj, v_proj"
    assert nearest_names("zz.zz", [*names, "a", "b"], common=["b.q_proj"]) == "b.q_proj"
    assert nearest_names("gate", ["zzzz", "gxxe"]) == "gxxe"
    assert len(nearest_names("layer.1", [f"layer.{index}" for index in range(20)]).split(", ")) == 5


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

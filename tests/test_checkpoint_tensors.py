"""The names of an adapter's tensors: different ones for different tensors, and whatever `save` wrote, `load` reads."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import randlora
from randlora.checkpoint.tensors import MODEL_PREFIX, TOP_BASIS_A, TOP_BASIS_B, trained_fqn, trained_key, value_keys
from randlora.disk.tensor_file import LONGEST_NAME
from randlora.errors import AdapterError, CheckpointError, ConfigError, RandLoRAError, TargetError
from randlora.targets.walk import is_part
from tests.kit import adapter_values, all_bits, fill, untouched
from tests.layer_kinds import LAYER_KINDS, LayerKind, every_kind
from tests.read_kinds import READ_KINDS, ReadKind, every_read_kind

NAMES = (
    "base_layer", "randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B", "randlora", "randlora_state",
    "model", "base_model", "default", "weight", "bias", "x", "0", "r2", "é", "a b", "x/y", "\n", "`|`", "\ud800",
    "__metadata__", "modules_to_save", "original_module", "lora_A",
)  # fmt: skip
names = st.one_of(
    st.just("base_layer"),
    st.sampled_from(NAMES),
    st.text(st.characters(exclude_characters="."), min_size=1, max_size=3),
)
paths = st.lists(st.sampled_from(["base_layer", "x", "randlora_lambda"]), min_size=1, max_size=4).map(".".join)


@settings(max_examples=500)
@given(st.sets(paths, max_size=4), st.sets(paths, max_size=6))
@example({"x"}, {"x.x", "x.base_layer.x"})
@example({"x", "x.base_layer"}, {"x.base_layer.x", "x.base_layer.base_layer.x", "x.base_layer"})
def test_keys_are_one_to_one_whatever_the_names(targets: set[str], parameters: set[str]) -> None:
    """Where a target has no child or parameter of the names of Λ and Γ, which `inject` refuses."""
    taken = {f"{fqn}.{name}" for fqn in targets for name in ("randlora_lambda", "randlora_gamma")}
    parameters -= {fqn for fqn in parameters if any(f"{fqn}.".startswith(f"{path}.") for path in taken)}
    targets -= {fqn for fqn in targets if any(f"{fqn}.".startswith(f"{path}.") for path in taken)}
    keys = [key for fqn in targets for key in value_keys(fqn, targets)]
    keys += [trained_key(fqn, targets) for fqn in parameters]
    assert len(set(keys)) == len(keys)
    assert {TOP_BASIS_A, TOP_BASIS_B}.isdisjoint(keys)
    assert all(trained_fqn(trained_key(fqn, targets), targets) == fqn for fqn in parameters)


@pytest.mark.parametrize(
    ("key", "fqn"),
    [
        ("q.base_layer.bias", "q.bias"),
        ("q.base_layer.child.bias", "q.child.bias"),  # as PEFT writes it
        ("q.child.bias", "q.child.bias"),  # as we do
        ("q.base_layer.base_layer.bias", "q.base_layer.bias"),
        ("k.base_layer.bias", "k.base_layer.bias"),
    ],
)
def test_a_child_of_a_layer_goes_by_the_name_that_peft_gives_it_too(key: str, fqn: str) -> None:
    assert trained_fqn(MODEL_PREFIX + key, {"q"}) == fqn


class Odd(nn.Linear):
    """A linear layer with parameters and children of its own, which it does not use."""

    def __init__(self, parameters: list[str], children: Mapping[str, nn.Module]) -> None:
        super().__init__(3, 4)
        for name in parameters:
            self.register_parameter(name, nn.Parameter(torch.randn(2)))
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the output of a linear layer, whatever its attributes are called."""
        return nn.functional.linear(input, self.weight, self.bias)


@st.composite
def odd_layers(draw: st.DrawFn, depth: int = 2) -> Odd:
    taken = dir(nn.Linear(1, 1))
    free = names.filter(lambda name: name not in taken)
    parameters = draw(st.lists(free, max_size=2, unique=True))
    inside = free.filter(lambda name: name not in parameters)
    children = {name: draw(odd_layers(depth - 1)) for name in draw(st.lists(inside, max_size=depth, unique=True))}
    return Odd(parameters, children)


def held_by(model: nn.Module, fqn: str) -> set[str]:
    """Return the names of a module's own children and parameters."""
    module = model.get_submodule(fqn)
    return {*module._modules, *module._parameters}


def exactly(fqns: list[str]) -> str:
    return "|".join(map(re.escape, fqns))


@pytest.mark.medium
@settings(max_examples=75)
@given(st.dictionaries(names.filter(lambda name: name not in dir(nn.Module())), odd_layers(), min_size=1, max_size=2),
       st.randoms(use_true_random=False))  # fmt: skip
def test_an_adapter_of_a_model_of_any_names_is_refused_or_comes_back_as_it_was(
    layers: dict[str, Odd], random: object
) -> None:
    model = nn.Module()
    for name, layer in layers.items():
        model.add_module(name, layer)
    modules = [fqn for fqn, _ in model.named_modules() if fqn]
    targets = random.sample(modules, random.randint(1, len(modules)))  # type: ignore[attr-defined]
    free = [fqn for fqn, _ in model.named_parameters() if fqn.removesuffix(".weight") not in targets]
    also = random.sample(free, random.randint(0, len(free)))  # type: ignore[attr-defined]
    is_text = all(fqn.encode(errors="replace").decode() == fqn for fqn in (*targets, *also))
    hidden = {"randlora", "randlora_lambda", "randlora_gamma"}
    is_hiding = "randlora_state" in layers or any(not hidden.isdisjoint(held_by(model, fqn)) for fqn in targets)
    if is_hiding or any(map(is_part, targets)):
        with untouched(model), pytest.raises((AdapterError, TargetError), match=r"of its own|a part of another"):
            randlora.inject(model, r=2, targets=exactly(targets), train_also=exactly(also) if also else None)
        return
    randlora.inject(model, r=2, targets=exactly(targets), train_also=exactly(also) if also else None)
    own = all_bits(adapter_values(fill(model)))
    with TemporaryDirectory() as place:
        directory = Path(place) / "adapter"
        if not is_text:
            with pytest.raises(CheckpointError, match="is no valid Unicode: rename the module"):
                randlora.save(model, directory)
            assert not directory.exists()
            return
        randlora.save(model, directory)
        randlora.eject(model)
        randlora.load(model, directory)
        assert all_bits(adapter_values(model)) == own
        assert randlora.files.verify(directory).passed


@pytest.mark.parametrize("name", ["randlora", "randlora_lambda", "randlora_gamma"])
@pytest.mark.parametrize("what", ["child", "parameter"])
def test_a_layer_whose_own_attribute_would_be_hidden_is_refused(name: str, what: str) -> None:
    layer = Odd([name], {}) if what == "parameter" else Odd([], {name: nn.Linear(2, 2)})
    model = nn.Sequential(layer)
    with untouched(model), pytest.raises(TargetError, match=f"0 has an attribute {name} of its own"):
        randlora.inject(model, r=2, targets=["0"])


def test_a_model_whose_own_attribute_would_be_hidden_is_refused() -> None:
    model = nn.ModuleDict({"randlora_state": nn.Linear(3, 3), "q": nn.Linear(3, 3)})
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(RandLoRAError, match="has an attribute randlora_state of its own"):
        randlora.inject(model, r=2, targets=["q"])
    assert {name: id(module) for name, module in model.named_modules()} == before


PLACES = "base_layer.randlora_A", "randlora_lambda", "x.base_layer", "default.a b"


def placed(layer: nn.Module, path: str) -> nn.Module:
    """Return a model with a layer at a path, and another layer."""
    *outer, name = path.split(".")
    module: nn.Module = nn.ModuleDict({name: layer})
    for part in reversed(outer):
        module = nn.ModuleDict({part: module})
    module.add_module("beside", nn.Linear(4, 6))
    return module


@every_read_kind
def test_what_was_saved_of_weights_that_are_read_is_loaded_under_any_name(kind: ReadKind, tmp_path: Path) -> None:
    path = PLACES[READ_KINDS.index(kind) % len(PLACES)]
    model = placed(kind.build(), path)
    base = copy.deepcopy(model)
    target, parameter = (f"{path}{fqn.removeprefix('0')}" for fqn in (kind.target, kind.parameter_fqn))
    also = [fqn for fqn, _ in model.named_parameters() if fqn != parameter]
    randlora.inject(model, **{**kind.adapter_options, "targets": [target], "train_also": also})
    assert_comes_back(fill(model), base, tmp_path)


@every_kind
def test_what_was_saved_of_layers_is_loaded_under_any_name(kind: LayerKind, tmp_path: Path) -> None:
    path = PLACES[LAYER_KINDS.index(kind) % len(PLACES)]
    model = placed(kind.build(128, 32, True, kind.exact), path)
    base = copy.deepcopy(model)
    randlora.inject(model, r=4, targets=[path], train_also=[f"{path}.bias", "beside"])
    assert_comes_back(fill(model), base, tmp_path)


def assert_comes_back(model: nn.Module, base: nn.Module, place: Path) -> None:
    own = all_bits(adapter_values(model))
    for name in ("seed", "stored"):
        randlora.save(model, place / name, bases=name)
    assert all(randlora.files.verify(place / name).passed for name in ("seed", "stored"))
    randlora.load(base, place / "stored")
    assert all_bits(adapter_values(base)) == own


def test_a_name_that_a_lora_has_for_something_else_is_refused_there(tmp_path: Path) -> None:
    model = nn.Sequential(Odd([], {"lora_A": nn.Linear(3, 4)}))
    randlora.inject(model, r=2, targets="0", train_also=r"0\.lora_A\.weight")
    randlora.save(fill(model), tmp_path / "own")
    with pytest.raises(ConfigError, match=r"0\.lora_A\.weight would have the name of a factor of an update: rename it"):
        randlora.files.convert(tmp_path / "own", tmp_path / "lora", "lora", tolerance=1.0)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("also", [False, True], ids=["target", "train_also"])
def test_a_name_that_is_too_long_to_be_loaded_is_not_saved(also: bool, tmp_path: Path) -> None:
    name = "long" * 1024
    model = nn.ModuleDict({name: nn.LayerNorm(4) if also else nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    randlora.inject(model, r=2, targets=["other"] if also else [name], train_also=[name] if also else None)
    for verb in (lambda: randlora.save(model, tmp_path / "adapter"), lambda: randlora.adapter_state(model)):
        with (
            untouched(model),
            pytest.raises(CheckpointError, match=r"longlong.*… has a name of 41"),
        ):
            verb()
    assert not (tmp_path / "adapter").exists()


def test_a_name_of_the_greatest_length_is_saved_and_loaded(tmp_path: Path) -> None:
    name = "n" * (LONGEST_NAME - len(value_keys("", ())[0]))
    model = nn.ModuleDict({name: nn.Linear(4, 4)})
    randlora.inject(model, r=2, targets=[name])
    randlora.save(model, tmp_path)
    randlora.load(model, tmp_path, name="again")

"""The names of the tensors, and the types of all that the header and the JSON hold."""

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora.checkpoint.peft_layout import MODEL_PREFIX, trained_fqn, value_keys
from randlora.disk.formats import LONGEST_NAME
from randlora.errors import CheckpointError, ConfigError, RandLoRAError
from randlora.targets.census import PARTS
from tests.checkpoint_files import LINEAR, peft_directory, read_fields
from tests.fuzz.limits import outcome
from tests.hostile_files import config, our_adapter, read_facts, write_facts
from tests.kit import adapt, adapter_values, all_bits, untouched
from tests.layer_kinds import LAYER_KINDS, LayerKind, every_kind

HIDDEN = "randlora", "randlora_lambda", "randlora_gamma"
NAMES = (
    "base_layer", *HIDDEN, "randlora_A", "randlora_B", "randlora_state", "model", "base_model", "default", "weight",
    "bias", "x", "0", "r2", "é", "a b", "x/y", "\n", "`|`", "\ud800", "__metadata__", "modules_to_save",
    "original_module", "lora_A",
)  # fmt: skip
texts = st.text(st.characters(exclude_characters="."), min_size=1, max_size=3)
odd_names = st.just("base_layer") | st.sampled_from(NAMES) | texts


class Odd(nn.Linear):
    """A linear layer with parameters and children of its own, which it does not use."""

    def __init__(self, parameters: list[str], children: Mapping[str, nn.Module]) -> None:
        super().__init__(3, 4)
        for name in parameters:
            self.register_parameter(name, nn.Parameter(torch.randn(2)))
        for name, child in children.items():
            self.add_module(name, child)


@st.composite
def odd_layers(draw: st.DrawFn, depth: int) -> Odd:
    free = odd_names.filter(lambda name: name not in dir(nn.Linear(1, 1)))
    parameters = draw(st.lists(free, max_size=2, unique=True))
    inside = free.filter(lambda name: name not in parameters)
    children = {name: draw(odd_layers(depth - 1)) for name in draw(st.lists(inside, max_size=depth, unique=True))}
    return Odd(parameters, children)


def exactly(fqns: list[str]) -> str | None:
    return "|".join(map(re.escape, fqns)) or None


def is_hiding(model: nn.Module, targets: list[str]) -> bool:
    owners = [vars(model.get_submodule(fqn)) for fqn in targets]
    held = {name for owner in owners for part in ("_modules", "_parameters") for name in owner[part]}
    return (
        hasattr(model, "randlora_state")
        or not held.isdisjoint(HIDDEN)
        or any(not PARTS.isdisjoint(fqn.split(".")) for fqn in targets)
    )


@pytest.mark.medium
@settings(max_examples=30)
@given(odd_layers(3), st.randoms(use_true_random=False))
def test_an_adapter_of_a_model_of_any_names_is_refused_or_comes_back_as_it_was(model: Odd, random: Random) -> None:
    model.add_module("beside", Odd([], {}))
    modules = [fqn for fqn, _ in model.named_modules() if fqn]
    targets = random.sample(modules, random.randint(1, len(modules)))
    free = [fqn for fqn, _ in model.named_parameters() if fqn.removesuffix(".weight") not in targets]
    also = random.sample(free, random.randint(0, len(free)))
    if is_hiding(model, targets):
        with untouched(model), pytest.raises(RandLoRAError, match=r"already has an attribute|part of another"):
            randlora.inject(model, r=2, targets=exactly(targets), train_also=exactly(also))
        return
    own = all_bits(adapter_values(adapt(model, r=2, targets=exactly(targets), train_also=exactly(also))))
    with TemporaryDirectory() as place:
        directory = Path(place) / "adapter"
        if any(fqn.encode(errors="replace").decode() != fqn for fqn in (*targets, *also)):
            with pytest.raises(CheckpointError, match="valid Unicode: rename the module"):
                randlora.save(model, directory)
            assert not directory.exists()
            return
        randlora.save(model, directory)
        randlora.eject(model)
        randlora.load(model, directory)
        assert all_bits(adapter_values(model)) == own
        assert randlora.files.verify(directory).passed


PLACES = "base_layer", "randlora_lambda", "x", "a b"


@every_kind
def test_what_was_saved_of_layers_is_loaded_under_any_name(kind: LayerKind, tmp_path: Path) -> None:
    name = PLACES[LAYER_KINDS.index(kind) % len(PLACES)]
    model = nn.ModuleDict({name: kind.build(128, 32, True, kind.exact), "beside": nn.Linear(4, 6)})
    base = copy.deepcopy(model)
    own = all_bits(adapter_values(adapt(model, r=4, targets=[name], train_also=[f"{name}.bias", "beside"])))
    for bases in ("seed", "stored"):
        randlora.save(model, tmp_path / bases, bases=bases)
        assert randlora.files.verify(tmp_path / bases).passed
    randlora.load(base, tmp_path / "stored")
    assert all_bits(adapter_values(base)) == own


def test_a_child_of_a_layer_goes_by_the_name_that_peft_gives_it_too(tmp_path: Path) -> None:
    keys = {"q.base_layer.bias": "q.bias", "q.base_layer.base_layer.bias": "q.base_layer.bias"}
    keys |= dict.fromkeys(["q.base_layer.child.bias", "q.child.bias"], "q.child.bias")  # as PEFT writes it, and we
    for key, fqn in {**keys, "k.base_layer.bias": "k.base_layer.bias"}.items():
        assert trained_fqn(MODEL_PREFIX + key, {"q"}) == fqn
    model = nn.Sequential(Odd([], {"lora_A": nn.Linear(3, 4)}))
    randlora.save(adapt(model, r=2, targets="0", train_also=r"0\.lora_A\.weight"), tmp_path / "own")
    with pytest.raises(ConfigError, match=r"0\.lora_A\.weight would have the name of a factor of an update: rename it"):
        randlora.files.convert(tmp_path / "own", tmp_path / "lora", "lora", tolerance=1.0)
    assert not (tmp_path / "lora").exists()


def test_a_name_that_is_too_long_or_no_text_to_be_loaded_is_not_saved(tmp_path: Path) -> None:
    long, greatest = "long" * 1024, "n" * (LONGEST_NAME - len(value_keys("", ())[0]))
    said, half = r"'longlong.*' has a name of 41\d\d characters in a file: expected at most 4096", "half \ud800"
    for target, also, message in ((long, None, said), ("other", long, said), (half, None, "valid Unicode")):
        model = nn.ModuleDict({name: nn.Linear(4, 4) for name in (long, greatest, half, "other")})
        randlora.inject(model, r=2, targets=[target], train_also=also)
        with untouched(model), pytest.raises(CheckpointError, match=message):
            randlora.save(model, tmp_path)
    assert not [*tmp_path.iterdir()]
    randlora.inject(model, r=2, targets=[greatest], name="greatest")
    randlora.save(model, tmp_path, name="greatest")
    randlora.load(model, tmp_path, name="again")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        yield from places(entry, (*path, key))


def put(value: Any, path: tuple[Any, ...], entry: Any) -> Any:
    changed = copy.deepcopy(value)
    reduce(getitem, path[:-1], changed)[path[-1]] = entry
    return changed


ANYTHING: tuple[Any, ...] = (None, True, 2.5, -1, 10**30, "%2000000000d", "(a+)+$", [], [[]], {}, {"a": {}}, [["0", 2]])
NUMBER_OR_NONE = {int, float, type(None)}
Types = dict[tuple[Any, ...], set[type]]
HEADER_TYPES: Types = {
    ("config", "alpha"): NUMBER_OR_NONE,
    ("config", "dropout"): NUMBER_OR_NONE - {type(None)},
    ("config", "train_also"): {list, type(None)},
    ("torch_version",): {str, type(None)},
    ("transposed",): {list, type(None)},
    ("config", "stream"): {str, type(None)},
}
"""Places of a header that may have several types."""
PEFT_TYPES: Types = {
    **{(field,): {dict, type(None)} for field in ("alpha_pattern", "auto_mapping", "rank_pattern")},
    **{(field,): {str, type(None)} for field in ("base_model_name_or_path", "peft_version", "revision", "task_type")},
    ("layers_pattern",): {list, str, type(None)},
    ("layers_to_transform",): {list, int, type(None)},
    ("modules_to_save",): {list, type(None)},
    ("randlora_alpha",): {int, float},
    ("randlora_dropout",): {int, float},
    ("target_modules",): {list, str, type(None)},
    ("target_modules", 0): {*map(type, ANYTHING)},
    ("target_modules", 1): {*map(type, ANYTHING)},
}
"""Fields of PEFT's that may have several types."""


@pytest.mark.medium
def test_every_place_of_a_header_and_every_field_of_pefts_has_its_types(tmp_path: Path) -> None:
    ours = our_adapter(tmp_path / "ours", alpha=3.5, train_also=["0.bias"])
    theirs = peft_directory(tmp_path / "theirs")
    both: list[tuple[Path, Any, Types, Callable[[Any], object]]] = [
        (ours, read_facts(ours), HEADER_TYPES, partial(write_facts, ours)),
        (theirs, read_fields(theirs), PEFT_TYPES, lambda fields: config(json.dumps(fields).encode())(theirs)),
    ]
    for directory, found, types, write in both:
        assert len({*places(found)}) > 20
        for number, place in enumerate(places(found)):
            own = reduce(getitem, place, found)
            for wrong in ANYTHING[number % 4 :: 4]:
                write(put(found, place, wrong))
                with untouched(model := LINEAR.build()):
                    loaded = outcome(randlora.load, model, directory)
                    if is_right := not isinstance(loaded, CheckpointError):
                        randlora.eject(model)
                assert not is_right or type(wrong) in types.get(place, {type(own)}), (place, wrong)

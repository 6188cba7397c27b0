"""Another name for an adapter, and what of adapters is trained by name: all else stays as it is."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import randlora
from randlora.errors import AdapterError, ConfigError
from tests.kit import adapter_values, all_bits, fill, same_bits, untouched
from tests.laws import TOKENS, Mixed
from tests.test_compiler import Compiled, model_with


def three() -> Any:
    """Make a model with three adapters, of which "a" and "b" are active and "a" is trainable."""
    model = Mixed()
    randlora.inject(model, r=4, name="a", train_also=["head"])
    randlora.inject(model, r=4, name="b", targets=["q", "up"])
    randlora.inject(model, r=3, name="c", targets=["q"])
    for seed, name in enumerate("abc"):
        fill(model, name, seed=seed)
    randlora.activate(model, {"a": 0.5, "b": -2.0})
    return model


def facts(model: nn.Module, names: dict[str, str]) -> list[Any]:
    """Take down what is known of the adapters, by their names from before."""
    return [(names.get(info.name, info.name), vars(info) | {"name": ""}) for info in randlora.adapters(model)]


@pytest.mark.parametrize("name", ["a", "c"])
def test_all_but_the_name_stays(name: str, tmp_path: Path) -> None:
    model = three()
    expected, objects, before = model(TOKENS), [*model.parameters()], facts(model, {})
    states = {key.replace(f".{name}", ".new") if "randlora" in key else key: v for key, v in model.state_dict().items()}
    values = all_bits(adapter_values(model, name))
    randlora.rename(model, name, "new")
    assert [*model.state_dict()] == [*states]
    assert all_bits(model.state_dict()) == all_bits(states)
    assert all(one is other for one, other in zip(model.parameters(), objects, strict=True))
    assert facts(model, {"new": name}) == before
    randlora.save(model, tmp_path, name="new")
    twin = Mixed()
    randlora.load(twin, tmp_path, name=name)
    assert all_bits(adapter_values(twin, name)) == values
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(copied(TOKENS), expected)
        randlora.rename(copied, "new", name)
        assert facts(copied, {}) == before


@pytest.mark.medium
def test_a_compiled_model_compiles_nothing() -> None:
    model = model_with("a", "b")
    run = Compiled(model)
    before = run.graphs()
    for name, new in (("b", "new"), ("a", "newer")):
        randlora.rename(model, name, new)
        assert run.graphs() == before


def test_what_is_trained_is_set_by_name_whatever_is_active() -> None:
    model = three()
    for names, trainable, expected in ((["b", "c"], True, "abc"), ("a", False, "bc")):
        randlora.set_trainable(model, names, trainable)
        assert "".join(info.name for info in randlora.adapters(model) if info.is_trainable) == expected
    assert not model.head.weight.requires_grad
    assert {info.name: info.weight for info in randlora.adapters(model)} == {"a": 0.5, "b": -2.0, "c": None}
    randlora.activate(model, "c")
    randlora.set_trainable(model, "a")
    assert not model.head.weight.requires_grad
    randlora.activate(model, "a")
    assert model.head.weight.requires_grad


TAKEN, NOT_A_NAME = "the model has an adapter of that name", "expected a printable name without dots"
REFUSED: list[tuple[str, Any, str]] = [
    ("x", "y", "no adapter named 'x': it has a, b, c"),
    *(("a", to, TAKEN) for to in "ab"),
    *(("a", to, NOT_A_NAME) for to in ("a.b", "keys")),
    ("a", 3, NOT_A_NAME),
]


def test_names_that_cannot_be_are_refused() -> None:
    model = three()
    for name, to, message in REFUSED:
        with untouched(model), pytest.raises(AdapterError, match=message):
            randlora.rename(model, name, to)
    with randlora.merged(model), untouched(model), pytest.raises(AdapterError, match="while the adapters are merged"):
        randlora.rename(model, "a", "new")
    for names in ("x", ["a", "x"], [3], 3):
        with untouched(model), pytest.raises(AdapterError, match="the model has no adapter named"):
            randlora.set_trainable(model, names)  # type: ignore[arg-type]
    with untouched(model), pytest.raises(ConfigError, match="trainable must be"):
        randlora.set_trainable(model, "a", None)  # type: ignore[arg-type]

"""What adapting in place refuses, with the reason and before anything changes; and how often verbs walk a model."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.nn.utils import parametrize

import randlora
from randlora.errors import AdapterError, CheckpointError, MergeError, TargetError
from randlora.layers import registry
from randlora.layers.linear import LinearAdapter
from tests.in_place_models import X, adapt, of_kind
from tests.kit import all_bits, fill, untouched
from tests.laws import assert_close
from tests.layer_kinds import LAYER_KINDS


class Wilful(type):
    """A metaclass that lets nobody subclass its classes."""

    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> "Wilful":
        if any(isinstance(base, Wilful) for base in bases):
            raise TypeError(f"{name} may not be a subclass")
        return super().__new__(cls, name, bases, body)


class Final(nn.Linear, metaclass=Wilful):
    """A linear layer whose class is final."""


class Scripted(LinearAdapter):
    """Would adapt a scripted linear layer."""

    @staticmethod
    def features(owner: nn.Module) -> tuple[int, int]:
        out_features, in_features = owner.get_parameter("weight").shape
        return in_features, out_features


def test_a_class_that_cannot_be_subclassed_is_refused_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(12, 12), Final(12, 12))
    with untouched(model), pytest.raises(TargetError, match=r"(?s)1 is a Final, whose class cannot.*may not be"):
        randlora.inject(model, r=3, targets=["0", "1"])
    assert type(model[0]) is nn.Linear
    assert type(model[1]) is Final
    randlora.inject(model, r=3, targets=["0"])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("known", [False, True], ids=["of no kind", "of a kind"])
def test_a_script_module_is_refused_with_the_reason(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(12, 12), torch.jit.script(nn.Linear(12, 12)))
    own = type(model[1])
    reason = "for which there is no adapter layer"
    if known:
        monkeypatch.setattr(registry, "_layers", {**registry._layers, registry.qualified_name(own): Scripted})
        reason = "a TorchScript module, whose class cannot change"
    with untouched(model), pytest.raises(TargetError, match=f"1 is .*RecursiveScriptModule, .*{reason}"):
        randlora.inject(model, r=3, targets=["0", "1"])
    assert type(model[0]) is nn.Linear
    assert type(model[1]) is own


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # torch.ao warns of all it does
def test_layers_that_torch_quantized_are_refused_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(12, 20), nn.Embedding(5, 20))
    quantized = quantization.quantize_dynamic(
        model,
        {nn.Linear: quantization.default_dynamic_qconfig, nn.Embedding: quantization.float_qparams_weight_only_qconfig},
    )
    for target in "01":
        with pytest.raises(TargetError, match=rf"{target} .* was quantized by torch\.ao"):
            randlora.inject(quantized, r=3, targets=[target])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_merged_model_is_quantized() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    randlora.inject(model, r=3, targets=["2"])
    randlora.merge(model)
    assert type(quantization.quantize_dynamic(model)[2]) is not nn.Linear


def on_top(model: nn.Module) -> None:
    """Change the class of an adapted layer as `fully_shard` does."""
    layer = model.get_submodule("2")
    layer.__class__ = type("Sharded", (type(layer),), {})


def parametrized(model: nn.Module) -> None:
    parametrize.register_parametrization(model.get_submodule("2"), "bias", nn.Identity())


@pytest.mark.parametrize("change", [on_top, parametrized])
def test_a_class_changed_on_top_stops_eject_and_remove(change: Callable[[nn.Module], None]) -> None:
    model = adapt(of_kind(LAYER_KINDS[0]))
    randlora.inject(model, r=3, targets=["0", "2"], name="second", stream="portable")
    change(model)
    classes = {name: type(module) for name, module in model.named_modules()}
    for verb in (randlora.eject, lambda model: randlora.remove(model, "second"), randlora.merge):
        randlora.activate(model, ["default", "second"])
        with untouched(model), pytest.raises((AdapterError, MergeError), match=r"2 changed its class to .* after"):
            verb(model)
        assert {name: type(module) for name, module in model.named_modules()} == classes
    expected = model(X.double())
    with randlora.merged(model):
        assert_close(model(X.double()), expected, torch.float64)


def test_undoing_the_change_lets_eject_go_on() -> None:
    model: nn.Module = of_kind(LAYER_KINDS[0])
    base = copy.deepcopy(model)
    adapt(model)
    parametrized(model)
    parametrize.remove_parametrizations(model.get_submodule("2"), "bias")
    randlora.eject(model)
    assert torch.equal(model(X.double()), base(X.double()))


def test_saving_and_merging_notice_a_layer_put_in_an_adapted_ones_place(tmp_path: Path) -> None:
    model = adapt(of_kind(LAYER_KINDS[0]))
    model._modules["2"] = nn.Linear(12, 20, dtype=torch.float64)
    with untouched(model), pytest.raises(CheckpointError, match="2 no longer has adapter 'default'"):
        randlora.save(model, tmp_path)
    for reversible in (True, False):
        with untouched(model), pytest.raises(MergeError, match="2 no longer has adapter 'default'"):
            randlora.merge(model, reversible=reversible)
    assert not list(tmp_path.iterdir())


# Walks


class Counted(dict[str, Any]):
    """A container's children, which count how often they are gone through."""

    walks = 0

    def items(self) -> Any:
        self.walks += 1
        return super().items()

    def values(self) -> Any:
        self.walks += 1
        return super().values()


def walks(model: nn.Module, verb: Callable[[nn.Module], object]) -> int:
    """Count how often a verb goes through a model."""
    counted = Counted(model._modules)
    model.__dict__["_modules"] = counted
    verb(model)
    model.__dict__["_modules"] = dict(counted)
    return counted.walks


def test_each_verb_goes_through_the_model_once(tmp_path: Path) -> None:
    trained = adapt(of_kind(LAYER_KINDS[0]))
    randlora.save(trained, tmp_path / "trained")
    model = of_kind(LAYER_KINDS[0])
    options: dict[str, Any] = {"r": 3, "targets": "all-linear", "train_also": ["1.1"]}
    verbs: dict[str, Callable[[nn.Module], object]] = {
        "plan": lambda model: randlora.plan(model, **options),
        "inject": lambda model: randlora.inject(model, **options),
        "save": lambda model: randlora.save(model, tmp_path / "saved"),
        "merge reversibly": lambda model: randlora.merge(model, reversible=True),
        "unmerge": randlora.unmerge,
        "eject": randlora.eject,
        "load": lambda model: randlora.load(model, tmp_path / "trained"),
        "merge": randlora.merge,
    }
    assert {name: walks(model, verb) for name, verb in verbs.items()} == dict.fromkeys(verbs, 1)


def test_what_version_0_1_pickled_whole_is_refused_in_words() -> None:
    """Its adapted layers had a hook, which the pickle names."""
    with pytest.raises(CheckpointError, match=r"a whole model, pickled by randlora 0\.1, .* save the adapter with"):
        pickle.loads(b"crandlora.layers.base\n_decline_fast_paths\n.")
    with pytest.raises(AttributeError, match="nothing"):
        pickle.loads(b"crandlora.layers.base\nnothing\n.")


def test_a_state_dict_of_version_0_1_is_refused_in_words_that_say_how_to_mend_it() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    randlora.inject(model, r=4, targets=["0"])
    fill(model)
    own = model.state_dict()
    theirs = {name.replace("0.weight", "0.base_layer.weight").replace("0.bias", "0.base_layer.bias"): value
              for name, value in own.items()}  # fmt: skip
    other = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    randlora.inject(other, r=4, targets=["0"])
    with (
        untouched(other),
        pytest.raises(CheckpointError, match=r"has 0\.base_layer\.weight.*replace '\.base_"),
    ):
        other.load_state_dict(theirs)
    other.load_state_dict({name.replace(".base_layer.", "."): value for name, value in theirs.items()})
    assert all_bits(other.state_dict()) == all_bits(own)

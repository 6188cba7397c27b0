"""A module that is adapted stays what and where it is: the laws of the class that adapts it, over every kind."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref
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
from randlora.layers.scopes import begin_call, end_call
from randlora.model.install import check_call
from randlora.targets.census import Census
from tests.in_place_models import Reading, X, adapt, given, of_kind, register
from tests.kit import all_bits, fill, same_bits, untouched
from tests.laws import assert_close, needs_export
from tests.layer_kinds import (
    LAYER_KINDS,
    LayerKind,
    every_kind,
    every_kind_of_4_bits_compiled,
)
from tests.models import GPT2, LLAMA, RealModel, outputs

HOOKS = [name for name in vars(nn.Linear(1, 1)) if name.endswith("_hooks") or "_hooks_with" in name]
OURS = frozenset({check_call, begin_call, end_call})
ROOT = Path(__file__).parent.parent


def objects(model: nn.Module) -> dict[str, Any]:
    """Record every object of a model that nothing may replace, under each of its names."""
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if "randlora" not in name}
    own_hooks = [each for module in modules.values() for each in (module._forward_pre_hooks, module._forward_hooks)]
    ours = {number for each in own_hooks for number, hook in each.items() if hook in OURS}
    hooks = {
        f"{name}.{held}": (id(own), [(number, hook) for number, hook in own.items() if number not in ours])
        for name, module in modules.items()
        for held in HOOKS
        for own in [module.__dict__[held]]
    }
    parameters = model.named_parameters(remove_duplicate=False)
    return {
        "modules": {name: id(module) for name, module in modules.items()},
        "parameters": {name: id(parameter) for name, parameter in parameters if "randlora" not in name},
        "hooks": hooks,
        "places": {
            name: [child for child in module._modules if "randlora" not in child] for name, module in modules.items()
        },
    }


def added(model: nn.Module) -> set[str]:
    """Return the keys that adapters add to a model's state dict."""
    return {
        f"{visit.fqn}.{held}.{name}"
        for visit in Census.of(model).visits
        for layer in getattr(visit.module, "randlora", {}).values()
        for held in layer.parameter_names()
        for name in layer.adapters
    }


@pytest.fixture(autouse=True)
def _readers(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


@every_kind
def test_every_object_every_name_and_every_type_stays(kind: LayerKind) -> None:
    for model, x in ((of_kind(kind), given(kind)), (Reading(), X)):
        for module in model.modules():
            module.register_forward_hook(lambda *_: None)
            module.register_forward_pre_hook(lambda *_: None)
        before, keys = objects(model), set(model.state_dict())
        types = {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}
        adapt(model)
        assert objects(model) == before
        assert all(isinstance(model.get_submodule(name), own) for name, own in types.items())
        assert set(model.state_dict()) - keys == added(model) != set()
        assert keys <= set(model.state_dict())
        model(x)
        randlora.eject(model)
        assert objects(model) == before
        for module in model.modules():
            assert not OURS.intersection([*module._forward_pre_hooks.values(), *module._forward_hooks.values()])
        assert {name: type(module) for name, module in model.named_modules(remove_duplicate=False)} == types
        assert set(model.state_dict()) == keys
        assert not [name for module in model.modules() for name in module.__dict__ if "randlora" in name]


@every_kind
def test_a_checkpoint_of_the_base_loads_before_and_after(kind: LayerKind) -> None:
    model, other = of_kind(kind), of_kind(kind)
    checkpoint = copy.deepcopy(other.state_dict())
    late = adapt(copy.deepcopy(model))
    missing, unexpected = map(set, model.load_state_dict(checkpoint, strict=False))
    assert tuple(map(set, late.load_state_dict(checkpoint, strict=False))) == (missing | added(late), unexpected)
    adapt(model)
    assert torch.equal(late(given(kind)), model(given(kind)))
    if not kind.is_quantized:  # whose scales a state dict of bitsandbytes does not bring back
        assert not missing | unexpected
        with randlora.disabled(late):
            assert torch.equal(late(given(kind)), other(given(kind)))


# Copies and files

CHILD = """
import pickle, sys, torch
models = {"pickle": pickle.load(open(sys.argv[1], "rb")), "torch": torch.load(sys.argv[2], weights_only=False)}
torch.set_num_threads(1)
for how, saved in models.items():
    for name, (model, x, expected) in saved.items():
        assert torch.equal(model(x), expected), (how, name)
        assert "randlora" in str(list(model.state_dict())), (how, name)
print("same", *models["torch"])
"""


@pytest.mark.medium
def test_copies_and_pickles_in_a_fresh_process_compute_the_same_bits(tmp_path: Path) -> None:
    models = {kind.name: (adapt(of_kind(kind)), given(kind)) for kind in LAYER_KINDS if kind.pickles}
    models["reading"] = adapt(Reading()), X
    saved = {name: (model, x, model(x).detach()) for name, (model, x) in models.items()}
    for name, (model, x, expected) in saved.items():
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), expected), name
        assert {name: type(module) for name, module in twin.named_modules()} == {
            name: type(module) for name, module in model.named_modules()
        }
        fill(twin, seed=1)
        assert torch.equal(model(x), expected), name
        randlora.eject(twin)
        assert not [key for key in twin.state_dict() if "randlora" in key], name
    files = tmp_path / "models.pickle", tmp_path / "models.pt"
    files[0].write_bytes(pickle.dumps(saved))
    torch.save(saved, files[1])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *files], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["same", *models]


@pytest.mark.parametrize(("base", "is_ejected"), [(nn.Linear, False), (nn.Embedding, True)], ids=["called", "read"])
def test_a_class_that_a_program_made_is_collected_with_the_modules_that_it_adapted(
    base: type[nn.Module], is_ejected: bool
) -> None:
    made = type("Made", (base,), {})
    model = nn.Sequential(made(8, 8))
    randlora.inject(model, r=2, targets="all")
    held = copy.deepcopy(model)
    classes = [weakref.ref(made), weakref.ref(type(model[0]))]
    if is_ejected:
        randlora.eject(model)
        randlora.eject(held)
    del made, model, held
    gc.collect()
    assert [reference() for reference in classes] == [None, None]


@pytest.mark.parametrize("kind", [LLAMA, GPT2], ids=lambda kind: kind.name)
def test_what_save_pretrained_writes_reloads_as_the_base(kind: RealModel, tmp_path: Path) -> None:
    base: Any = kind.build()
    model: Any = kind.build()
    randlora.inject(model, r=4, targets=kind.targets, save_pretrained="model")
    fill(model)
    model.save_pretrained(tmp_path)
    again, told = type(base).from_pretrained(tmp_path, output_loading_info=True)
    assert set(told["unexpected_keys"]) == added(model)
    assert not told["missing_keys"]
    assert not told["mismatched_keys"]
    assert again.state_dict().keys() == base.state_dict().keys()
    for name, tensor in base.state_dict().items():
        assert same_bits(again.state_dict()[name], tensor), name
    assert torch.equal(outputs(again.eval(), kind.inputs()), outputs(base, kind.inputs()))


@pytest.mark.medium
@needs_export
@every_kind_of_4_bits_compiled
def test_an_exported_program_of_4_bits_computes_the_same(kind: LayerKind) -> None:
    model = adapt(of_kind(kind))
    program = torch.export.export(model, (X,), strict=True)  # bitsandbytes' plain layers export in no other way
    assert_close(program.module()(X), model(X), torch.float32)


# What is refused, with the reason and before anything changes


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

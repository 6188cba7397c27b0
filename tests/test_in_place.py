"""A module that is adapted stays what and where it is: the laws of the class that adapts it, over every kind."""

import copy
import gc
import pickle
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn.utils import parametrize

import randlora
from randlora.errors import AdapterError, MergeError, TargetError
from randlora.files import save_merged
from randlora.layers import registry
from randlora.layers.linear import LinearAdapter
from randlora.layers.scopes import begin_call, end_call
from randlora.model.install import check_call
from randlora.readers.read_weight import ReadWeight
from tests.further import REPEATS_OTHERS
from tests.kit import adapt, all_bits, fill, untouched
from tests.laws import assert_close
from tests.layer_kinds import LAYER_KINDS, LayerKind, every_kind
from tests.models import LLAMA, outputs

HOOKS = [name for name in vars(nn.Linear(1, 1)) if name.endswith("_hooks") or "_hooks_with" in name]
OURS = frozenset({check_call, begin_call, end_call})
ROOT = Path(__file__).parent.parent
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


class Tables(nn.Module):
    """Two weights on one owner, whose own forward reads both; the second is stored ``(in_features, out_features)``."""

    def __init__(self, in_features: int = 12, out_features: int = 20, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(out_features, in_features, dtype=dtype) * 0.3)
        self.turned = nn.Parameter(torch.randn(out_features, in_features, dtype=dtype) * 0.3)
        self.scale = nn.Parameter(torch.ones(in_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = torch.tanh(x @ self.table.T) @ self.turned * self.scale
        return output


class TableReader(ReadWeight):
    attribute = "table"

    @staticmethod
    def features(owner: nn.Module) -> tuple[int, int]:
        out_features, in_features = owner._parameters["table"].shape  # type: ignore[union-attr]
        return in_features, out_features

    @staticmethod
    def in_storage_layout(delta: Tensor) -> Tensor:
        return delta


class TurnedReader(TableReader):
    attribute = "turned"
    features = staticmethod(lambda owner: tuple(owner._parameters["turned"].shape))
    in_storage_layout = staticmethod(lambda delta: delta.T)


class Reading(nn.Module):
    """A parent that reads its child's weights and never calls the child, then a layer and the child itself."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.read = Tables(dtype=dtype)
        self.called = Tables(dtype=dtype)
        self.linear = nn.Linear(12, 12, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(x @ self.read.table.T) @ self.read.turned
        output: Tensor = self.linear(self.called(x))
        return output


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the weights of `Tables` be adapted until the test is over."""
    monkeypatch.setattr(registry, "_readers", dict(registry._readers))
    randlora.layers.register_layer(Tables)(TableReader)
    randlora.layers.register_layer(Tables)(TurnedReader)


def of_kind(kind: LayerKind) -> nn.Sequential:
    layer, dtype = kind.build(12, 12, True, kind.exact), kind.exact
    return nn.Sequential(layer, nn.Sequential(layer, nn.LayerNorm(12, dtype=dtype)), kind.build(12, 20, True, dtype))


def with_adapter(model: nn.Module) -> nn.Module:
    return adapt(model, r=3, targets="all-linear", stream="portable")


def given(kind: LayerKind) -> Tensor:
    return X.to(kind.exact)


def objects(model: nn.Module) -> dict[str, Any]:
    """Record every object of a model that nothing may replace, under each of its names, and each module's type."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if "randlora" not in name:
            found[name] = id(module), [child for child in module._modules if "randlora" not in child]
            called = {**module._forward_pre_hooks, **module._forward_hooks}
            for held in HOOKS:
                own = module.__dict__[held]
                found[f"{name}.{held}"] = id(own), [each for each in own.items() if called.get(each[0]) not in OURS]
    parameters = model.named_parameters(remove_duplicate=False)
    return found | {name: id(parameter) for name, parameter in parameters if "randlora" not in name}


def types_of(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


def added(model: nn.Module) -> set[str]:
    return {name for name in model.state_dict() if "randlora" in name}


@pytest.fixture(autouse=True)
def _readers(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


@pytest.mark.product
@every_kind
def test_every_object_every_name_and_every_type_stays(kind: LayerKind) -> None:
    for model, x in ((of_kind(kind), given(kind)), (Reading(), X)):
        for module in model.modules():
            module.register_forward_hook(lambda *_: None)
            module.register_forward_pre_hook(lambda *_: None)
        before, keys, types = objects(model), set(model.state_dict()), types_of(model)
        with_adapter(model)
        assert objects(model) == before
        assert all(isinstance(model.get_submodule(name), own) for name, own in types.items())
        assert set(model.state_dict()) - keys == added(model) != set()
        assert keys <= set(model.state_dict())
        model(x)
        randlora.eject(model)
        assert (objects(model), types_of(model), set(model.state_dict())) == (before, types, keys)
        for module in model.modules():
            assert not OURS.intersection([*module._forward_pre_hooks.values(), *module._forward_hooks.values()])
            assert not [name for name in module.__dict__ if "randlora" in name]


@pytest.mark.product
@every_kind
def test_a_checkpoint_of_the_base_loads_before_and_after(kind: LayerKind) -> None:
    model, other = of_kind(kind), of_kind(kind)
    checkpoint = copy.deepcopy(other.state_dict())
    late = with_adapter(copy.deepcopy(model))
    missing, unexpected = map(set, model.load_state_dict(checkpoint, strict=False))
    assert tuple(map(set, late.load_state_dict(checkpoint, strict=False))) == (missing | added(late), unexpected)
    with_adapter(model)
    assert torch.equal(late(given(kind)), model(given(kind)))
    if not kind.is_quantized:  # whose scales a state dict of bitsandbytes does not bring back
        assert not missing | unexpected
        with pytest.raises(RuntimeError, match="Missing key") as strict:
            late.load_state_dict(checkpoint)
        assert set(re.findall(r'"(.*?)"', str(strict.value))) == added(late)
        with randlora.disabled(late):
            assert torch.equal(late(given(kind)), other(given(kind)))


CHILD = """
import pickle, sys, torch
models = {"pickle": pickle.load(open(sys.argv[1], "rb")), "torch": torch.load(sys.argv[2], weights_only=False)}
for how, saved in models.items():
    for name, (model, x, expected) in saved.items():
        assert name == "llama" or torch.equal(model(x), expected), (how, name)
        assert "randlora" in str(list(model.state_dict())), (how, name)
print("same", *models["torch"])
models["torch"]["llama"][0].save_pretrained(sys.argv[3])
"""


@pytest.mark.medium
def test_copies_and_pickles_in_a_fresh_process_compute_the_same_bits(tmp_path: Path) -> None:
    kinds = [kind for kind in LAYER_KINDS if kind.pickles and kind.name not in REPEATS_OTHERS]
    models = {kind.name: (with_adapter(of_kind(kind)), given(kind)) for kind in kinds}
    models["reading"] = with_adapter(Reading()), X
    saved = {name: (model, x, model(x).detach()) for name, (model, x) in models.items()}
    for name, (model, x, expected) in saved.items():
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), expected), name
            assert types_of(twin) == types_of(model), name
            fill(twin, seed=1)
            assert torch.equal(model(x), expected), name
            assert not torch.equal(twin(x), expected), name
            randlora.eject(twin)
            assert not added(twin), name
    llama = LLAMA.build()
    randlora.inject(llama, r=4, targets=LLAMA.targets, save_pretrained="adapter")
    saved["llama"] = fill(llama), X, X
    files = tmp_path / "models.pickle", tmp_path / "models.pt", tmp_path / "adapter"
    files[0].write_bytes(pickle.dumps(saved))
    torch.save(saved, files[1])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *files], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["same", *saved]
    randlora.load(loaded := LLAMA.build(), tmp_path / "adapter")  # saved by what knows the library as a pickle alone
    assert torch.equal(outputs(loaded, LLAMA.inputs()), outputs(llama, LLAMA.inputs()))


def test_what_save_pretrained_writes_reloads_as_the_base(tmp_path: Path) -> None:
    base, model = (LLAMA.build() for _ in range(2))
    randlora.inject(model, r=4, targets=LLAMA.targets, save_pretrained="model")
    fill(model).save_pretrained(tmp_path)  # type: ignore[operator]
    again, told = type(base).from_pretrained(tmp_path, output_loading_info=True)  # type: ignore[attr-defined]
    assert set(told["unexpected_keys"]) == added(model)
    assert not {*told["missing_keys"], *told["mismatched_keys"]}
    assert all_bits(again.state_dict()) == all_bits(base.state_dict())
    assert torch.equal(outputs(again.eval(), LLAMA.inputs()), outputs(base, LLAMA.inputs()))


class Final(nn.Linear):
    def __init_subclass__(cls) -> None:
        raise TypeError(f"{cls.__name__} may not be a subclass")


class Scripted(LinearAdapter):
    features = staticmethod(lambda _: (12, 12))  # type: ignore[assignment]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # torch.ao and torch.jit warn of all
def test_a_class_that_cannot_change_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: nn.Module, message: str, *targets: str) -> None:
        before = types_of(model)
        with pytest.raises(TargetError, match=message):
            randlora.inject(model, r=3, targets=targets or ["0", "1"])
        assert types_of(model) == before

    scripted: Any = torch.jit.script(nn.Linear(12, 12))
    beside = nn.Sequential(nn.Linear(12, 12), scripted)
    refuse(nn.Sequential(nn.Linear(12, 12), Final(12, 12)), r"(?s)1 is a Final, whose class cannot.*may not be")
    refuse(beside, "1 is .*RecursiveScriptModule, .*there is no adapter layer")
    monkeypatch.setattr(registry, "_layers", {**registry._layers, registry.qualified_name(type(scripted)): Scripted})
    refuse(beside, "1 is .*RecursiveScriptModule, .*a TorchScript module, whose class cannot change")
    own, of_tables = quantization.default_dynamic_qconfig, quantization.float_qparams_weight_only_qconfig
    model = nn.Sequential(nn.Linear(12, 20), nn.Embedding(5, 20))
    quantized = quantization.quantize_dynamic(model, {nn.Linear: own, nn.Embedding: of_tables})
    for target in "01":
        refuse(quantized, rf"{target} .* was quantized by torch\.ao", target)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # torch.jit warns of all
def test_a_scripted_module_stays_beside_adapted_layers(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(12, 12), torch.jit.script(nn.Linear(12, 12))), torch.randn(3, 12)
    assert randlora.training_memory(model, tokens=3, r=3, targets=["0"]).weights == 2 * 4 * (144 + 12)
    assert randlora.prepare_quantized(model).unpacked == ()
    adapt(model, r=3, targets=["0"])
    expected, tensors = model(x), dict(randlora.merged_tensors(model))
    save_merged(model, tmp_path / "merged")
    assert randlora.check(model, x).checked == randlora.merge(model).targets == ("0",)
    torch.testing.assert_close(model(x), expected)
    for saved in (tensors, load_file(tmp_path / "merged/model.safetensors")):
        torch.testing.assert_close(saved, dict(model.state_dict()))


@pytest.mark.parametrize("change", ["class", "parametrization"])
def test_a_class_changed_on_top_stops_eject_and_remove(change: str) -> None:
    model, x = with_adapter(of_kind(LAYER_KINDS[0])), X.double()
    randlora.inject(model, r=3, targets=["0", "2"], name="second", stream="portable")
    layer = model.get_submodule("2")
    if change == "class":
        layer.__class__ = type("Sharded", (type(layer),), {})  # as fully_shard does
    else:
        parametrize.register_parametrization(layer, "bias", nn.Identity())
    classes = types_of(model)
    for verb in (randlora.eject, lambda model: randlora.remove(model, "second"), randlora.merge):
        randlora.activate(model, ["default", "second"])
        with untouched(model), pytest.raises((AdapterError, MergeError), match=r"2 changed its class to .* after"):
            verb(model)
        assert types_of(model) == classes
    expected = model(x)
    with randlora.merged(model):
        assert_close(model(x), expected, torch.float64)


@pytest.mark.parametrize(("base", "is_ejected"), [(nn.Linear, False), (nn.Embedding, True)], ids=["called", "read"])
def test_a_class_that_a_program_made_is_collected_with_the_modules_that_it_adapted(base: Any, is_ejected: bool) -> None:
    made = type("Made", (base,), {})
    models = [nn.Sequential(made(8, 8))]
    randlora.inject(models[0], r=2, targets="all")
    models.append(copy.deepcopy(models[0]))
    classes = [weakref.ref(made), weakref.ref(type(models[0][0]))]
    if is_ejected:
        [*map(randlora.eject, models)]
    del made, models
    gc.collect()
    assert [reference() for reference in classes] == [None, None]

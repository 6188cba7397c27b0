"""A module that is adapted stays what and where it is: the laws of the class that adapts it, over every kind."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import accelerate  # type: ignore[import-untyped]
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules  # type: ignore[import-untyped]
from torch import Tensor, nn

import randlora
from randlora.layers.scopes import begin_call, end_call
from randlora.model.install import check_call
from randlora.targets.census import Census
from tests.in_place_models import Reading, X, adapt, given, of_kind, register
from tests.kit import fill, same_bits
from tests.laws import assert_close, needs_export
from tests.layer_kinds import (
    LAYER_KINDS,
    LayerKind,
    every_dense_kind,
    every_kind,
    every_kind_compiled,
    every_kind_of_4_bits_compiled,
)
from tests.models import BERT, GPT2, LLAMA, RealModel, outputs

HOOKS = [name for name in vars(nn.Linear(1, 1)) if name.endswith("_hooks") or "_hooks_with" in name]
OURS = frozenset({check_call, begin_call, end_call})
ROOT = Path(__file__).parent.parent


def reading(monkeypatch: pytest.MonkeyPatch) -> Reading:
    """Make the model whose weights are read, and let them be adapted."""
    register(monkeypatch)
    return Reading()


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


def load_plain(model: nn.Module, checkpoint: dict[str, Tensor]) -> tuple[set[str], set[str]]:
    missing, unexpected = model.load_state_dict(checkpoint, strict=False)
    return set(missing), set(unexpected)


# Names and objects


@every_kind
def test_every_object_every_name_and_every_type_stays(kind: LayerKind) -> None:
    model = of_kind(kind)
    for module in model.modules():
        module.register_forward_hook(lambda *_: None)
        module.register_forward_pre_hook(lambda *_: None)
    before, keys = objects(model), set(model.state_dict())
    types = {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}
    adapt(model)
    assert objects(model) == before
    assert all(isinstance(model.get_submodule(name), own) for name, own in types.items())
    assert type(model[0]) is not types["0"]
    diagonals = {f"{at}.randlora_{which}.default" for at in ("0", "1.0", "2") for which in ("lambda", "gamma")}
    assert set(model.state_dict()) - keys == added(model) == diagonals
    assert keys <= set(model.state_dict())
    model(given(kind))
    randlora.eject(model)
    assert objects(model) == before
    for module in model.modules():
        assert not OURS.intersection([*module._forward_pre_hooks.values(), *module._forward_hooks.values()])
    assert {name: type(module) for name, module in model.named_modules(remove_duplicate=False)} == types
    assert set(model.state_dict()) == keys
    assert not [name for module in model.modules() for name in module.__dict__ if "randlora" in name]


def test_every_object_stays_where_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reading(monkeypatch)
    before, keys = objects(model), set(model.state_dict())
    adapt(model)
    assert objects(model) == before
    assert set(model.state_dict()) - keys == added(model)
    assert len(added(model)) == 10
    randlora.eject(model)
    assert objects(model) == before
    assert set(model.state_dict()) == keys


@every_kind
def test_a_checkpoint_of_the_base_loads_before_and_after(kind: LayerKind) -> None:
    model, other = of_kind(kind), of_kind(kind)
    checkpoint = copy.deepcopy(other.state_dict())
    missing, unexpected = load_plain(copy.deepcopy(model), checkpoint)
    late = copy.deepcopy(model)
    adapt(late)
    assert load_plain(late, checkpoint) == (missing | added(late), unexpected)
    load_plain(model, checkpoint)
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
def test_copies_and_pickles_in_a_fresh_process_compute_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {kind.name: (adapt(of_kind(kind)), given(kind)) for kind in LAYER_KINDS if kind.pickles}
    models["reading"] = adapt(reading(monkeypatch)), X
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


@pytest.mark.parametrize("base", [nn.Linear, nn.Embedding], ids=["called", "read"])
@pytest.mark.parametrize("is_ejected", [True, False])
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


@pytest.mark.parametrize("kind", [LLAMA, GPT2, BERT], ids=lambda kind: kind.name)
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


# Compilers: tests/test_layers.py compiles every kind, tests/test_readers_beside.py those that are read


@pytest.mark.medium
@needs_export
@every_dense_kind
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_an_exported_program_computes_the_same(kind: LayerKind, strict: bool) -> None:
    model = adapt(of_kind(kind).float())
    program = torch.export.export(model, (X,), strict=strict)
    assert_close(program.module()(X), model(X), torch.float32)


@pytest.mark.medium
@needs_export
@every_kind_of_4_bits_compiled
def test_an_exported_program_of_4_bits_computes_the_same(kind: LayerKind) -> None:
    model = adapt(of_kind(kind))
    program = torch.export.export(model, (X,), strict=True)  # bitsandbytes' plain layers export in no other way
    assert_close(program.module()(X), model(X), torch.float32)


@pytest.mark.medium
@every_kind_compiled
def test_a_model_compiles_to_one_graph(kind: LayerKind) -> None:
    model = adapt(of_kind(kind).float())
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(X)
    assert_close(found, model(X), torch.bfloat16 if kind.rounds_inputs else torch.float32)


# accelerate


@every_dense_kind
@pytest.mark.parametrize("when", ["before", "after"])
def test_offloading_gives_the_same_at_each_point(kind: LayerKind, when: str, tmp_path: Path) -> None:
    model, x = of_kind(kind), given(kind)
    base = copy.deepcopy(model)
    expected = adapt(copy.deepcopy(model))(x)
    own = {name: type(module) for name, module in model.named_modules()}
    if when == "before":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert torch.equal(model(x), base(x))
    adapt(model)
    if when == "after":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model[0].weight.is_meta
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model(x), expected)
        with randlora.disabled(model), torch.no_grad():
            assert torch.equal(model(x), base(x))
    randlora.save(model, tmp_path)
    again = copy.deepcopy(base)
    randlora.load(again, tmp_path)
    assert torch.equal(again(x), expected)
    remove_hook_from_submodules(model)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    randlora.eject(model)
    assert torch.equal(model(x), base(x))
    assert {name: type(module) for name, module in model.named_modules()} == own
    for module in model.modules():  # accelerate leaves a bound forward behind
        assert "_old_forward" not in module.__dict__
        assert module.__dict__.get("forward", type(module).forward.__get__(module)) == module.forward
        assert module.forward.__func__ is type(module).forward  # type: ignore[attr-defined]


@every_dense_kind
def test_a_model_that_is_offloaded_is_ejected_under_the_hooks(kind: LayerKind) -> None:
    model, x = of_kind(kind), given(kind)
    base = copy.deepcopy(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    adapt(model)
    randlora.eject(model)
    assert torch.equal(model(x), base(x))
    remove_hook_from_submodules(model)
    assert torch.equal(model(x), base(x))
    assert type(model[0]) is type(base[0])

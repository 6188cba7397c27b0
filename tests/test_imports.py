"""What importing the library costs, what it offers, and that its files import each other one way."""

import ast
import graphlib
import importlib
import inspect
import json
import runpy
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import randlora
from randlora.files import FEATURES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "randlora"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")

ROOMS: list[str] = runpy.run_path(str(ROOT / "docs" / "assets" / "rooms.py"))["rooms"](PAGE)
"""From the ground up, as the page on architecture draws them: a file imports from its room and those below it."""

PUBLIC: list[str] = importlib.import_module("randlora").__all__

ROOMS.insert(ROOMS.index("api") + 1, "")  # the package itself

OPTIONAL = {
    "disk.hub": {"huggingface_hub"},
    "files.transformers_model": {"huggingface_hub", "transformers"},
    "integrations.axolotl": {"axolotl", "pydantic"},
    "integrations.lightning": set(),  # by importlib, whichever of its packages there is
    "integrations.optimizers": set(),
    "integrations.rollouts": set(),
    "integrations.swift": {"swift"},
    "integrations.transformers": {"accelerate", "transformers"},
    "integrations.verl": {"verl"},
    "integrations.verl_plugin": set(),
    "integrations.vllm": {"vllm"},
    "quantized.bnb": {"bitsandbytes"},
    "offloaded": {"accelerate"},
}
"""What a file may import beyond what the project depends on, inside functions only."""


def floor(name: str) -> int:
    return ROOMS.index(name.split(".", maxsplit=1)[0])


@cache
def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").removesuffix(".")] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            whole = {f"{module}.{alias.name}" for alias in node.names}
            yield from {name for name in whole if name.removeprefix("randlora.") in modules()} or {module}


def inner_imports(name: str) -> set[str]:
    targets = (target for target in imported(modules()[name]) if target.split(".")[0] == "randlora")
    return {target.removeprefix("randlora").removeprefix(".") for target in targets}


@pytest.mark.medium
def test_a_file_imports_from_its_room_and_those_below_it_and_names_no_feature() -> None:
    above = {(name, target) for name in modules() for target in inner_imports(name) if floor(target) > floor(name)}
    assert above == set()
    order = graphlib.TopologicalSorter({name: inner_imports(name) for name in modules()})
    assert set(order.static_order()) == set(modules()), "and never in a circle"
    for name in modules():
        if name.split(".", maxsplit=1)[0] not in (*FEATURES, "api"):  # which has names of theirs, if they are there
            assert {target for target in inner_imports(name) if target.split(".")[0] in FEATURES} == set(), name


def test_a_file_imports_what_the_project_depends_on_by_full_names_and_nothing_else() -> None:
    declared = {requirement.split(">")[0] for requirement in PROJECT["dependencies"]}
    assert declared == {"torch", "safetensors", "numpy"}
    for name, tree in modules().items():
        foreign = {target.split(".")[0] for target in imported(tree)} - set(sys.stdlib_module_names)
        is_command_line = floor(name) > floor("")
        optional = OPTIONAL.get(name, {"typer", "rich"} if is_command_line else set())
        assert foreign <= declared | optional | {"randlora"}, name


WITHOUT = """
import copy, os, sys, tempfile
import torch
from torch import nn

def use():
    import randlora
    randlora.layers  # a room, before any was imported
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(3, 8)
    loaded = copy.deepcopy(model)
    randlora.inject(model, r=2)
    assert sys.modules[hidden] is None
    model(x).sum().backward()
    torch.optim.SGD(randlora.trainable_parameters(model), lr=0.1).step()
    trained = model(x)
    with tempfile.TemporaryDirectory() as directory:
        randlora.save(model, directory)
        randlora.load(loaded, directory)
    assert torch.equal(loaded(x), trained)
    randlora.merge(model)
    assert torch.allclose(model(x), trained, atol=1e-5)

torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)  # imports more than all else here
for feature in sys.argv[1:]:
    hidden = f"randlora.{feature}"
    if not (child := os.fork()):  # each imports the library, and torch is there already
        sys.modules[hidden] = None  # so that nothing finds it
        use()
        print("without", feature, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.medium
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_plain_model_works_without_the_folder_of_any_feature() -> None:
    command = [sys.executable, "-c", WITHOUT, *FEATURES]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.splitlines() == [f"without {feature}" for feature in FEATURES], done.stderr


SCRIPT = """
import json, logging, random, sys, warnings
import numpy, torch

def facts():
    return {
        "threads": torch.get_num_threads(),
        "default dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch generator": torch.get_rng_state().sum().item(),
        "python generator": hash(random.getstate()),
        "numpy generator": hash(numpy.random.get_state()[1].tobytes()),
        "warning filters": len(warnings.filters),
        "log handlers": len(logging.getLogger().handlers),
        "cuda": torch.cuda.is_initialized(),
    }

torch_only = sorted(sys.modules)
before = facts()
import randlora
is_lazy, listed = "randlora.api" not in sys.modules, dir(randlora)
from randlora.files import plan
of_files = [*sys.modules]
randlora.inject
loaded = sorted(set(sys.modules) - set(torch_only))
print(json.dumps({
    "is_lazy": is_lazy, "listed": listed, "of_files": of_files, "before": before, "after": facts(), "loaded": loaded
}))
"""


@pytest.mark.medium
def test_importing_the_library_imports_its_files_but_the_command_line_and_nothing_optional() -> None:
    command = [sys.executable, "-W", "error", "-c", SCRIPT]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stderr == ""
    fresh = json.loads(result.stdout)
    assert {f"randlora.{feature}" for feature in FEATURES} <= {*fresh["of_files"]}, "functions on files know them"
    optional = {"transformers", "peft", "accelerate", "huggingface_hub", "bitsandbytes", "torchao", "rich", "typer"}
    assert not optional & {module.split(".")[0] for module in fresh["loaded"]}
    assert fresh["is_lazy"]
    assert {*PUBLIC, "__version__"} <= {*fresh["listed"]}
    names = {f"randlora.{name}".removesuffix(".") for name in modules() if floor(name) <= floor("")}
    assert names <= set(fresh["loaded"])
    assert fresh["after"] == fresh["before"], "and it changes no global state"
    assert fresh["after"]["cuda"] is False


def test_the_public_names_are_complete_and_sorted() -> None:
    public = {
        name
        for name, value in vars(randlora.api).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert sorted({*public, "errors", "files", "serving"}) == PUBLIC
    for name in public:
        defined_in = inspect.getmodule(getattr(randlora, name))
        assert defined_in is None or defined_in.__name__.startswith("randlora."), name


MODULES = {
    "bases": "BasisBank BasisSpec",
    "checkpoint": "AdapterState",
    "config": "ByPattern LayerOptions",
    "errors": "RandLoRAError",
    "files": "load_model",
    "layers": "AdapterLayer register_layer",
    "readers": "ReadWeight",
    "report": "Report",
    "serving": "AdapterPool combine routed",
}


@pytest.mark.parametrize(("module", "names"), MODULES.items())
def test_names_are_in_the_modules_that_the_changelog_names(module: str, names: str) -> None:
    found = importlib.import_module(f"randlora.{module}")
    assert {*names.split()} <= {*dir(found)}


def test_the_version_is_the_projects_and_the_package_says_that_it_is_typed() -> None:
    assert randlora.__version__ == PROJECT["version"]
    assert (PACKAGE / "py.typed").read_bytes() == b""

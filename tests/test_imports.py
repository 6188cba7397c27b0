"""What importing the library costs, what it offers, and that its files import each other one way."""

import ast
import json
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import randlora

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "randlora"

FLOORS = (
    ("errors",),
    ("config",),
    ("functional.cost", "functional.scratch", "bases", "bases.compact", "bases.spec"),
    ("functional.diagonals", "bases.portable_stream", "bases.torch_stream"),
    ("functional.block", "functional.dense", "functional.few_tokens", "functional.sparse"),
    ("functional.adapted",),
    ("functional.operation",),
    ("functional",),
    ("bank",),
    ("state",),
    ("layers.folding", "layers.inputs"),
    ("layers.base",),
    ("registry", "layers.bnb_codes", "layers.quantized"),
    ("layers.bnb", "layers.conv1d", "layers.linear"),
    ("layers", "match", "presets"),
    ("walk",),
    ("report", "train_also"),
    ("install",),
    ("inject",),
    ("adapters", "compute", "merge", "prepare"),
    ("checkpoint.base_model", "checkpoint.layout", "checkpoint.tensors_file", "checkpoint.write"),
    ("checkpoint.header", "checkpoint.peft_config"),
    ("checkpoint.card", "checkpoint.read"),
    ("checkpoint.bases", "checkpoint.contents", "checkpoint.fit", "checkpoint.hub", "checkpoint.tied"),
    ("checkpoint.locate",),
    ("checkpoint.load", "checkpoint.save"),
    ("checkpoint",),
    ("files.model_directory", "files.order", "files.kinds", "files.progress", "files.low_rank", "files.summary"),
    ("files.companions", "files.names", "files.staging", "files.tensor_file"),
    ("files.codes",),
    ("files.bnb_layout",),
    ("files.quantized",),
    ("files.skeleton",),
    ("files.adapter", "files.changes", "files.output", "files.plan"),
    ("files.inspect", "files.merge", "files.to_lora", "files.verify"),
    ("files.convert",),
    ("files",),
    ("",),  # the package itself
    ("cli.arguments", "cli.output"),
    ("cli.convert", "cli.inspect", "cli.merge", "cli.plan", "cli.verify"),
    ("cli.app",),
    ("cli",),
    ("__main__",),
)
"""A file imports from the floors below its own only: neither upwards nor its siblings."""

OPTIONAL = {
    "checkpoint.hub": {"huggingface_hub"},
    "files.codes": {"bitsandbytes"},
    "layers.bnb_codes": {"bitsandbytes"},
}
"""What a file may import beyond what the project depends on, inside functions only."""

FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}


@cache
def modules() -> dict[str, ast.Module]:
    """Parse every file of the package, by its name inside it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").removesuffix(".")] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imported(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Go through what a file imports, functions' own imports included, with the level of relative ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = {name for name in whole if name.removeprefix("randlora.") in modules()}
            yield from ((name, node.level) for name in submodules or {str(node.module)})


every_module = pytest.mark.parametrize("name", sorted(modules()), ids=lambda name: name or "randlora")


def test_every_file_has_its_floor_and_every_floor_its_files() -> None:
    assert sorted(FLOOR_OF) == sorted(modules())


@every_module
def test_a_file_imports_from_the_floors_below_it_only(name: str) -> None:
    inner = {
        target.removeprefix("randlora").removeprefix(".")
        for target, _ in imported(modules()[name])
        if target.split(".")[0] == "randlora"
    }
    assert {target for target in inner if FLOOR_OF[target] >= FLOOR_OF[name]} == set()


@every_module
def test_a_file_imports_by_full_names(name: str) -> None:
    assert [target for target, level in imported(modules()[name]) if level] == []


@every_module
def test_a_file_imports_what_the_project_depends_on_and_nothing_else(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {requirement.split(">")[0] for requirement in project["dependencies"]}
    assert declared == {"torch", "safetensors", "numpy"}
    foreign = {target.split(".")[0] for target, _ in imported(modules()[name])} - set(sys.stdlib_module_names)
    is_command_line = FLOOR_OF[name] > FLOOR_OF[""]
    optional = OPTIONAL.get(name, {"typer", "rich"} if is_command_line else set())
    assert foreign <= declared | optional | {"randlora"}


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
print(json.dumps({"before": before, "after": facts(), "loaded": sorted(set(sys.modules) - set(torch_only))}))
"""


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    """What a fresh interpreter says of itself before and after importing the library."""
    command = [sys.executable, "-W", "error", "-c", SCRIPT]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stderr == ""
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize(
    "name",
    [
        "transformers",
        "peft",
        "accelerate",
        "huggingface_hub",
        "bitsandbytes",
        "rich",
        "typer",
        "matplotlib",
        "hypothesis",
        "pytest",
    ],
)
def test_importing_the_library_does_not_import(name: str, fresh: dict[str, Any]) -> None:
    assert [module for module in fresh["loaded"] if module.split(".")[0] == name] == []


def test_importing_the_library_imports_every_file_of_it_but_the_command_line(fresh: dict[str, Any]) -> None:
    names = {f"randlora.{name}".removesuffix(".") for name in modules() if FLOOR_OF[name] <= FLOOR_OF[""]}
    assert names <= set(fresh["loaded"])


def test_importing_the_library_changes_no_global_state(fresh: dict[str, Any]) -> None:
    assert fresh["after"] == fresh["before"]
    assert fresh["after"]["cuda"] is False


def test_the_public_names_are_complete_and_sorted() -> None:
    public = {
        name
        for name, value in vars(randlora).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert randlora.__all__ == sorted(public)


@pytest.mark.parametrize("name", randlora.__all__)
def test_a_public_name_can_be_imported_and_is_the_librarys_own(name: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"from randlora import {name}", namespace)
    assert namespace[name] is getattr(randlora, name)
    assert namespace[name].__module__.split(".")[0] == "randlora"


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert randlora.__version__ == project["version"]


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").read_bytes() == b""

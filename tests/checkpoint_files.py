"""Small models to save adapters of, directories to damage, and snapshots that tell whether a call left a trace."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import randlora
from randlora.bases.basis import Basis
from randlora.checkpoint.header import facts_of, parse_header, seal_of
from randlora.errors import CheckpointError
from randlora.state import attached_state
from tests.kit import adapt, adapter_values, all_bits, bits, untouched

Stored = Literal["seed", "stored"]

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"

PREFIX = "base_model.model."
LAMBDA, GAMMA = f"{PREFIX}0.randlora_lambda", f"{PREFIX}0.randlora_gamma"
BASIS_A, BASIS_B = "base_model.randlora_A", "base_model.randlora_B"


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.again(torch.tanh(self.first(x))))
        return output


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7))
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.norm(self.body(x)))
        return output


class Odd(nn.Module):
    """Names that look like the library's own, or need quoting, and parameters of unusual forms, two of them tied."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module('größe "a\\b"', nn.Linear(6, 4))
        self.add_module("randlora_lambda", nn.Linear(4, 4))
        self.base_model = nn.ModuleDict({"model": nn.Linear(4, 5)})
        self.block = nn.ModuleDict({"base_layer": nn.LayerNorm(5), "twin": nn.LayerNorm(5)})
        self.block["twin"].weight = self.block["base_layer"].weight
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0))
        self.transposed = nn.Parameter(torch.randn(5, 3).T)

    def forward(self, x: Tensor) -> Tensor:
        x = self.get_submodule("randlora_lambda")(self.get_submodule('größe "a\\b"')(x))
        x = self.block["twin"](self.block["base_layer"](self.base_model["model"](x)))
        return x * self.scalar + self.transposed.sum(dim=0) + self.empty.sum()


@dataclass(frozen=True)
class Case:
    """A model for inputs ``(rows, 6)``, and what `randlora.inject` is told beside r and the bases."""

    name: str
    make: Callable[[], nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().to(self.dtype).eval()

    def output(self, model: nn.Module) -> Tensor:
        x = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(3, 6).to(self.dtype)
        with torch.no_grad():
            output: Tensor = model(x)
        return output


def _conv1d() -> nn.Module:
    model = nn.Sequential(Conv1D(9, 6), nn.Tanh(), Conv1D(5, 9))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


LINEAR = Case("Linear", lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 5)))
BY_LAYER = {"head": 3, ".*": 2}
HEADED = Case("head-and-bias", Headed, {"targets": ["0", "2"], "train_also": ["head", "norm.bias"]})
CASES = (
    LINEAR,
    Case("Conv1D", _conv1d),
    Case(
        "mixed-sizes", lambda: nn.Sequential(nn.Linear(6, 17), nn.Tanh(), nn.Linear(17, 3, bias=False), Conv1D(12, 3))
    ),
    Case("two-places", Twice, {"targets": "all-linear"}),
    HEADED,
    Case("biases-of-targets", Headed, {"targets": ["0", "2"], "train_also": r"body\.\d\.bias"}),
    Case("odd-names-and-parameters", Odd, {"train_also": ["block", "scalar", "empty", "transposed"]}),
    Case("bfloat16", Headed, {"targets": ["0"], "train_also": ["head"]}, torch.bfloat16),
    Case("float64", Headed, {"targets": ["0", "2"], "train_also": ["head"]}, torch.float64),
    Case("r-and-alpha-by-layer", Headed, {"targets": ["0", "2", "head"], "r": BY_LAYER, "alpha": {"0": 7.5, ".*": 4}}),
)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
both_ways = pytest.mark.parametrize("bases", ["seed", "stored"])


def trained(case: Case, *, name: str = "default", **options: Any) -> nn.Module:
    model = case.build()
    return adapt(model, **{"r": 2, **case.options, **options}, name=name)


def basis_of(model: nn.Module, name: str = "default") -> Basis:
    (basis,) = bases_of(model, name).values()
    return basis


def understood(model: nn.Module, case: Case) -> tuple[object, ...]:
    """All but the names that a file says about an adapter, as a model understood it, and what it computes."""
    (info,) = randlora.adapters(model)
    return info.options, info.specs, all_bits(adapter_values(model)), bits(case.output(model))


def bases_of(model: nn.Module, name: str = "default") -> dict[int, Basis]:
    state = attached_state(model)
    assert state is not None, "the model is adapted"
    return state.adapter(name).bases


def refused(
    model: nn.Module, directory: Path | str, match: str, *, error: type[Exception] = CheckpointError, **options: Any
) -> None:
    with untouched(model), pytest.raises(error, match=re.escape(match)):
        randlora.load(model, directory, **options)


def doubted(model: nn.Module, directory: Path | str, match: str) -> None:
    """Load with `randlora.load`, and check that a warning says ``match``, as does the report."""
    with pytest.warns(UserWarning, match=re.escape(match)) as warned:
        report = randlora.load(model, directory)
    (message,) = (str(warning.message) for warning in warned)
    assert message in report.notes


def read_tensors(directory: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(directory / TENSORS_FILE, framework="pt") as file:
        return {key: file.get_tensor(key) for key in sorted(file.keys())}, file.metadata() or {}


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, directory / TENSORS_FILE, dict(metadata))


def read_fields(directory: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    return fields


def edit_fields(directory: Path, changes: Mapping[str, Any], *, drop: Sequence[str] = ()) -> None:
    fields = {key: value for key, value in {**read_fields(directory), **changes}.items() if key not in drop}
    (directory / CONFIG_FILE).write_text(json.dumps(fields), encoding="utf-8")


def edit_tensors(directory: Path, changes: Mapping[str, Tensor], *, drop: Sequence[str] = ()) -> None:
    """Change some tensors as PEFT might have written them: without our header, which would tell."""
    tensors, _ = read_tensors(directory)
    changed = {key: tensor for key, tensor in {**tensors, **changes}.items() if key not in drop}
    write_tensors(directory, changed, {"format": "pt"})


def peft_directory(directory: Path, case: Case = LINEAR, **options: Any) -> Path:
    """Save a trained adapter as PEFT would: with both bases and without our header."""
    randlora.save(trained(case, **options), directory, bases="stored")
    edit_tensors(directory, {})
    return directory


def foreign(directory: Path, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    drawn = {BASIS_A: torch.randn(2, 1, 5, generator=generator), BASIS_B: torch.randn(6, 3, 2, generator=generator)}
    edit_tensors(peft_directory(directory), drawn)
    return directory


def reseal(
    directory: Path,
    /,
    changes: Mapping[str, Tensor] | None = None,
    *,
    drop: Sequence[str] = (),
    digest: str | None = None,
    **facts: Any,
) -> None:
    """Change tensors, the digest of the bases and facts of the header, and seal them as a save would have."""
    tensors, metadata = read_tensors(directory)
    header = replace(parse_header(metadata["randlora"], tensors), **facts)
    if digest is not None:
        header = replace(header, bases={r: replace(record, digest=digest) for r, record in header.bases.items()})
    changed = {key: tensor for key, tensor in {**tensors, **(changes or {})}.items() if key not in drop}
    write_tensors(directory, changed, metadata | seal_of(facts_of(header), changed).metadata)

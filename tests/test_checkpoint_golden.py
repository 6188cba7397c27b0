"""Files of the first releases, loaded for ever to numbers written down when they were made: see tests/golden.py too.

Every value in them is a formula's, and every number exact in any order of summation in float64.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from tests.checkpoint_files import Case, Stored, bases_of, basis_of, read_fields, read_tensors
from tests.kit import adapter_values, bits, snapshot

DATA = Path(__file__).parent / "data"
TARGETS = ("wide", "tall")
SIDES = {"wide": (6, 4), "tall": (5, 4)}


class Body(nn.Module):
    """Two layers to adapt, one of each orientation, and a norm trained beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(6, 4)
        self.tall = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.norm(self.tall(self.wide(x)))
        return output


class Stacks(nn.Module):
    """Stacks of matrices (out, in), and (in, out), which says so as transformers' classes do, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.turned = nn.Module(), nn.Module()
        self.plain.gate_up_proj = nn.Parameter(torch.ones(3, 4, 6))
        vars(self.turned)["is_transposed"] = True
        self.turned.down_proj = nn.Parameter(torch.ones(3, 4, 5))
        self.linear = nn.Linear(6, 3)


CASE, STACKS = Case("golden", Body, dtype=torch.float64), Case("stacks", Stacks, dtype=torch.float64)
GOLDEN: dict[str, tuple[Case, Stored]] = {
    "golden_v1": (CASE, "seed"),
    "golden_v1_block": (CASE, "seed"),
    "golden_v1_torch": (CASE, "seed"),
    "golden_v1_stored": (CASE, "stored"),
    "golden_v2_options": (CASE, "seed"),
    "golden_v2_each": (STACKS, "seed"),
    "golden_v2_shared": (STACKS, "seed"),
}
"""Directories under tests/data: the model that each is for, and whether it holds bases, which no seed brings back."""

every_golden = pytest.mark.parametrize(("name", "case", "bases"), [(name, *how) for name, how in GOLDEN.items()])


def expect(model: nn.Module) -> dict[str, Any]:
    """Note the numbers that a directory must load to."""
    (info,) = randlora.adapters(model)
    found: dict[str, Any] = {
        "delta_weight": {fqn: randlora.delta_weight(model, fqn).tolist() for fqn in info.targets},
        "targets": list(info.targets),
    }
    if "linear" in info.targets:
        return {**found, "basis_sha256": basis_of(model).digest(6, 4), "experts": info.config.experts}
    found |= {
        "dropout": info.config.dropout,
        "seed": info.config.seed,
        "basis": info.config.basis,
        "train_also": sorted(info.train_also),
    }
    if not isinstance(info.config.r, Mapping):
        return {
            **found, "basis_sha256": basis_of(model).digest(6, 4), "r": info.config.r, "alpha": info.config.alpha
        }  # fmt: skip
    return {
        **found,
        "bases_sha256": {str(r): bases_of(model)[r].digest(*SIDES[fqn]) for fqn, (r, _) in info.options.items()},
        "options": {fqn: list(options) for fqn, options in info.options.items()},
    }


@every_golden
def test_a_golden_file_loads_to_the_numbers_written_down_with_it(name: str, case: Case, bases: Stored) -> None:
    model = case.build()
    before = snapshot(model)
    randlora.load(model, DATA / name)
    assert expect(model) == json.loads((DATA / name / "expected.json").read_text(encoding="utf-8"))
    assert (basis_of(model).stored is None) == (bases == "seed") if name != "golden_v2_options" else True
    if case is CASE:
        weight, bias = (adapter_values(model)[f"norm.{part}"] for part in ("weight", "bias"))
        assert bits(weight) == bits(torch.tensor([1 + index / 4 for index in range(5)], dtype=torch.float64))
        assert bits(bias) == bits(torch.tensor([index / 2 - 1 for index in range(5)], dtype=torch.float64))
    randlora.eject(model)
    assert snapshot(model) == before
    assert randlora.files.verify(DATA / name).passed


@every_golden
def test_a_golden_file_that_was_loaded_is_saved_as_it_was(name: str, case: Case, bases: Stored, tmp_path: Path) -> None:
    model = case.build()
    randlora.load(model, DATA / name)
    randlora.save(model, tmp_path, bases=bases)
    (tensors, metadata), (theirs, their_metadata) = read_tensors(tmp_path), read_tensors(DATA / name)
    assert {key: bits(tensor) for key, tensor in tensors.items()} == {key: bits(each) for key, each in theirs.items()}
    assert lasting_facts(metadata) == lasting_facts(their_metadata)
    assert read_fields(tmp_path) == read_fields(DATA / name)


def lasting_facts(metadata: dict[str, str]) -> dict[str, Any]:
    """Read a header without versions, what the first ones did not have, and the seal over it."""
    facts: dict[str, Any] = json.loads(metadata["randlora"])
    newer = ("library_version", "sha256", "torch_version", "transposed")
    return {name: fact for name, fact in facts.items() if name not in newer}

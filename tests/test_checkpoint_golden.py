"""Files of every format version, made once and loaded for ever, to numbers written down when they were made.

``python -m tests.test_checkpoint_golden`` makes the directories of `GOLDEN` that are missing under tests/data; one that
is there is never made again. Every number in them is a formula's, and exact in any order of summation in float64.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from tests import reference
from tests.checkpoint_files import (
    Case,
    bases_of,
    basis_of,
    edit_tensors,
    read_fields,
    read_tensors,
)
from tests.kit import adapter_values, all_bits, bits, snapshot

DATA = Path(__file__).parent / "data"
EXPECTED_FILE = "expected.json"
TARGETS = ("wide", "tall")


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


CASE = Case("golden", Body, dtype=torch.float64)


@dataclass(frozen=True)
class Golden:
    """A directory under tests/data.

    Attributes:
        name: The directory.
        options: What `randlora.inject` was told.
        stored: Whether it holds bases, which no seed brings back.
        ranks: r of each target.
        alphas: alpha of each target.
    """

    name: str
    options: Mapping[str, Any]
    stored: bool = False
    ranks: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(TARGETS, 2))
    alphas: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(TARGETS, 4.0))


GOLDEN = (
    Golden("golden_v1", {"stream": "portable", "seed": 2**63 + 5}),
    Golden("golden_v1_block", {"basis": "block", "blocks": (2, 2), "seed": 3}),
    Golden("golden_v1_torch", {"stream": "torch", "seed": 11}),
    Golden("golden_v1_stored", {"stream": "torch", "seed": 0}, stored=True),
    Golden(
        "golden_v2_options",
        {"r": {"tall": 3, ".*": 2}, "alpha": {"wide": 4.0, ".*": 1.5}, "stream": "portable", "seed": 7},
        ranks={"wide": 2, "tall": 3},
        alphas={"wide": 4.0, "tall": 1.5},
    ),
)

every_golden = pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.name)


def lam(fqn: str, r: int = 2) -> Tensor:
    """Λ of one target, (r, 2), in eighths."""
    start = 1 + TARGETS.index(fqn)
    return torch.tensor([[(start + k - 3 * j) / 8 for j in range(2)] for k in range(r)])


def sides(fqn: str) -> tuple[int, int]:
    """Return the larger and the smaller dim of one target."""
    return {"wide": (6, 4), "tall": (5, 4)}[fqn]


def gamma(fqn: str) -> Tensor:
    """Γ of one target, (2, 4), in quarters."""
    start = 3 + TARGETS.index(fqn)
    return torch.tensor([[(start + 2 * j - c) / 4 for c in range(4)] for j in range(2)])


def stored_bases() -> dict[str, Tensor]:
    """A and B that no seed draws, in halves and quarters."""
    return {
        "base_model.randlora_A": torch.tensor([[[((k + 2 * c) % 5 - 2) / 2 for c in range(5)]] for k in range(2)]),
        "base_model.randlora_B": torch.tensor([
            [[((i + 3 * j + k) % 7 - 3) / 4 for k in range(2)] for j in range(3)] for i in range(6)
        ]),
    }


def beside() -> dict[str, Tensor]:
    """What was trained beside the adapter."""
    return {
        "norm.weight": torch.tensor([1 + index / 4 for index in range(5)], dtype=torch.float64),
        "norm.bias": torch.tensor([index / 2 - 1 for index in range(5)], dtype=torch.float64),
    }


def build(golden: Golden) -> nn.Module:
    """Make the model whose adapter a golden directory holds."""
    model = CASE.build()
    options: dict[str, Any] = {**golden.options, "targets": list(TARGETS), "train_also": ["norm"]}
    randlora.inject(model, **{"r": 2, "alpha": 4.0, "dropout": 0.125, **options})
    values = adapter_values(model)
    for fqn in TARGETS:
        values[f"{fqn}.randlora_lambda"].data.copy_(lam(fqn, golden.ranks[fqn]))
        values[f"{fqn}.randlora_gamma"].data.copy_(gamma(fqn))
    for fqn, tensor in beside().items():
        values[fqn].data.copy_(tensor)
    if not golden.stored:
        return model
    with tempfile.TemporaryDirectory() as directory:
        randlora.save(model, directory, bases="stored")
        edit_tensors(Path(directory), stored_bases())
        model = CASE.build()
        randlora.load(model, directory)
    return model


def make(golden: Golden, directory: Path) -> None:
    """Save an adapter as a golden directory."""
    randlora.save(build(golden), directory, bases="stored" if golden.stored else "seed")


def expect(model: nn.Module) -> dict[str, Any]:
    """Note the numbers that a golden directory must load to."""
    (info,) = randlora.adapters(model)
    by_layer: dict[str, Any] = {
        "bases_sha256": {str(r): bases_of(model)[r].digest(*sides(fqn)) for fqn, (r, _) in info.options.items()},
        "options": {fqn: list(options) for fqn, options in info.options.items()},
    }
    if not isinstance(info.config.r, Mapping):
        by_layer = {"basis_sha256": basis_of(model).digest(6, 4), "r": info.config.r, "alpha": info.config.alpha}
    return {
        **by_layer,
        "delta_weight": {fqn: randlora.delta_weight(model, fqn).tolist() for fqn in TARGETS},
        "dropout": info.config.dropout,
        "seed": info.config.seed,
        "basis": info.config.basis,
        "targets": list(info.targets),
        "train_also": sorted(info.train_also),
    }


def load(golden: Golden) -> nn.Module:
    """Load a golden directory into a plain model."""
    model = CASE.build()
    randlora.load(model, DATA / golden.name)
    return model


@every_golden
def test_a_golden_file_loads_to_the_numbers_written_down_with_it(golden: Golden) -> None:
    expected = json.loads((DATA / golden.name / EXPECTED_FILE).read_text(encoding="utf-8"))
    assert expect(load(golden)) == expected


@every_golden
def test_a_golden_file_holds_the_formulas_values(golden: Golden) -> None:
    values = adapter_values(load(golden))
    expected = {
        **{f"{fqn}.randlora_lambda": lam(fqn, golden.ranks[fqn]) for fqn in TARGETS},
        **{f"{fqn}.randlora_gamma": gamma(fqn) for fqn in TARGETS},
        **beside(),
    }
    assert all_bits(values) == all_bits(expected)


@every_golden
@pytest.mark.parametrize("fqn", TARGETS)
def test_the_numbers_written_down_are_the_methods(golden: Golden, fqn: str) -> None:
    expected = json.loads((DATA / golden.name / EXPECTED_FILE).read_text(encoding="utf-8"))["delta_weight"][fqn]
    r, alpha = golden.ranks[fqn], golden.alphas[fqn]
    bases = bases_of(load(golden))[r].slices(*sides(fqn), device="cpu", dtype=torch.float64)
    values = lam(fqn, r), gamma(fqn)
    oracle = reference.delta_weight(*bases, *values, alpha / r, in_features=6 if fqn == "wide" else 4)
    assert oracle.tolist() == expected


def test_golden_bases_of_no_seed_are_those_in_the_file() -> None:
    tensors, _ = read_tensors(DATA / "golden_v1_stored")
    assert {name: bits(tensors[name]) for name in stored_bases()} == all_bits(stored_bases())


@every_golden
def test_a_save_of_today_holds_what_the_golden_file_holds(golden: Golden, tmp_path: Path) -> None:
    make(golden, tmp_path)
    tensors, metadata = read_tensors(tmp_path)
    theirs, their_metadata = read_tensors(DATA / golden.name)
    assert all_bits(tensors) == all_bits(theirs)
    assert lasting_facts(metadata) == lasting_facts(their_metadata)
    assert read_fields(tmp_path) == read_fields(DATA / golden.name)


def lasting_facts(metadata: dict[str, str]) -> dict[str, Any]:
    """Read a header without versions and the seal over it."""
    facts: dict[str, Any] = json.loads(metadata["randlora"])
    newer = ("library_version", "sha256", "torch_version", "transposed")
    return {name: fact for name, fact in facts.items() if name not in newer}


@every_golden
def test_a_golden_file_is_taken_off_again_without_a_trace(golden: Golden) -> None:
    model = CASE.build()
    before = snapshot(model)
    randlora.load(model, DATA / golden.name)
    randlora.eject(model)
    assert snapshot(model) == before


if __name__ == "__main__":
    for missing in (golden for golden in GOLDEN if not (DATA / golden.name).exists()):
        make(missing, DATA / missing.name)
        text = json.dumps(expect(build(missing)), indent=2, sort_keys=True)
        (DATA / missing.name / EXPECTED_FILE).write_text(f"{text}\n", encoding="utf-8")

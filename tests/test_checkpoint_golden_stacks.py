"""Files of format version 2 with stacks of matrices, made once and loaded for ever, as in test_checkpoint_golden.

``python -m tests.test_checkpoint_golden_stacks`` makes the directories of `GOLDEN` that are missing under tests/data.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from tests import reference
from tests.checkpoint_files import basis_of, read_fields, read_tensors
from tests.kit import adapter_values, all_bits, snapshot
from tests.test_checkpoint_golden import DATA, EXPECTED_FILE, lasting_facts

GOLDEN: dict[str, dict[str, Any]] = {
    "golden_v2_each": {"stream": "portable", "seed": 5},
    "golden_v2_shared": {"stream": "portable", "seed": 5, "experts": "shared"},
}
SIDES = {"plain.gate_up_proj": (4, 6), "turned.down_proj": (5, 4), "linear": (3, 6)}
"""``(out_features, in_features)`` by target."""
MATRICES = 3

every_golden = pytest.mark.parametrize("name", GOLDEN)


class Plain(nn.Module):
    """A stack of matrices (out, in)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.ones(MATRICES, 4, 6, dtype=torch.float64))


class Turned(nn.Module):
    """A stack of matrices (in, out), which says so as transformers' classes do."""

    def __init__(self) -> None:
        super().__init__()
        self.is_transposed = True
        self.down_proj = nn.Parameter(torch.ones(MATRICES, 4, 5, dtype=torch.float64))


class Body(nn.Module):
    """Both kinds of stacks, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = Plain()
        self.turned = Turned()
        self.linear = nn.Linear(6, 3, dtype=torch.float64)


def values(name: str, fqn: str) -> tuple[Tensor, Tensor]:
    """Λ and Γ of one target, in eighths and quarters: stacks unless there is one for all."""
    stack = MATRICES if fqn != "linear" and name == "golden_v2_each" else 1
    start, min_dim = 1 + [*SIDES].index(fqn), min(SIDES[fqn])
    bases = -(-min_dim // 2)
    lam = [[[(start + e + k - 3 * j) / 8 for j in range(bases)] for k in range(2)] for e in range(stack)]
    gamma = [[[(start - e + 2 * j - c) / 4 for c in range(min_dim)] for j in range(bases)] for e in range(stack)]
    pair = torch.tensor(lam), torch.tensor(gamma)
    return pair if stack > 1 else (pair[0][0], pair[1][0])


def expected_values(name: str) -> dict[str, Tensor]:
    """All Λ and Γ, as `adapter_values` names them."""
    pairs = {fqn: values(name, fqn) for fqn in SIDES}
    return {
        f"{fqn}.{part}": value
        for fqn, pair in pairs.items()
        for part, value in zip(("randlora_lambda", "randlora_gamma"), pair, strict=True)
    }


def build(name: str) -> nn.Module:
    """Make the model whose adapter a golden directory holds."""
    model = Body()
    randlora.inject(model, r=2, alpha=4.0, targets=[*SIDES], **GOLDEN[name])
    own = adapter_values(model)
    for key, value in expected_values(name).items():
        own[key].data.copy_(value)
    return model


def expect(model: nn.Module) -> dict[str, Any]:
    """Note the numbers that a golden directory must load to."""
    (info,) = randlora.adapters(model)
    return {
        "basis_sha256": basis_of(model).digest(6, 4),
        "delta_weight": {fqn: randlora.delta_weight(model, fqn).tolist() for fqn in SIDES},
        "experts": info.config.experts,
        "targets": list(info.targets),
    }


def load(name: str) -> nn.Module:
    """Load a golden directory into a plain model."""
    model = Body()
    randlora.load(model, DATA / name)
    return model


def written_down(name: str) -> dict[str, Any]:
    """Read the numbers that were noted when a golden directory was made."""
    found: dict[str, Any] = json.loads((DATA / name / EXPECTED_FILE).read_text(encoding="utf-8"))
    return found


@every_golden
def test_a_golden_file_loads_to_the_numbers_written_down_with_it(name: str) -> None:
    assert expect(load(name)) == written_down(name)


@every_golden
def test_a_golden_file_holds_the_formulas_values(name: str) -> None:
    assert all_bits(adapter_values(load(name))) == all_bits(expected_values(name))


@every_golden
@pytest.mark.parametrize("fqn", SIDES)
def test_the_numbers_written_down_are_the_methods(name: str, fqn: str) -> None:
    out_features, in_features = SIDES[fqn]
    sides = max(SIDES[fqn]), min(SIDES[fqn])
    bases = basis_of(load(name)).slices(*sides, device="cpu", dtype=torch.float64)
    lam, gamma = (value.reshape(-1, *value.shape[-2:]) for value in values(name, fqn))
    oracle = torch.stack([
        reference.delta_weight(*bases, own_lam, own_gamma, 4 / 2, in_features=in_features)
        for own_lam, own_gamma in zip(lam, gamma, strict=True)
    ])
    assert oracle.shape[1:] == (out_features, in_features)
    found = torch.tensor(written_down(name)["delta_weight"][fqn], dtype=torch.float64)
    assert torch.equal(found, oracle if found.dim() == 3 else oracle[0])


@every_golden
def test_a_golden_file_has_version_2_and_says_kinds_and_layouts(name: str) -> None:
    header = json.loads(read_tensors(DATA / name)[1]["randlora"])
    assert header["format_version"] == 2
    assert header["kinds"] == {"plain.gate_up_proj": "experts", "turned.down_proj": "experts"}
    assert header["transposed"] == ["turned.down_proj"]
    assert randlora.files.verify(DATA / name).passed


@every_golden
def test_a_save_of_today_holds_what_the_golden_file_holds(name: str, tmp_path: Path) -> None:
    randlora.save(build(name), tmp_path)
    tensors, metadata = read_tensors(tmp_path)
    theirs, their_metadata = read_tensors(DATA / name)
    assert all_bits(tensors) == all_bits(theirs)
    assert lasting_facts(metadata) == lasting_facts(their_metadata)
    assert read_fields(tmp_path) == read_fields(DATA / name)


@every_golden
def test_a_golden_file_is_taken_off_again_without_a_trace(name: str) -> None:
    model = Body()
    before = snapshot(model)
    randlora.load(model, DATA / name)
    randlora.eject(model)
    assert snapshot(model) == before


if __name__ == "__main__":
    for missing in (name for name in GOLDEN if not (DATA / name).exists()):
        randlora.save(build(missing), DATA / missing)
        text = json.dumps(expect(build(missing)), indent=2, sort_keys=True)
        (DATA / missing / EXPECTED_FILE).write_text(f"{text}\n", encoding="utf-8")

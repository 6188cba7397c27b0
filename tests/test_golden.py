"""The matrix of golden files, tests/golden.py: every one loads, for ever, to the same bits and to what they mean."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from tests import reference
from tests.checkpoint_files import bases_of, read_fields, read_tensors
from tests.golden import BODIES, GOLDEN, SEED, TRAINED, TRANSPOSED, Golden, build, expected_values, make, plain
from tests.kit import adapter_values, all_bits, snapshot

LAST = {"library_version", "sha256", "torch_version"}
"""What a header says of the library that wrote it, and the seal over it."""

every_golden = pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.name)


def header_of(golden: Golden) -> dict[str, Any]:
    """Read the header of a golden file as JSON."""
    header: dict[str, Any] = json.loads(read_tensors(golden.directory)[1]["randlora"])
    return header


def load(golden: Golden) -> nn.Module:
    """Load a golden directory into a plain model."""
    model = plain(BODIES[golden.body])
    randlora.load(model, golden.directory)
    return model


def oracle_update(golden: Golden, model: nn.Module, fqn: str) -> Tensor:
    """Compute one update in loops, from the values that the file should hold and the bases that it loaded with."""
    body = BODIES[golden.body]
    r, alpha = body.ranks.get(fqn, 2), 2.0 if fqn in body.ranks else 4.0
    *stack, out_features, in_features = body.shapes[fqn]
    sides = max(out_features, in_features), min(out_features, in_features)
    bases = bases_of(model)[r].slices(*sides, device="cpu", dtype=torch.float64)
    expected = expected_values(body)
    lam, gamma = (expected[f"{fqn}.{part}"] for part in ("randlora_lambda", "randlora_gamma"))
    pairs = zip(lam, gamma, strict=True) if stack else [(lam, gamma)]
    updates = [
        reference.delta_weight(*bases, own_lam, own_gamma, alpha / r, in_features=in_features)
        for own_lam, own_gamma in pairs
    ]
    return torch.stack(updates) if stack else updates[0]


def changed(golden: Golden, adapted: nn.Module) -> nn.Module:
    """Make a plain model with the oracle's updates in its weights, and what was trained beside them."""
    model = plain(BODIES[golden.body])
    with torch.no_grad():
        for fqn in BODIES[golden.body].shapes:
            update = oracle_update(golden, adapted, fqn)
            update = update.mT if fqn in TRANSPOSED else update
            parameters = dict(model.named_parameters())
            weight = parameters.get(fqn, parameters.get(f"{fqn}.weight"))
            assert weight is not None
            weight.add_(update.reshape(weight.shape) if update.numel() == weight.numel() else update)
        model.get_parameter(TRAINED).copy_(expected_values(BODIES[golden.body])[TRAINED])
    return model


@every_golden
def test_a_golden_file_loads_to_its_values_bases_and_options(golden: Golden) -> None:
    model, body, header = load(golden), BODIES[golden.body], header_of(golden)
    assert all_bits(adapter_values(model)) == all_bits(expected_values(body))
    assert header["format_version"] == body.format_version
    (info,) = randlora.adapters(model)
    assert (info.config.basis, info.config.seed, {*info.targets}) == (golden.kind, SEED, {*body.shapes})
    assert {spec.stream for spec in info.specs} == {golden.stream}
    records = header.get("bases", {"2": header})
    ranks = {r: [shape[-2:] for fqn, shape in body.shapes.items() if body.ranks.get(fqn, 2) == r] for r in (2, 4)}
    digests = {
        str(r): bases_of(model)[r].digest(max(map(max, shapes)), max(map(min, shapes)))
        for r, shapes in ranks.items()
        if shapes
    }
    assert digests == {r: record["basis_sha256"] for r, record in records.items()}


@every_golden
def test_a_golden_file_computes_what_the_loops_compute_also_merged(golden: Golden) -> None:
    model = load(golden)
    for fqn in BODIES[golden.body].shapes:
        oracle = oracle_update(golden, model, fqn)
        torch.testing.assert_close(randlora.delta_weight(model, fqn).reshape(oracle.shape), oracle, rtol=0, atol=1e-12)
    tokens = torch.arange(10).reshape(2, 5) % 7
    with torch.no_grad():
        expected = changed(golden, model)(tokens)
        torch.testing.assert_close(model(tokens), expected, rtol=1e-12, atol=1e-12)
        randlora.merge(model)
        torch.testing.assert_close(model(tokens), expected, rtol=1e-12, atol=1e-12)


@every_golden
def test_the_verbs_on_files_take_a_golden_file(golden: Golden) -> None:
    assert randlora.files.verify(golden.directory).passed
    summary = randlora.files.inspect(golden.directory)
    assert {layer.fqn for layer in summary.layers} == {*BODIES[golden.body].shapes}


@every_golden
def test_a_golden_file_is_taken_off_again_without_a_trace(golden: Golden) -> None:
    model = plain(BODIES[golden.body])
    before = snapshot(model)
    randlora.load(model, golden.directory)
    randlora.eject(model)
    assert snapshot(model) == before


@every_golden
def test_a_save_of_today_holds_what_the_golden_file_holds(golden: Golden, tmp_path: Path) -> None:
    randlora.save(build(golden), tmp_path, bases=golden.stored)
    tensors, metadata = read_tensors(tmp_path)
    assert all_bits(tensors) == all_bits(read_tensors(golden.directory)[0])
    today = json.loads(metadata["randlora"])
    assert {name: fact for name, fact in today.items() if name not in LAST} == {
        name: fact for name, fact in header_of(golden).items() if name not in LAST
    }
    assert read_fields(tmp_path) == read_fields(golden.directory)


def test_the_matrix_is_whole_and_no_directory_is_made_again() -> None:
    assert {path.name for path in GOLDEN[0].directory.parent.iterdir()} == {golden.name for golden in GOLDEN}
    with pytest.raises(FileExistsError):
        make(GOLDEN[0])

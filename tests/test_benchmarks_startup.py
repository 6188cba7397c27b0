"""Counting what bases take."""

import pytest
import torch

import randlora
from benchmarks.startup import SIDES, held_to_compute, llama_3_8b
from randlora.bases.basis import Basis


def drawn(kind: str) -> Basis:
    blocks = (4, 8) if kind == "block" else None
    spec = randlora.BasisSpec(kind, "portable", seed=0, r=32, max_dim=1024, min_dim=1024, blocks=blocks)  # type: ignore[arg-type]
    basis = randlora.BasisBank().acquire(spec)
    basis.extend(1024, 1024)
    return basis


@pytest.mark.parametrize(("dtype", "bytes_a_number"), [(torch.float32, 2 + 4), (torch.bfloat16, 2)])
def test_dense_bases_are_held_in_storage_and_as_one_copy_in_another_dtype(
    dtype: torch.dtype, bytes_a_number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.startup.SIDES", ((1024, 1024), (1024, 512)))
    assert held_to_compute(drawn("dense"), dtype) == 1024 * 1024 * bytes_a_number + 32 * 1024 * (2 + 4)


@pytest.mark.parametrize("kind", ["block"])
def test_bases_with_zeros_take_less_to_compute_with_than_dense_ones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.startup.SIDES", ((1024, 1024), (1024, 512)))
    basis = drawn(kind)
    stored = sum(matrix.nbytes for matrix in basis.matrices())
    assert stored < held_to_compute(basis, torch.float32) < held_to_compute(drawn("dense"), torch.float32)


def test_the_sides_are_those_of_the_model() -> None:
    layers = [module for name, module in llama_3_8b().named_modules() if "proj" in name]
    assert {(max(layer.weight.shape), min(layer.weight.shape)) for layer in layers} == set(SIDES)

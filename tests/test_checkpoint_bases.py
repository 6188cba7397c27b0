"""Which bases a file's adapter gets: drawn and proven, shared where the same bits are held, or as the file has them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.bases import BasisSpec
from randlora.bases.basis import Basis
from tests.checkpoint_files import (
    BASIS_A,
    BASIS_B,
    HEADED,
    LINEAR,
    Case,
    Headed,
    basis_of,
    edit_fields,
    edit_tensors,
    peft_directory,
    read_tensors,
    refused,
    reseal,
    trained,
)
from tests.kit import fill


def foreign(directory: Path, seed: int = 0) -> Path:
    """Make a PEFT file whose bases no seed brings back."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {BASIS_A: torch.randn(2, 1, 5, generator=generator), BASIS_B: torch.randn(6, 3, 2, generator=generator)}
    edit_tensors(peft_directory(directory), drawn)
    return directory


def loaded(*directories: Path) -> nn.Module:
    """Load adapters ``a0``, ``a1``, … one after the other."""
    model = LINEAR.build()
    for index, directory in enumerate(directories):
        randlora.load(model, directory, name=f"a{index}")
    return model


def output(model: nn.Module, name: str = "a0") -> Tensor:
    """Run the model with one adapter."""
    randlora.activate(model, name)
    return LINEAR.output(model)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (torch.randn, torch.float32),
        (lambda shape: torch.randn(shape).bfloat16().float(), torch.bfloat16),
        (lambda shape: torch.randn(shape).sign() * 1.5, torch.int8),
        (torch.zeros, torch.int8),
        (lambda shape: torch.randn(shape, dtype=torch.float64), torch.float64),
    ],
    ids=["float32", "bfloat16", "ternary", "zeros", "float64"],
)
def test_bases_of_no_seed_are_kept_in_the_smallest_form_that_loses_nothing(
    values: Callable[[tuple[int, int, int]], Tensor], dtype: torch.dtype, tmp_path: Path
) -> None:
    changes = {BASIS_A: values((2, 1, 5)), BASIS_B: values((6, 3, 2))}
    edit_tensors(peft_directory(tmp_path), changes)
    basis = basis_of(loaded(tmp_path), "a0")
    assert {matrix.values.dtype for matrix in basis.matrices()} == {dtype}
    kept = basis.slices(6, 5, device="cpu", dtype=torch.float64)
    assert torch.equal(kept.A, changes[BASIS_A].double())
    assert torch.equal(kept.B, changes[BASIS_B].double())


def test_bases_of_no_seed_are_shared_by_files_that_hold_the_same_and_by_nothing_else(tmp_path: Path) -> None:
    places = [foreign(tmp_path / "one"), foreign(tmp_path / "two", 1), peft_directory(tmp_path / "drawn")]
    same = loaded(places[0], foreign(tmp_path / "again"))
    assert basis_of(same, "a0") is basis_of(same, "a1")
    for first, second in [(0, 1), (0, 2), (2, 0)]:
        both = loaded(places[first], places[second])
        assert basis_of(both, "a0").spec == basis_of(both, "a1").spec
        assert torch.equal(output(both, "a0"), output(loaded(places[first])))
        assert torch.equal(output(both, "a1"), output(loaded(places[second])))
    model, alone = loaded(places[0]), LINEAR.build()
    for each in (model, alone):
        randlora.inject(each, r=2, name="ours")
    assert torch.equal(output(fill(model, "ours"), "ours"), output(fill(alone, "ours"), "ours"))


def test_stored_bases_are_kept_unless_their_key_brings_back_every_number(tmp_path: Path) -> None:
    """Also those that are larger than any layer needs."""
    drawn = Basis(BasisSpec("dense", "torch", seed=0, r=2, max_dim=9, min_dim=7))
    bases = drawn.slices(9, 7, device="cpu", dtype=torch.float32)
    peft_directory(tmp_path)
    edit_tensors(tmp_path, {BASIS_A: bases.A, BASIS_B: bases.B})
    basis = basis_of(loaded(tmp_path), "a0")
    assert (basis.stored, basis.spec.max_dim, basis.spec.min_dim) == (None, 9, 7)
    for part, own in ((BASIS_A, bases.A), (BASIS_B, bases.B)):
        changed = own.clone()
        changed.view(-1)[0] += 2**-9
        edit_tensors(tmp_path, {BASIS_A: bases.A, BASIS_B: bases.B, part: changed})
        kept = basis_of(loaded(tmp_path), "a0").slices(9, 7, device="cpu", dtype=torch.float32)
        assert torch.equal(kept.A if part == BASIS_A else kept.B, changed)


OPTIONS: dict[str, dict[str, Any]] = {"torch": {}, "portable": {"stream": "portable"}, "block": {"basis": "block"}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_bases_that_are_not_those_trained_with_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    """And those that the model has for another adapter do not grow."""
    randlora.save(trained(HEADED, **options), tmp_path)
    reseal(tmp_path, digest="0" * 64)
    refused(HEADED.build(), tmp_path, "save it there with bases='stored'")
    narrow = trained(Case("narrow", Headed, {"targets": ["head"]}), name="first", **options)
    refused(narrow, tmp_path, "when the adapter was saved with torch", name="second")


def test_bases_that_contradict_what_the_file_says_of_them_are_refused(tmp_path: Path) -> None:
    for model in (trained(LINEAR), loaded(foreign(tmp_path / "peft"))):
        for part in (BASIS_A, BASIS_B):
            randlora.save(model, tmp_path, bases="stored")
            reseal(tmp_path, {part: read_tensors(tmp_path)[0][part] * 2})
            refused(LINEAR.build(), tmp_path, "the bases stored in the file are not those it names")
    randlora.save(model, tmp_path, bases="stored")
    reseal(tmp_path, drop=[BASIS_A, BASIS_B])
    refused(LINEAR.build(), tmp_path, "the file holds no bases, and no seed reproduces those it was trained with")
    thin = Case("thin", lambda: nn.Sequential(nn.Linear(6, 1)))
    randlora.save(trained(thin, r=1, stream="portable"), tmp_path, bases="stored")
    edit_tensors(tmp_path, {}, drop=[BASIS_A, BASIS_B])
    refused(thin.build(), tmp_path, "the bases that the file names cannot be drawn")


@pytest.mark.parametrize("rows", [6, 12], ids=lambda rows: f"rows={rows}")
def test_bases_of_no_seed_reload_as_they_are_with_their_key_even_larger_than_needed(rows: int, tmp_path: Path) -> None:
    peft_directory(tmp_path / "peft")
    edit_tensors(tmp_path / "peft", {BASIS_A: torch.randn(2, 1, 8), BASIS_B: torch.randn(rows, 4, 2)})
    edit_fields(tmp_path / "peft", {"projection_prng_key": 77})
    model = loaded(tmp_path / "peft")
    randlora.save(model, tmp_path / "ours", bases="stored")
    twin = loaded(tmp_path / "ours")
    assert basis_of(twin, "a0").spec.seed == 77
    assert basis_of(twin, "a0").stored is not None
    assert torch.equal(output(twin), output(model))


def test_stored_bases_are_used_where_a_seed_draws_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(LINEAR)
    randlora.save(model, tmp_path / "stored", bases="stored")
    randlora.save(model, tmp_path / "seed")
    twin, other = LINEAR.build(), LINEAR.build()
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **options: rand(*size, **options).flip(0))
    randlora.load(twin, tmp_path / "stored")
    assert torch.equal(LINEAR.output(twin), LINEAR.output(model))
    assert randlora.files.verify(tmp_path / "stored").passed
    refused(other, tmp_path / "seed", "save it there with bases='stored'")

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

BASIS_A, BASIS_B = "base_model.randlora_A", "base_model.randlora_B"


def foreign(directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Make a PEFT file whose bases no seed brings back."""
    generator = torch.Generator().manual_seed(seed)
    peft_directory(directory)
    edit_tensors(
        directory,
        {
            BASIS_A: torch.randn(2, 1, 5, generator=generator).to(dtype),
            BASIS_B: torch.randn(6, 3, 2, generator=generator).to(dtype),
        },
    )
    return directory


def loaded(*directories: Path) -> nn.Module:
    """Load adapters ``a0``, ``a1``, … one after the other."""
    model = LINEAR.build()
    for index, directory in enumerate(directories):
        randlora.load(model, directory, name=f"a{index}")
    return model


def output(model: nn.Module, name: str) -> Tensor:
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
    directory = peft_directory(tmp_path)
    changes = {BASIS_A: values((2, 1, 5)), BASIS_B: values((6, 3, 2))}
    edit_tensors(directory, changes)
    basis = basis_of(loaded(directory), "a0")
    assert {matrix.values.dtype for matrix in basis.matrices()} == {dtype}
    kept = basis.slices(6, 5, device="cpu", dtype=torch.float64)
    assert torch.equal(kept.A, changes[BASIS_A].double())
    assert torch.equal(kept.B, changes[BASIS_B].double())


def test_equal_bases_of_no_seed_are_held_once(tmp_path: Path) -> None:
    model = loaded(foreign(tmp_path / "one"), foreign(tmp_path / "two"))
    assert basis_of(model, "a0") is basis_of(model, "a1")


def test_different_bases_of_one_spec_are_held_apart(tmp_path: Path) -> None:
    one, two = foreign(tmp_path / "one", seed=1), foreign(tmp_path / "two", seed=2)
    both = loaded(one, two)
    assert basis_of(both, "a0").spec == basis_of(both, "a1").spec
    assert torch.equal(output(both, "a0"), output(loaded(one), "a0"))
    assert torch.equal(output(both, "a1"), output(loaded(two), "a0"))


@pytest.mark.parametrize("foreign_first", [True, False])
def test_bases_of_no_seed_and_the_drawn_ones_of_their_spec_are_held_apart(foreign_first: bool, tmp_path: Path) -> None:
    stored, drawn = foreign(tmp_path / "stored"), peft_directory(tmp_path / "drawn")
    first, second = (stored, drawn) if foreign_first else (drawn, stored)
    both = loaded(first, second)
    assert basis_of(both, "a0").spec == basis_of(both, "a1").spec
    assert torch.equal(output(both, "a0"), output(loaded(first), "a0"))
    assert torch.equal(output(both, "a1"), output(loaded(second), "a0"))


def test_an_adapter_added_later_does_not_share_bases_of_no_seed(tmp_path: Path) -> None:
    model, alone = loaded(foreign(tmp_path)), LINEAR.build()
    randlora.inject(model, r=2, name="ours")
    randlora.inject(alone, r=2, name="ours")
    assert torch.equal(output(fill(model, "ours"), "ours"), output(fill(alone, "ours"), "ours"))


def test_stored_bases_larger_than_needed_that_their_key_brings_back_are_drawn_not_kept(tmp_path: Path) -> None:
    directory = peft_directory(tmp_path)
    wide = Basis(BasisSpec("dense", "torch", seed=0, r=2, max_dim=9, min_dim=7))
    drawn = wide.slices(9, 7, device="cpu", dtype=torch.float32)
    edit_tensors(directory, {BASIS_A: drawn.A, BASIS_B: drawn.B})
    basis = basis_of(loaded(directory), "a0")
    assert (basis.stored, basis.spec.max_dim, basis.spec.min_dim) == (None, 9, 7)


@pytest.mark.parametrize("part", [BASIS_A, BASIS_B], ids=["A", "B"])
def test_one_changed_number_of_pefts_bases_is_enough_to_keep_them(part: str, tmp_path: Path) -> None:
    directory = peft_directory(tmp_path)
    changed = read_tensors(directory)[0][part].clone()
    changed.view(-1)[0] += 2**-9
    edit_tensors(directory, {part: changed})
    basis = basis_of(loaded(directory), "a0")
    kept = basis.slices(6, 5, device="cpu", dtype=torch.float32)
    assert torch.equal(kept.A if part == BASIS_A else kept.B, changed)


OPTIONS: dict[str, dict[str, Any]] = {"torch": {}, "portable": {"stream": "portable"}, "block": {"basis": "block"}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_bases_that_are_not_those_trained_with_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    randlora.save(trained(LINEAR, **options), tmp_path)
    reseal(tmp_path, digest="0" * 64)
    refused(LINEAR.build(), tmp_path, "save it there with bases='stored'")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_bases_that_are_refused_do_not_grow_those_the_model_holds(options: dict[str, Any], tmp_path: Path) -> None:
    narrow = Case("narrow", Headed, {"targets": ["head"]})
    randlora.save(trained(HEADED, **options), tmp_path)
    reseal(tmp_path, digest="0" * 64)
    refused(trained(narrow, name="first", **options), tmp_path, "when the adapter was saved with torch", name="second")


@pytest.mark.parametrize("part", [BASIS_A, BASIS_B], ids=["A", "B"])
@pytest.mark.parametrize("is_foreign", [False, True])
def test_stored_bases_that_contradict_the_header_are_refused(part: str, is_foreign: bool, tmp_path: Path) -> None:
    model = loaded(foreign(tmp_path / "peft")) if is_foreign else trained(LINEAR)
    randlora.save(model, tmp_path, bases="stored")
    reseal(tmp_path, {part: read_tensors(tmp_path)[0][part] * 2})
    refused(LINEAR.build(), tmp_path, "the bases stored in the file are not those it names")


def test_bases_of_no_seed_that_the_file_lost_are_missed(tmp_path: Path) -> None:
    randlora.save(loaded(foreign(tmp_path / "peft")), tmp_path, bases="stored")
    reseal(tmp_path, drop=[BASIS_A, BASIS_B])
    refused(LINEAR.build(), tmp_path, "the file holds no bases, and no seed reproduces those it was trained with")


def test_bases_that_cannot_be_drawn_are_refused(tmp_path: Path) -> None:
    case = Case("thin", lambda: nn.Sequential(nn.Linear(6, 1)))
    randlora.save(trained(case, r=1, stream="portable"), tmp_path, bases="stored")
    edit_tensors(tmp_path, {}, drop=[BASIS_A, BASIS_B])
    refused(case.build(), tmp_path, "the bases that the file names cannot be drawn")


def test_the_key_of_bases_of_no_seed_is_saved_with_them(tmp_path: Path) -> None:
    directory = foreign(tmp_path / "peft")
    edit_fields(directory, {"projection_prng_key": 77})
    model = loaded(directory)
    randlora.save(model, tmp_path / "ours", bases="stored")
    twin = loaded(tmp_path / "ours")
    assert basis_of(twin, "a0").spec.seed == 77
    assert basis_of(twin, "a0").stored is not None
    assert torch.equal(output(twin, "a0"), output(model, "a0"))


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

"""Law 9: what is saved and then loaded is the same adapter, bit for bit."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora.errors import CheckpointError
from tests.checkpoint_files import (
    CASES,
    HEADED,
    LINEAR,
    Case,
    Headed,
    Stored,
    bases_of,
    basis_of,
    both_ways,
    edit_tensors,
    every_case,
    peft_directory,
    read_tensors,
    trained,
)
from tests.kit import adapter_values, all_bits, fill
from tests.strategies import KINDS_AND_STREAMS, seeds


def assert_same_adapter(saved: nn.Module, loaded: nn.Module, case: Case) -> None:
    """Compare all that an adapter is, bit for bit."""
    (theirs,), (ours,) = randlora.adapters(saved), randlora.adapters(loaded)
    assert all_bits(adapter_values(loaded)) == {
        name: (torch.promote_types(dtype, torch.float32), shape, raw) if "randlora_" in name else (dtype, shape, raw)
        for name, (dtype, shape, raw) in all_bits(adapter_values(saved)).items()
    }
    listed = {
        name: getattr(ours.config, name) for name in ("r", "alpha") if isinstance(getattr(theirs.config, name), Mapping)
    }
    assert ours.config == replace(
        theirs.config, targets=theirs.targets, exclude=None, train_also=theirs.train_also or None, **listed
    )
    assert (ours.targets, ours.specs, ours.options) == (theirs.targets, theirs.specs, theirs.options)
    for r, basis in bases_of(saved).items():
        assert bases_of(loaded)[r].digest(*basis.extent) == basis.digest(*basis.extent)
    assert torch.equal(case.output(loaded), case.output(saved))


@st.composite
def inject_options(draw: st.DrawFn) -> dict[str, Any]:
    """Draw options for every kind of bases; a ternary rank is large enough that no basis is all zeros by bad luck."""
    kind, stream = draw(st.sampled_from(KINDS_AND_STREAMS))
    return {
        "r": draw(st.integers(8, 12) if "sparse" in kind else st.integers(1, 12)),
        "basis": kind,
        "stream": draw(st.sampled_from([stream, None])) if kind in ("dense", "block") else stream,
        "seed": draw(seeds),
        "alpha": draw(st.none() | st.integers(1, 10**6) | st.floats(1e-3, 1e3)),
        "dropout": draw(st.just(0.0) | st.floats(0, 1, exclude_max=True)),
    }


@given(st.sampled_from(CASES), inject_options(), st.sampled_from(["seed", "stored"]))
def test_save_then_load_is_the_identity_for_any_options(case: Case, options: dict[str, Any], bases: Stored) -> None:
    model, twin = trained(case, **options), case.build()
    with tempfile.TemporaryDirectory() as directory:
        randlora.save(model, directory, bases=bases)
        randlora.load(twin, directory)
    assert_same_adapter(model, twin, case)


@every_case
@both_ways
def test_save_then_load_is_the_identity_for_every_model(case: Case, bases: Stored, tmp_path: Path) -> None:
    model, twin = trained(case), case.build()
    plain = case.output(twin)
    randlora.save(model, tmp_path, bases=bases)
    randlora.load(twin, tmp_path)
    assert_same_adapter(model, twin, case)
    assert not torch.equal(case.output(twin), plain)


def test_a_model_cast_to_half_precision_saves_the_same_numbers_in_float32(tmp_path: Path) -> None:
    model, twin = trained(LINEAR), LINEAR.build()
    model.half()
    randlora.save(model, tmp_path)
    randlora.load(twin, tmp_path)
    found = adapter_values(twin)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert all_bits(found) == all_bits({name: value.float() for name, value in adapter_values(model).items()})


@both_ways
def test_an_adapter_that_shared_larger_bases_reloads_alone(bases: Stored, tmp_path: Path) -> None:
    model, twin = HEADED.build(), HEADED.build()
    randlora.inject(model, r=2, targets=["body.0", "body.2"], name="wide")
    randlora.inject(model, r=2, targets=["head"], name="narrow")
    randlora.activate(fill(model, "narrow"), "narrow")
    report = randlora.save(model, tmp_path, name="narrow", bases=bases)
    randlora.load(twin, tmp_path)
    assert torch.equal(HEADED.output(twin), HEADED.output(model))
    assert randlora.adapters(twin)[0].specs == randlora.adapters(model)[0].specs
    assert any("bases='stored'" in note for note in report.notes) == (bases == "seed")


@both_ways
def test_an_adapter_whose_bases_grew_for_another_is_saved_as_if_alone(bases: Stored, tmp_path: Path) -> None:
    small = Case("small", Headed, {"targets": ["head"], "stream": "portable"})
    alone, model = trained(small, name="small"), trained(small, name="small")
    randlora.inject(model, r=2, targets=["body.0", "body.2"], stream="portable", name="large")
    assert basis_of(model, "small") is basis_of(model, "large")
    randlora.save(alone, tmp_path / "alone", bases=bases)
    randlora.save(model, tmp_path / "beside", name="small", bases=bases)
    (tensors, metadata), (again, metadata_again) = read_tensors(tmp_path / "alone"), read_tensors(tmp_path / "beside")
    assert all_bits(again) == all_bits(tensors)
    assert metadata_again == metadata


class Crossed(nn.Module):
    """One wide layer, and a pair whose widest input and output are of different layers."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(20, 6)
        self.up = nn.Linear(6, 20)
        self.down = nn.Linear(20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down(self.up(x)) + self.wide(self.up(x))[:, :4]
        return output


@both_ways
def test_an_adapter_whose_own_draw_would_be_larger_than_the_shared_one_reloads_alone(
    bases: Stored, tmp_path: Path
) -> None:
    case = Case("crossed", Crossed)
    model, twin = case.build(), case.build()
    randlora.inject(model, r=2, targets=["wide"], name="wide")
    randlora.inject(model, r=2, targets=["up", "down"], name="crossed")
    assert len({info.specs for info in randlora.adapters(model)}) == 1, "the bases are shared"
    randlora.activate(fill(model, "crossed"), "crossed")
    report = randlora.save(model, tmp_path, name="crossed", bases=bases)
    randlora.load(twin, tmp_path)
    assert torch.equal(case.output(twin), case.output(model))
    assert any("too narrow for PEFT" in note for note in report.notes)


@pytest.mark.parametrize("rows", [6, 7, 12], ids=lambda rows: f"rows={rows}")
def test_bases_of_no_seed_reload_as_they_are_even_where_they_are_larger_than_needed(rows: int, tmp_path: Path) -> None:
    directory = peft_directory(tmp_path / "peft")
    foreign = {"base_model.randlora_A": torch.randn(2, 1, 8), "base_model.randlora_B": torch.randn(rows, 4, 2)}
    edit_tensors(directory, foreign)
    model, twin = LINEAR.build(), LINEAR.build()
    randlora.load(model, directory)
    randlora.save(model, tmp_path / "ours", bases="stored")
    randlora.load(twin, tmp_path / "ours")
    assert torch.equal(LINEAR.output(twin), LINEAR.output(model))


def test_bases_of_no_seed_are_not_saved_as_a_seed(tmp_path: Path) -> None:
    directory = peft_directory(tmp_path / "peft")
    edit_tensors(directory, {"base_model.randlora_B": torch.randn(6, 3, 2)})
    model = LINEAR.build()
    randlora.load(model, directory)
    with pytest.raises(CheckpointError, match="no seed reproduces them: save with bases='stored'"):
        randlora.save(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_an_inactive_adapter_is_saved_with_its_own_copy_of_a_parameter(tmp_path: Path) -> None:
    model = trained(HEADED, name="one")
    randlora.inject(model, **{**HEADED.options, "r": 2, "name": "two"})
    fill(model, "two", seed=9)
    twin = HEADED.build()
    randlora.save(model, tmp_path, name="two")
    randlora.load(twin, tmp_path)
    assert all_bits(adapter_values(twin)) == all_bits(adapter_values(model, "two"))
    assert all_bits(adapter_values(twin)) != all_bits(adapter_values(model, "one"))


def test_a_part_of_a_larger_model_is_saved_under_its_own_names(tmp_path: Path) -> None:
    model, twin = trained(LINEAR), LINEAR.build()
    randlora.save(nn.ModuleDict({"inner": model}), tmp_path)
    randlora.load(twin, tmp_path)
    assert_same_adapter(model, twin, LINEAR)

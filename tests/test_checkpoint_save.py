"""`save`: law 9, what the files hold, what is refused, and what the user is told."""

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import randlora
from tests.checkpoint_files import (
    CASES,
    CONFIG_FILE,
    HEADED,
    LINEAR,
    TENSORS_FILE,
    Case,
    Headed,
    adapter_values,
    all_bits,
    basis_of,
    edit_tensors,
    every_case,
    fill,
    peft_directory,
    read_fields,
    read_tensors,
    snapshot,
    trained,
)
from tests.strategies import KINDS_AND_STREAMS, seeds

Stored = Literal["seed", "stored"]

both_ways = pytest.mark.parametrize("bases", ["seed", "stored"])
every_basis = pytest.mark.parametrize(
    ("kind", "stream"), KINDS_AND_STREAMS, ids=[f"{kind}-{stream}" for kind, stream in KINDS_AND_STREAMS]
)


def assert_same_adapter(saved: nn.Module, loaded: nn.Module, case: Case) -> None:
    """Compare all that an adapter is, bit for bit."""
    (theirs,), (ours,) = randlora.adapters(saved), randlora.adapters(loaded)
    assert all_bits(adapter_values(loaded)) == {
        name: (torch.promote_types(dtype, torch.float32), shape, raw) if "randlora_" in name else (dtype, shape, raw)
        for name, (dtype, shape, raw) in all_bits(adapter_values(saved)).items()
    }
    assert ours.config == replace(
        theirs.config, targets=theirs.targets, exclude=None, train_also=theirs.train_also or None
    )
    assert (ours.targets, ours.spec) == (theirs.targets, theirs.spec)
    extent = basis_of(saved).extent
    assert basis_of(loaded).digest(*extent) == basis_of(saved).digest(*extent)
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


@every_basis
@both_ways
def test_save_then_load_is_the_identity_for_every_basis(kind: Any, stream: Any, bases: Stored, tmp_path: Path) -> None:
    model, twin = trained(LINEAR, r=8, basis=kind, stream=stream, seed=2**64 - 1), LINEAR.build()
    randlora.save(model, tmp_path, bases=bases)
    randlora.load(twin, tmp_path)
    assert_same_adapter(model, twin, LINEAR)


@every_case
@both_ways
def test_what_was_loaded_is_saved_as_it_was(case: Case, bases: Stored, tmp_path: Path) -> None:
    twin = case.build()
    randlora.save(trained(case), tmp_path / "one", bases=bases)
    randlora.load(twin, tmp_path / "one")
    randlora.save(twin, tmp_path / "two", bases=bases)
    tensors, metadata = read_tensors(tmp_path / "one")
    again, metadata_again = read_tensors(tmp_path / "two")
    assert all_bits(again) == all_bits(tensors)
    assert unordered_header(metadata_again) == unordered_header(metadata)
    assert read_fields(tmp_path / "two") == read_fields(tmp_path / "one")


def unordered_header(metadata: dict[str, str]) -> dict[str, Any]:
    """Read a header apart from its seal and the order of what was trained beside the adapter, which seals it."""
    header: dict[str, Any] = json.loads(metadata["randlora"])
    del header["sha256"]
    header["config"]["train_also"] = sorted(header["config"]["train_also"] or [])
    return header


def test_parameters_trained_beside_an_adapter_keep_their_order(tmp_path: Path) -> None:
    model, twin = trained(HEADED), HEADED.build()
    randlora.save(model, tmp_path)
    randlora.load(twin, tmp_path)
    assert randlora.adapters(twin)[0].train_also == randlora.adapters(model)[0].train_also


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
    assert randlora.adapters(twin)[0].spec == randlora.adapters(model)[0].spec
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
    assert len({info.spec for info in randlora.adapters(model)}) == 1, "the bases are shared"
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
    with pytest.raises(randlora.CheckpointError, match="no seed brings them back: save with bases='stored'"):
        randlora.save(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_save_names_its_tensors_as_peft_does(tmp_path: Path) -> None:
    randlora.save(trained(HEADED), tmp_path, bases="stored")
    tensors, metadata = read_tensors(tmp_path)
    prefix = "base_model.model."
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        f"{prefix}body.0.randlora_lambda": (2, 3),
        f"{prefix}body.0.randlora_gamma": (3, 6),
        f"{prefix}body.2.randlora_lambda": (2, 4),
        f"{prefix}body.2.randlora_gamma": (4, 7),
        f"{prefix}norm.bias": (7,),
        f"{prefix}head.weight": (3, 7),
        f"{prefix}head.bias": (3,),
        "base_model.randlora_A": (2, 1, 9),  # over min(widest out, widest in), more than any layer uses
        "base_model.randlora_B": (9, 5, 2),
    }
    assert set(metadata) == {"format", "randlora"}
    assert metadata["format"] == "pt"


@pytest.mark.parametrize(
    ("dtype", "values", "beside"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.float64, torch.float64, torch.float64),
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_save_never_narrows_a_value(
    dtype: torch.dtype, values: torch.dtype, beside: torch.dtype, tmp_path: Path
) -> None:
    randlora.save(trained(HEADED).to(dtype), tmp_path)
    tensors, _ = read_tensors(tmp_path)
    assert {tensor.dtype for key, tensor in tensors.items() if "randlora_" in key} == {values}
    assert {tensor.dtype for key, tensor in tensors.items() if "randlora_" not in key} == {beside}


@pytest.mark.parametrize("kind", ["dense", "block"])
def test_a_seed_stores_no_basis_whatever_the_kind(kind: Any, tmp_path: Path) -> None:
    randlora.save(trained(LINEAR, basis=kind), tmp_path)
    assert {key.rsplit(".", 1)[-1] for key in read_tensors(tmp_path)[0]} == {"randlora_lambda", "randlora_gamma"}


@every_case
@both_ways
def test_save_leaves_no_trace_in_the_model(case: Case, bases: Stored, tmp_path: Path) -> None:
    model = trained(case)
    before, generator = snapshot(model), torch.get_rng_state()
    randlora.save(model, tmp_path, bases=bases)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), generator)


def test_saving_twice_writes_the_same_tensors(tmp_path: Path) -> None:
    model = trained(HEADED)
    randlora.save(model, tmp_path / "one")
    randlora.save(model, tmp_path / "two")
    (tensors, metadata), (again, metadata_again) = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "two")
    assert all_bits(again) == all_bits(tensors)
    assert metadata_again == metadata
    assert (tmp_path / "two" / CONFIG_FILE).read_bytes() == (tmp_path / "one" / CONFIG_FILE).read_bytes()


def test_a_later_save_replaces_an_earlier_one(tmp_path: Path) -> None:
    randlora.save(trained(HEADED, r=4, seed=3), tmp_path, bases="stored")
    model, twin = trained(LINEAR), LINEAR.build()
    randlora.save(model, tmp_path)
    randlora.load(twin, tmp_path)
    assert_same_adapter(model, twin, LINEAR)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, TENSORS_FILE]


def test_save_makes_the_directory_and_its_parents_and_takes_a_string(tmp_path: Path) -> None:
    report = randlora.save(trained(LINEAR), f"{tmp_path}/a/b")
    assert report.directory == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b" / TENSORS_FILE).is_file()


def test_saved_files_are_as_readable_as_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        randlora.save(trained(LINEAR), tmp_path)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        CONFIG_FILE: 0o644,
        TENSORS_FILE: 0o644,
    }


def test_save_reports_what_it_wrote(tmp_path: Path) -> None:
    report = randlora.save(trained(LINEAR, name="mine"), tmp_path)
    assert report.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert report.name == "mine"
    assert str(report).startswith(f"saved 'mine' to {tmp_path}, ")


def test_one_of_several_adapters_is_saved_by_name_active_or_not(tmp_path: Path) -> None:
    model, twin = trained(LINEAR, name="one"), LINEAR.build()
    randlora.inject(model, r=4, seed=5, basis="block", name="two", new_bases=True)
    fill(model, "two", seed=9)
    randlora.save(model, tmp_path, name="two")
    randlora.load(twin, tmp_path)
    assert all_bits(adapter_values(twin)) == all_bits(adapter_values(model, "two"))
    assert basis_of(twin).spec == basis_of(model, "two").spec


def test_an_inactive_adapter_is_saved_with_its_own_copy_of_a_parameter(tmp_path: Path) -> None:
    model = trained(HEADED, name="one")
    randlora.inject(model, **{**HEADED.options, "r": 2, "name": "two"})
    fill(model, "two", seed=9)
    twin = HEADED.build()
    randlora.save(model, tmp_path, name="two")
    randlora.load(twin, tmp_path)
    assert all_bits(adapter_values(twin)) == all_bits(adapter_values(model, "two"))
    assert all_bits(adapter_values(twin)) != all_bits(adapter_values(model, "one"))


def test_an_adapter_is_saved_the_same_while_it_is_disabled_or_merged(tmp_path: Path) -> None:
    model = trained(HEADED)
    randlora.save(model, tmp_path / "plain")
    with randlora.disabled(model):
        randlora.save(model, tmp_path / "disabled")
    with randlora.merged(model):
        randlora.save(model, tmp_path / "merged")
    expected = all_bits(read_tensors(tmp_path / "plain")[0])
    assert all_bits(read_tensors(tmp_path / "disabled")[0]) == expected
    assert all_bits(read_tensors(tmp_path / "merged")[0]) == expected


def test_a_part_of_a_larger_model_is_saved_under_its_own_names(tmp_path: Path) -> None:
    model, twin = trained(LINEAR), LINEAR.build()
    randlora.save(nn.ModuleDict({"inner": model}), tmp_path)
    randlora.load(twin, tmp_path)
    assert_same_adapter(model, twin, LINEAR)


def test_save_in_inference_mode_writes_the_same_files(tmp_path: Path) -> None:
    model = trained(LINEAR)
    randlora.save(model, tmp_path / "plain")
    with torch.inference_mode():
        randlora.save(model, tmp_path / "inference")
    assert all_bits(read_tensors(tmp_path / "inference")[0]) == all_bits(read_tensors(tmp_path / "plain")[0])


def test_save_refuses_a_model_without_adapters(tmp_path: Path) -> None:
    with pytest.raises(randlora.AdapterError, match="carries no adapter"):
        randlora.save(LINEAR.build(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [(None, r"carries several adapters \(one, two\)"), ("three", "no adapter named 'three': it has one, two")],
    ids=["ambiguous", "unknown"],
)
def test_save_refuses_a_name_that_says_not_which(name: str | None, message: str, tmp_path: Path) -> None:
    model = trained(LINEAR, name="one")
    randlora.inject(model, r=2, name="two")
    with pytest.raises(randlora.AdapterError, match=message):
        randlora.save(model, tmp_path / "new", name=name)
    assert not (tmp_path / "new").exists()


def test_save_refuses_another_word_for_the_bases(tmp_path: Path) -> None:
    with pytest.raises(randlora.CheckpointError, match="bases must be 'seed' or 'stored', got 'both'"):
        randlora.save(trained(LINEAR), tmp_path / "new", bases="both")  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_save_refuses_values_on_the_meta_device_and_names_each(tmp_path: Path) -> None:
    model = HEADED.build().to("meta")
    randlora.inject(model, r=2, targets=["0"], train_also=["norm.bias"])
    with pytest.raises(randlora.CheckpointError, match=r"body\.0 holds no values") as caught:
        randlora.save(model, tmp_path / "new")
    assert "norm.bias holds no values" in str(caught.value)
    assert not (tmp_path / "new").exists()


PORTABLE_NOTE = "PEFT cannot draw stream='portable': save with bases='stored' to load there"


@pytest.mark.parametrize(
    ("options", "bases", "notes"),
    [
        ({}, "seed", ()),
        ({}, "stored", ()),
        ({"stream": "portable"}, "seed", (PORTABLE_NOTE,)),
        ({"stream": "portable"}, "stored", ()),
        ({"basis": "block"}, "seed", (PORTABLE_NOTE,)),
        ({"basis": "block"}, "stored", ()),
        ({"train_also": ["head"]}, "seed", ()),
        ({"train_also": ["head", "norm.bias"]}, "seed", ()),
    ],
    ids=["torch", "torch-stored", "portable", "portable-stored", "block", "block-stored", "whole-module", "single"],
)
def test_save_says_what_peft_would_not_load(
    options: dict[str, Any], bases: Stored, notes: tuple[str, ...], tmp_path: Path
) -> None:
    case = Case("body", Headed, {"targets": ["0", "2"]})
    report = randlora.save(trained(case, **options), tmp_path, bases=bases)
    assert report.notes == notes
    assert str(report).splitlines()[1:] == list(notes)

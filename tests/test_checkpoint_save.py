"""`save`: what the files hold, what is refused, and what the user is told."""

from pathlib import Path
from typing import Any

import pytest
import torch

import randlora
from randlora.errors import AdapterError, CheckpointError
from tests.checkpoint_files import (
    HEADED,
    LINEAR,
    Case,
    Headed,
    Stored,
    both_ways,
    every_case,
    read_tensors,
    trained,
)
from tests.kit import all_bits, snapshot
from tests.peer import PEFT_STREAM


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


def test_save_reports_what_it_wrote(tmp_path: Path) -> None:
    report = randlora.save(trained(LINEAR, name="mine"), tmp_path)
    assert report.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert report.name == "mine"
    assert str(report).startswith(f"saved 'mine' to {tmp_path}, ")


def test_save_in_inference_mode_writes_the_same_files(tmp_path: Path) -> None:
    model = trained(LINEAR)
    randlora.save(model, tmp_path / "plain")
    with torch.inference_mode():
        randlora.save(model, tmp_path / "inference")
    assert all_bits(read_tensors(tmp_path / "inference")[0]) == all_bits(read_tensors(tmp_path / "plain")[0])


def test_save_refuses_a_model_without_adapters(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="the model has no adapter: call"):
        randlora.save(LINEAR.build(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [(None, r"has several adapters \(one, two\)"), ("three", "no adapter named 'three': it has one, two")],
    ids=["ambiguous", "unknown"],
)
def test_save_refuses_a_name_that_says_not_which(name: str | None, message: str, tmp_path: Path) -> None:
    model = trained(LINEAR, name="one")
    randlora.inject(model, r=2, name="two")
    with pytest.raises(AdapterError, match=message):
        randlora.save(model, tmp_path / "new", name=name)
    assert not (tmp_path / "new").exists()


def test_save_refuses_another_word_for_the_bases(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="bases must be 'seed' or 'stored', got 'both'"):
        randlora.save(trained(LINEAR), tmp_path / "new", bases="both")  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_save_refuses_values_on_the_meta_device_and_names_each(tmp_path: Path) -> None:
    model = HEADED.build().to("meta")
    randlora.inject(model, r=2, targets=["0"], train_also=["norm.bias"])
    with pytest.raises(CheckpointError, match=r"body\.0 holds no values") as caught:
        randlora.save(model, tmp_path / "new")
    assert "norm.bias holds no values" in str(caught.value)
    assert not (tmp_path / "new").exists()


DRAWN = "PEFT draws stream='torch' under torch 2.12 and newer only: save with bases='stored' to load under any"
NOTES_OF_SEEDS = () if PEFT_STREAM == "torch" else (DRAWN,)
PORTABLE_NOTE = "PEFT cannot draw stream='portable': save with bases='stored' to load there"


@pytest.mark.parametrize(
    ("options", "bases", "notes"),
    [
        ({}, "seed", NOTES_OF_SEEDS),
        ({}, "stored", ()),
        ({"stream": "portable"}, "seed", (PORTABLE_NOTE,)),
        ({"stream": "portable"}, "stored", ()),
        ({"basis": "block"}, "seed", (PORTABLE_NOTE,)),
        ({"basis": "block"}, "stored", ()),
        ({"train_also": ["head"]}, "seed", NOTES_OF_SEEDS),
        ({"train_also": ["head", "norm.bias"]}, "seed", NOTES_OF_SEEDS),
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


@pytest.mark.parametrize("kind", ["file", "broken link"])
def test_a_directory_that_is_none_is_refused_before_anything_is_written(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.touch()
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="it is a file or a broken link: expected the name of a directory"):
        randlora.save(trained(LINEAR), out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

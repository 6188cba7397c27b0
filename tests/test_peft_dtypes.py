"""Files of PEFT 0.21.2 trained on bases of any floating dtype, with adapters in float32 or in the dtype of the base."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.config import BasisKind
from tests.checkpoint_files import basis_of, read_tensors
from tests.kit import adapter_values, all_bits
from tests.models import GPT2, LLAMA, RealModel
from tests.peer import PREFIX, THEIR_WARNINGS, every_peft_kind, in_peft, peft_model, their_values, told_stream

pytestmark = THEIR_WARNINGS

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
every_autocast = pytest.mark.parametrize("autocast", [True, False], ids=["float32 adapter", "adapter as the base"])
linear_and_conv1d = pytest.mark.parametrize("kind", [LLAMA, GPT2], ids=lambda kind: kind.name)


def loaded(kind: RealModel, directory: Path, dtype: torch.dtype) -> nn.Module:
    model = kind.build().to(dtype)
    randlora.load(model, directory, stream=told_stream(directory))
    return model


def their_delta(theirs: nn.Module, kind: RealModel, fqn: str) -> Tensor:
    layer: Any = theirs.get_submodule(PREFIX + fqn)
    delta: Tensor = layer.get_delta_weight("default")
    return delta.T if kind is GPT2 else delta  # PEFT gives the layout that Conv1D stores


def assert_same_deltas(ours: nn.Module, theirs: nn.Module, kind: RealModel, tolerance: float) -> None:
    """Compare what the adapter adds to each weight, where no rounding to the base's dtype hides a difference."""
    for fqn in randlora.adapters(ours)[0].targets:
        expected = their_delta(theirs, kind, fqn)
        assert (randlora.delta_weight(ours, fqn) - expected).norm() <= tolerance * expected.norm(), fqn


@every_peft_kind
@every_autocast
@every_dtype
@linear_and_conv1d
def test_files_with_bases_add_what_they_added_in_peft(
    kind: RealModel, dtype: torch.dtype, autocast: bool, basis: BasisKind, tmp_path: Path
) -> None:
    theirs = peft_model(kind, basis, dtype=dtype, autocast=autocast)
    theirs.save_pretrained(tmp_path / "theirs")
    dtypes = {tensor.dtype for tensor in read_tensors(tmp_path / "theirs")[0].values()}
    assert dtypes == {torch.float32 if autocast else dtype}, "else this test is of something else"

    ours = loaded(kind, tmp_path / "theirs", dtype)
    assert_same_deltas(ours, theirs, kind, 1e-5)
    randlora.save(ours, tmp_path / "ours", bases="stored")
    back = in_peft(kind, tmp_path / "ours", dtype=dtype, autocast_adapter_dtype=autocast)
    assert_same_deltas(ours, back, kind, 1e-5)
    assert [all_bits(dict(zip("λγ", values, strict=True))) for _, *values in their_values(back)] == [
        all_bits(dict(zip("λγ", values, strict=True))) for _, *values in their_values(theirs)
    ]


@every_dtype
@every_autocast
@linear_and_conv1d
def test_values_in_half_precision_are_held_in_float32(
    kind: RealModel, dtype: torch.dtype, autocast: bool, tmp_path: Path
) -> None:
    peft_model(kind, dtype=dtype, autocast=autocast).save_pretrained(tmp_path)
    tensors, _ = read_tensors(tmp_path)
    expected = {f"{PREFIX}{key}": value for key, value in adapter_values(loaded(kind, tmp_path, dtype)).items()}
    assert all_bits(expected) == all_bits({key: tensors[key].float() for key in expected})


SCALES_ROUNDED = 2**-7
"""How far two scales rounded to bfloat16, of 8 bits each, can take a product at most."""


@every_peft_kind
@every_autocast
@every_dtype
@linear_and_conv1d
def test_files_without_bases_add_what_they_added_in_peft_but_for_the_scale_that_peft_rounds(
    kind: RealModel, dtype: torch.dtype, autocast: bool, basis: BasisKind, tmp_path: Path
) -> None:
    """PEFT casts its bases to the dtype of the base model: dense ones are exact in it, the scale of ternary ones not.

    The file does not say which dtype that was.
    """
    theirs = peft_model(kind, basis, dtype=dtype, autocast=autocast, save_projection=False)
    theirs.save_pretrained(tmp_path)
    ours = loaded(kind, tmp_path, dtype)
    is_rounded = basis != "dense" and dtype != torch.float32
    assert_same_deltas(ours, theirs, kind, SCALES_ROUNDED if is_rounded else 1e-5)


@pytest.mark.parametrize("basis", ["sparse", "very_sparse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bases_whose_scale_peft_rounded_are_kept_as_they_are(
    dtype: torch.dtype, basis: BasisKind, tmp_path: Path
) -> None:
    peft_model(LLAMA, basis, dtype=dtype).save_pretrained(tmp_path / "rounded")
    peft_model(LLAMA, basis).save_pretrained(tmp_path / "exact")
    rounded, exact = (read_tensors(tmp_path / name)[0]["base_model.randlora_B"] for name in ("rounded", "exact"))
    assert torch.equal(rounded, exact.to(dtype).float())
    assert not torch.equal(rounded, exact)

    held = basis_of(loaded(LLAMA, tmp_path / "rounded", dtype))
    assert held.stored is not None
    assert torch.equal(held.slices(*held.extent, device="cpu", dtype=torch.float32).B, rounded)
    assert basis_of(loaded(LLAMA, tmp_path / "exact", dtype)).stored is None


@every_dtype
def test_a_file_fits_a_base_of_another_dtype_than_it_was_trained_on(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = peft_model(LLAMA, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    assert_same_deltas(loaded(LLAMA, tmp_path, dtype), theirs, LLAMA, 1e-5)


def test_a_model_of_pefts_cast_as_a_whole_is_read(tmp_path: Path) -> None:
    theirs = peft_model(LLAMA).half()
    theirs.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in read_tensors(tmp_path)[0].values()} == {torch.float16}
    assert_same_deltas(loaded(LLAMA, tmp_path, torch.float16), theirs, LLAMA, 1e-5)

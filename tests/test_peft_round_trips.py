"""From PEFT 0.21.2 to us and back, and from us to PEFT and back, in any dtype: what returns is what left."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.config import BasisKind, Stream
from randlora.errors import CheckpointError
from tests.checkpoint_files import basis_of, edit_tensors, read_tensors
from tests.further import name_of
from tests.kit import adapter_values, all_bits
from tests.models import BERT, GPT2, LLAMA, VIT, RealModel, outputs
from tests.peer import (
    PREFIX,
    THEIR_WARNINGS,
    assert_same_effect,
    in_ours,
    in_peft,
    in_peft_bit_for_bit,
    our_model,
    peft_draw,
    peft_model,
    their_values,
    told_stream,
)

pytestmark = THEIR_WARNINGS

HEADS: dict[str, str] = {"bert": "classifier", "vit": "classifier"}
"""What is trained beside the adapter, in models that classify."""


def one_copy_only(directory: Path) -> None:
    """Drop the copies per layer from a file of PEFT's, as PEFT does since its pull request 3714."""
    copies = [key for key in read_tensors(directory)[0] if key.endswith(("_A", "_B")) and ".model." in key]
    assert copies
    edit_tensors(directory, {}, drop=copies)


BACK_AND_FORTH: tuple[tuple[RealModel, BasisKind, str], ...] = (
    (LLAMA, "dense", "a copy a layer"),
    (GPT2, "sparse", "one copy"),
    (BERT, "very_sparse", "no bases"),
    (VIT, "dense", "no bases"),
)


@pytest.mark.parametrize(("kind", "basis", "layout"), BACK_AND_FORTH, ids=name_of)
def test_what_went_from_peft_to_us_and_back_is_what_it_was(
    kind: RealModel, basis: BasisKind, layout: str, tmp_path: Path
) -> None:
    heads = [HEADS[kind.name]] if kind.name in HEADS else None
    options: dict[str, Any] = {
        "projection_prng_key": 11,
        "modules_to_save": heads,
        "save_projection": layout != "no bases",
    }
    theirs = peft_model(kind, basis, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    if layout == "one copy":
        one_copy_only(tmp_path / "theirs")
    ours = in_ours(kind, tmp_path / "theirs")
    assert_same_effect(ours, theirs, kind)
    for bases in ("seed", "stored"):
        randlora.save(ours, tmp_path / bases, bases=bases)
        back = in_peft(kind, tmp_path / bases)
        assert in_peft_bit_for_bit(back) == in_peft_bit_for_bit(theirs)
        assert torch.equal(outputs(back, kind.inputs()), outputs(theirs, kind.inputs()))


THERE_AND_BACK: list[tuple[RealModel, BasisKind, Stream, Any]] = [
    (LLAMA, "dense", peft_draw("dense") or "torch", "seed"),
    (GPT2, "sparse", "torch", "seed"),
    (BERT, "very_sparse", "torch", "stored"),
    (VIT, "block", "portable", "stored"),
    (LLAMA, "dense", "portable", "stored"),
]


@pytest.mark.parametrize(
    ("kind", "basis", "stream", "bases"), THERE_AND_BACK, ids=lambda each: getattr(each, "name", each)
)
def test_what_went_from_us_to_peft_and_back_is_what_it_was(
    kind: RealModel, basis: BasisKind, stream: Stream, bases: Any, tmp_path: Path
) -> None:
    train_also = [HEADS[kind.name]] if kind.name in HEADS else None
    ours = our_model(kind, basis, stream=stream, seed=5, train_also=train_also)
    randlora.save(ours, tmp_path / "ours", bases=bases)
    theirs = in_peft(kind, tmp_path / "ours")
    assert_same_effect(ours, theirs, kind)
    theirs.save_pretrained(tmp_path / "theirs")
    back = in_ours(kind, tmp_path / "theirs")

    (left,), (returned,) = randlora.adapters(ours), randlora.adapters(back)
    assert all_bits(adapter_values(back)) == all_bits(adapter_values(ours))
    assert (returned.targets, set(returned.train_also)) == (left.targets, set(left.train_also))
    assert basis_of(back).digest(*basis_of(ours).extent) == basis_of(ours).digest(*basis_of(ours).extent)
    expected = outputs(ours, kind.inputs())
    if stream != "portable":
        assert returned.specs == left.specs, "the key brings the bases back"
        assert torch.equal(outputs(back, kind.inputs()), expected)
    else:  # what PEFT cannot draw is kept as it was stored, and not computed with in the same form
        torch.testing.assert_close(outputs(back, kind.inputs()), expected, rtol=1e-4, atol=1e-4)


def test_bases_that_peft_cannot_draw_travel_on_from_peft_and_not_as_a_seed(tmp_path: Path) -> None:
    ours = our_model(LLAMA, "block", stream="portable")
    randlora.save(ours, tmp_path / "ours", bases="stored")
    in_peft(LLAMA, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back = in_ours(LLAMA, tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="no seed reproduces them: save with bases='stored'"):
        randlora.save(back, tmp_path / "again")
    randlora.save(back, tmp_path / "again", bases="stored")
    assert torch.equal(outputs(in_ours(LLAMA, tmp_path / "again"), LLAMA.inputs()), outputs(back, LLAMA.inputs()))


@pytest.mark.parametrize("bases", ["seed", "stored"])
def test_peft_reads_the_same_however_it_makes_its_layers(bases: Any, tmp_path: Path) -> None:
    ours = our_model(BERT, train_also=["classifier"])
    randlora.save(ours, tmp_path, bases=bases)
    loaded = in_peft(BERT, tmp_path, low_cpu_mem_usage=True)
    assert in_peft_bit_for_bit(loaded) == in_peft_bit_for_bit(in_peft(BERT, tmp_path, is_trainable=True))


IN_DTYPES: tuple[tuple[torch.dtype, bool, BasisKind], ...] = (
    (torch.float32, True, "sparse"),
    (torch.bfloat16, True, "dense"),
    (torch.bfloat16, False, "very_sparse"),
    (torch.float16, False, "dense"),
    (torch.float16, True, "sparse"),
)
"""Of the base, whether the adapter is float32 all the same, and the bases."""

every_dtype = pytest.mark.parametrize(("dtype", "autocast", "basis"), IN_DTYPES, ids=str)


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


@every_dtype
def test_files_with_bases_add_what_they_added_in_peft(
    dtype: torch.dtype, autocast: bool, basis: BasisKind, tmp_path: Path
) -> None:
    kind = GPT2 if autocast else LLAMA
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
    other = loaded(kind, tmp_path / "theirs", torch.float16 if dtype == torch.float32 else torch.float32)
    assert_same_deltas(other, theirs, kind, 1e-5)


SCALES_ROUNDED = 2**-7
"""How far two scales rounded to bfloat16, of 8 bits each, can take a product at most."""


@every_dtype
def test_files_without_bases_add_what_they_added_in_peft_but_for_the_scale_that_peft_rounds(
    dtype: torch.dtype, autocast: bool, basis: BasisKind, tmp_path: Path
) -> None:
    """PEFT casts its bases to the dtype of the base model: dense ones are exact in it, the scale of ternary ones not.

    The file does not say which dtype that was.
    """
    theirs = peft_model(LLAMA, basis, dtype=dtype, autocast=autocast, save_projection=False)
    theirs.save_pretrained(tmp_path)
    ours = loaded(LLAMA, tmp_path, dtype)
    is_rounded = basis != "dense" and dtype != torch.float32
    assert_same_deltas(ours, theirs, LLAMA, SCALES_ROUNDED if is_rounded else 1e-5)


@pytest.mark.parametrize(("basis", "dtype"), [("sparse", torch.bfloat16), ("very_sparse", torch.float16)], ids=str)
def test_bases_whose_scale_peft_rounded_are_kept_as_they_are(
    basis: BasisKind, dtype: torch.dtype, tmp_path: Path
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

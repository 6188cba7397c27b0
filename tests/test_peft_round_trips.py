"""From PEFT 0.21.2 to us and back, and from us to PEFT and back: what returns is what left, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

import randlora
from randlora.config import BasisKind, Stream
from randlora.errors import CheckpointError
from tests.checkpoint_files import basis_of, edit_tensors, read_tensors
from tests.kit import adapter_values, all_bits
from tests.models import BERT, LLAMA, RealModel, every_transformers_model, outputs
from tests.peer import (
    THEIR_WARNINGS,
    assert_same_effect,
    every_peft_kind,
    in_ours,
    in_peft,
    in_peft_bit_for_bit,
    our_model,
    peft_draw,
    peft_model,
)

pytestmark = THEIR_WARNINGS

HEADS: dict[str, str] = {"bert": "classifier", "vit": "classifier"}
"""What is trained beside the adapter, in models that classify."""


def one_copy_only(directory: Path) -> None:
    """Drop the copies per layer from a file of PEFT's, as PEFT does since its pull request 3714."""
    copies = [key for key in read_tensors(directory)[0] if key.endswith(("_A", "_B")) and ".model." in key]
    assert copies
    edit_tensors(directory, {}, drop=copies)


LAYOUTS: dict[str, dict[str, Any]] = {
    "a copy a layer": {"save_projection": True},
    "one copy": {"save_projection": True},
    "no bases": {"save_projection": False},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@every_peft_kind
@every_transformers_model
def test_what_went_from_peft_to_us_and_back_is_what_it_was(
    kind: RealModel, basis: BasisKind, layout: str, tmp_path: Path
) -> None:
    heads = [HEADS[kind.name]] if kind.name in HEADS else None
    theirs = peft_model(kind, basis, projection_prng_key=11, modules_to_save=heads, **LAYOUTS[layout])
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


FROM_A_SEED: tuple[BasisKind, ...] = ("dense", "sparse", "very_sparse")
ONLY_STORED: tuple[BasisKind, ...] = (*FROM_A_SEED, "block")

BASES: list[tuple[BasisKind, Stream, Any]] = [
    *((basis, peft_draw(basis) or "torch", "seed") for basis in FROM_A_SEED),
    *((basis, "torch", "stored") for basis in FROM_A_SEED),
    *((basis, "portable", "stored") for basis in ONLY_STORED),
]


@pytest.mark.parametrize(("basis", "stream", "bases"), BASES)
@every_transformers_model
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


@pytest.mark.parametrize("basis", ["dense", "block"])
def test_bases_that_peft_cannot_draw_travel_on_from_peft_and_not_as_a_seed(basis: BasisKind, tmp_path: Path) -> None:
    ours = our_model(LLAMA, basis, stream="portable")
    randlora.save(ours, tmp_path / "ours", bases="stored")
    in_peft(LLAMA, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back = in_ours(LLAMA, tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="no seed reproduces them: save with bases='stored'"):
        randlora.save(back, tmp_path / "again")
    randlora.save(back, tmp_path / "again", bases="stored")
    assert torch.equal(outputs(in_ours(LLAMA, tmp_path / "again"), LLAMA.inputs()), outputs(back, LLAMA.inputs()))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("bases", ["seed", "stored"])
def test_peft_reads_the_same_however_it_makes_its_layers(bases: Any, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    ours = our_model(BERT, train_also=["classifier"])
    randlora.save(ours, tmp_path, bases=bases)
    loaded = in_peft(BERT, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert in_peft_bit_for_bit(loaded) == in_peft_bit_for_bit(in_peft(BERT, tmp_path, is_trainable=True))

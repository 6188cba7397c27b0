"""`files.verify` passes what is whole, says what is wrong with the rest, and never raises for a file's faults."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import randlora
from randlora.checkpoint.peft_config import CONFIG_FILE
from randlora.checkpoint.tensors import TENSORS_FILE
from randlora.errors import CheckpointError
from randlora.files.inspect import Check, Verification
from tests.checkpoint_files import edit_fields, reseal
from tests.directories import base_directory, our_directory, their_directory
from tests.models import BERT, GPT2, LLAMA, RealModel, every_transformers_model
from tests.peer import THEIR_WARNINGS

pytestmark = THEIR_WARNINGS


def outcomes(verification: Verification) -> dict[str, str]:
    return {check.name: check.outcome for check in verification.checks}


def failure(verification: Verification) -> Check:
    (found,) = (check for check in verification.checks if check.outcome == "failed")
    assert not verification.passed
    assert f"failed: {found.name}: {found.words}" in str(verification)
    assert str(verification).endswith("is NOT sound")
    return found


@pytest.mark.parametrize("bases", ["seed", "stored"])
@pytest.mark.parametrize("options", [{}, {"basis": "block"}, {"basis": "very_sparse", "stream": "portable"}])
def test_what_we_saved_passes(options: dict[str, Any], bases: str, tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path, bases=bases, **options)
    found = randlora.files.verify(source)
    assert outcomes(found) == {"files": "passed", "checksum": "passed", "bases": "passed"}
    assert str(found).endswith("is sound")


@every_transformers_model
def test_an_adapter_passes_beside_its_base(kind: RealModel, tmp_path: Path) -> None:
    source, _ = our_directory(kind, tmp_path)
    found = randlora.files.verify(source, base_directory(kind, tmp_path))
    assert set(outcomes(found).values()) == {"passed"}
    assert "base" in outcomes(found)


@pytest.mark.parametrize("save_projection", [True, False], ids=["bases in the file", "bases from the key"])
@every_transformers_model
def test_a_file_of_peft_passes_as_far_as_it_says_anything(
    kind: RealModel, save_projection: bool, tmp_path: Path
) -> None:
    source, _ = their_directory(kind, tmp_path, save_projection=save_projection)
    bases = "passed" if save_projection else "not checked"
    expected = {"files": "passed", "checksum": "not checked", "bases": bases}
    alone, beside = (randlora.files.verify(source, base) for base in (None, base_directory(kind, tmp_path)))
    assert outcomes(alone) == expected
    assert outcomes(beside) == {**expected, "base": "passed"}
    assert alone.passed
    assert beside.passed


Q_PROJ = "model.layers.0.self_attn.q_proj"
GAMMA = f"base_model.model.{Q_PROJ}.randlora_gamma"


def flip_a_bit(directory: Path) -> None:
    content = bytearray((directory / TENSORS_FILE).read_bytes())
    content[-1] ^= 1
    (directory / TENSORS_FILE).write_bytes(content)


def truncate(directory: Path) -> None:
    content = (directory / TENSORS_FILE).read_bytes()
    (directory / TENSORS_FILE).write_bytes(content[: len(content) // 2])


def remove(directory: Path) -> None:
    (directory / CONFIG_FILE).unlink()


def garble(directory: Path) -> None:
    (directory / CONFIG_FILE).write_bytes(b"\xff{")


def contradict(directory: Path) -> None:
    edit_fields(directory, {"r": 7})


def put_nan(directory: Path) -> None:
    reseal(
        directory, {"base_model.model.model.layers.0.self_attn.q_proj.randlora_gamma": torch.full((6, 32), torch.nan)}
    )


def misshape(directory: Path) -> None:
    reseal(directory, {GAMMA: torch.ones(5, 32)})


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "bit": (flip_a_bit, "do not match its checksum"),
    "truncated": (truncate, "truncated or damaged"),
    "missing": (remove, "there is no adapter_config.json"),
    "garbled": (garble, "is damaged"),
    "contradiction": (contradict, "the files are of two saves"),
    "NaN": (put_nan, "holds NaN or infinite values"),
    "shape": (misshape, "expected (6, num_bases)"),
}


@pytest.mark.parametrize(("damage", "words"), FAULTS.values(), ids=FAULTS)
def test_a_damaged_file_is_a_failed_check_with_the_reason(
    damage: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    damage(source)
    found = failure(randlora.files.verify(source))
    assert found.name == "files"
    assert words in found.words


def test_no_directory_at_all_is_an_error(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    for places in ([tmp_path / "nothing"], [source, tmp_path / "nothing"]):
        with pytest.raises(CheckpointError, match=r"^no such directory: .*nothing$"):
            randlora.files.verify(*places)


def test_bases_that_come_out_otherwise_are_a_failed_check(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    reseal(source, digest="0" * 64)
    found = failure(randlora.files.verify(source))
    assert found.name == "bases"
    assert "save it there with bases='stored'" in found.words


def test_a_header_that_gives_a_layer_another_shape_is_a_failed_check(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    shapes = dict(randlora.files.adapter.open_adapter(source).shapes or {})
    reseal(source, shapes={**shapes, Q_PROJ: (32, 30)})
    assert f"its header says that {Q_PROJ} is 32 x 30" in failure(randlora.files.verify(source)).words


def test_stored_bases_that_no_key_draws_are_passed_and_said_to_be_so(tmp_path: Path) -> None:
    source, theirs = their_directory(LLAMA, tmp_path)
    with torch.no_grad():
        theirs.base_model.randlora_B["default"].mul_(1.5)
    theirs.save_pretrained(source)
    found = randlora.files.verify(source)
    assert found.passed
    assert "its key gives others here" in found.checks[-1].words


def damaged_base(change: Callable[[dict[str, torch.Tensor]], None], tmp_path: Path) -> Path:
    base = base_directory(LLAMA, tmp_path)
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return base


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "PEFT's"])
def test_a_base_that_lacks_a_layer_fails(theirs: bool, tmp_path: Path) -> None:
    source, _ = (their_directory if theirs else our_directory)(LLAMA, tmp_path)
    base = damaged_base(lambda tensors: tensors.__delitem__(f"{Q_PROJ}.weight"), tmp_path)
    found = failure(randlora.files.verify(source, base))
    assert found.name == "base"
    assert f"the model has no layer {Q_PROJ}" in found.words


def test_a_base_with_another_shape_fails_and_the_bases_are_checked_all_the_same(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    base = damaged_base(lambda tensors: tensors.update({f"{Q_PROJ}.weight": torch.ones(34, 32)}), tmp_path)
    verification = randlora.files.verify(source, base)
    assert f"{Q_PROJ} is 34 x 32 here" in failure(verification).words
    assert outcomes(verification)["bases"] == "passed"


def test_another_model_as_base_fails(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    assert "the model has no layer" in failure(randlora.files.verify(source, base_directory(GPT2, tmp_path))).words


def test_a_truncated_base_fails(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    path = base_directory(LLAMA, tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "truncated" in failure(randlora.files.verify(source, path.parent)).words


def test_a_head_that_the_base_lacks_is_named_and_one_of_another_shape_fails(tmp_path: Path) -> None:
    source, _ = our_directory(BERT, tmp_path, train_also=["classifier"])
    base = base_directory(BERT, tmp_path)
    tensors = load_file(base / "model.safetensors")
    wide = {**tensors, "classifier.weight": torch.ones(5, 32)}
    save_file(wide, base / "model.safetensors", {"format": "pt"})
    assert "classifier.weight has shape (5, 32) here" in failure(randlora.files.verify(source, base)).words
    headless = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")}
    save_file(headless, base / "model.safetensors", {"format": "pt"})
    found = randlora.files.verify(source, base)
    assert found.passed
    assert "classifier.weight, classifier.bias of its class are not in its files" in str(found)


def test_progress_is_told_of_every_step(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    told: list[tuple[int, int, str]] = []
    randlora.files.verify(source, progress=lambda *news: told.append(news))
    assert [done for done, _, _ in told] == list(range(told[0][1] + 1))
    assert told[-1][2] == "done"

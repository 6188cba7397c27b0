"""What bitsandbytes wrote is found and checked before it is read: each fault is named with its file and tensor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import randlora
from randlora.errors import CheckpointError
from randlora.files.model_directory import read_model_directory
from randlora.files.quantized import find_codes
from tests.model_directories import contents, save_adapter
from tests.models import LLAMA
from tests.quantized_checkpoints import QUANTIZATIONS, WIDE, load_quantized, quantize, stored, written_out

LAYER = "model.layers.0.self_attn.q_proj"
WEIGHT = f"{LAYER}.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"

Tensors = dict[str, Tensor]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_all_codes_are_found_in_the_shape_and_dtype_they_stand_for(quantization: str, tmp_path: Path) -> None:
    base = quantize(LLAMA, quantization, tmp_path / "base", is_sharded=True)
    found = find_codes(read_model_directory(base).entries)
    expected = written_out(stored(base))
    assert {name: codes.shape for name, codes in found.items()} == {name: w.shape for name, w in expected.items()}
    beside = {part.name for codes in found.values() for part in codes.parts.values()}
    assert stored(base).keys() - beside == LLAMA.build().state_dict().keys()
    assert {codes.dtype for codes in found.values()} == {None if quantization == "8 bits" else torch.bfloat16}


def test_a_checkpoint_of_floats_has_none(tmp_path: Path) -> None:
    LLAMA.build().save_pretrained(tmp_path)  # type: ignore[operator]
    assert find_codes(read_model_directory(tmp_path).entries) == {}


def without(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


def renamed(old: str, new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[new] = tensors.pop(old)

    return change


def put(name: str, tensor: Tensor) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensor

    return change


def said(**fields: Any) -> Callable[[Tensors], None]:
    """Change what the JSON says; ``None`` takes a field out."""

    def change(tensors: Tensors) -> None:
        now = {**json.loads(bytes(tensors[STATE].tolist())), **fields}
        text = json.dumps({name: value for name, value in now.items() if value is not None})
        tensors[STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


FOUR_BITS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "no scales": (without(f"{WEIGHT}.absmax"), rf"{STATE} but nothing has {WEIGHT}\.absmax"),
    "no table": (without(f"{WEIGHT}.quant_map"), rf"nothing has {WEIGHT}\.quant_map"),
    "no scales of scales": (without(f"{WEIGHT}.nested_absmax"), rf"nothing has {WEIGHT}\.nested_absmax"),
    "no codes": (without(WEIGHT), f"{STATE} but nothing has {WEIGHT}: get a complete copy"),
    "no JSON": (without(STATE), f"{WEIGHT}.absmax without the codes that it belongs to"),
    "another type": (renamed(STATE, f"{STATE[:-3]}af4"), f"{WEIGHT} in .* of type 'af4', expected one of nf4, fp4"),
    "no text": (put(STATE, torch.full((9,), 255, dtype=torch.uint8)), f"{STATE} in .*model.safetensors cannot be read"),
    "no object": (put(STATE, torch.tensor([91, 93], dtype=torch.uint8)), rf"{STATE} in .* says \[\], expected"),
    "no shape": (said(shape=None), f"{STATE} in .* expected blocksize, dtype, quant_type, shape"),
    "an unknown field": (said(rotation=3), f"{STATE} in .* says .*rotation"),
    "another type in the JSON": (said(quant_type="fp4"), "says quant_type = 'fp4', which cannot be"),
    "a dtype without a point": (said(dtype="int8"), "says dtype = 'int8', which cannot be"),
    "a dtype that is none": (said(dtype=[]), r"says dtype = \[\], which cannot be"),
    "a shape that is none": (said(shape=[-1, 8]), "says shape = "),
    "blocks of no size": (said(blocksize=0), "says blocksize = 0"),
    "another shape": (said(shape=[64, 64]), f"{WEIGHT} has 512 bytes, expected 2048 for 64x64"),
    "smaller blocks": (
        said(blocksize=32),
        rf"{WEIGHT}\.absmax has 16 of torch.uint8, expected 32 of torch.uint8 for 32x32",
    ),
    "a size that is true": (said(shape=[True, 1024]), r"says shape = \[True, 1024\]"),
    "blocks of a fraction": (said(blocksize=64.0), r"says blocksize = 64\.0"),
    "an offset beyond floats": (said(nested_offset=10**400), "an integer of 401 digits, which is too large"),
    "an offset that is none": (said(nested_offset=True), "says nested_offset = True"),
    "an offset that is not finite": (said(nested_offset=float("nan")), "says nested_offset = nan"),
    "scales of another dtype": (
        put(f"{WEIGHT}.absmax", torch.zeros(16, dtype=torch.int8)),
        rf"{WEIGHT}\.absmax has 16 of torch.int8, expected 16 of torch.uint8",
    ),
    "scales of scales of another dtype": (
        put(f"{WEIGHT}.nested_absmax", torch.zeros(1, dtype=torch.bfloat16)),
        rf"{WEIGHT}\.nested_absmax has 1 of torch.bfloat16, expected 1 of torch.float32",
    ),
    "a table of another dtype": (
        put(f"{WEIGHT}.quant_map", torch.zeros(16, dtype=torch.int32)),
        rf"{WEIGHT}\.quant_map has 16 of torch.int32, expected 16 of torch.float32",
    ),
    "a short table": (
        put(f"{WEIGHT}.nested_quant_map", torch.zeros(255)),
        rf"{WEIGHT}\.nested_quant_map has 255 of torch.float32, expected 256 of torch.float32",
    ),
}

EIGHT_BITS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "no codes": (without(WEIGHT), rf"{LAYER}\.SCB but nothing has {WEIGHT}"),
    "no scales": (without(f"{LAYER}.SCB"), rf"{LAYER}\.weight_format without the codes that it belongs to"),
    "no scales and no format": (
        without(f"{LAYER}.SCB", f"{LAYER}.weight_format"),
        f"{WEIGHT} in torch.int8 without the scales needed to read it",
    ),
    "another order": (put(f"{LAYER}.weight_format", torch.tensor(2, dtype=torch.uint8)), r"weight_format in .* \[2\]"),
    "fewer scales": (put(f"{LAYER}.SCB", torch.zeros(31)), r"with scales of shape \(31,\), expected a matrix"),
    "codes of floats": (put(WEIGHT, torch.zeros(32, 32)), f"{WEIGHT} in .* is torch.float32"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a checkpoint of each quantization, and an adapter."""
    root = tmp_path_factory.mktemp("sound")
    for quantization in ("nf4 twice", "8 bits"):
        quantize(LLAMA, quantization, root / quantization)
    save_adapter(LLAMA, root / "adapter")
    return root


def assert_refused(quantization: str, change: Callable[[Tensors], None], message: str, sound: Path, root: Path) -> None:
    """Damage a copy of a quantized checkpoint and see every verb refuse it, and leave nothing."""
    base = shutil.copytree(sound / quantization, root / "base")
    adapter = shutil.copytree(sound / "adapter", root / "adapter")
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    before = contents(root)
    with pytest.raises(CheckpointError, match=message):
        randlora.files.plan(base)
    with pytest.raises(CheckpointError, match=message) as refusal:
        randlora.files.merge(base, adapter, root / "out")
    assert str(base / "model.safetensors") in str(refusal.value)
    assert contents(root) == before


@pytest.mark.parametrize("fault", FOUR_BITS)
def test_faulty_codes_of_4_bits_are_refused(fault: str, sound: Path, tmp_path: Path) -> None:
    assert_refused("nf4 twice", *FOUR_BITS[fault], sound, tmp_path)


@pytest.mark.parametrize("fault", EIGHT_BITS)
def test_faulty_codes_of_8_bits_are_refused(fault: str, sound: Path, tmp_path: Path) -> None:
    assert_refused("8 bits", *EIGHT_BITS[fault], sound, tmp_path)


def test_all_faults_are_named_at_once(sound: Path, tmp_path: Path) -> None:
    other = WEIGHT.replace("q_proj", "v_proj")
    message = rf"2 problems:(?s:.*){WEIGHT}\.absmax(?s:.*){other}\.quant_map"
    assert_refused("nf4 twice", without(f"{WEIGHT}.absmax", f"{other}.quant_map"), message, sound, tmp_path)


def test_codes_of_8_bits_without_a_format_are_in_their_order(tmp_path: Path) -> None:
    """So they were written before there was another."""
    base = quantize(LLAMA, "8 bits", tmp_path / "base")
    adapter = save_adapter(LLAMA, tmp_path / "adapter")
    expected = stored(randlora.files.merge(base, adapter, tmp_path / "expected").out)
    tensors = {name: tensor for name, tensor in stored(base).items() if not name.endswith("weight_format")}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    found = stored(randlora.files.merge(base, adapter, tmp_path / "out").out)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_bitsandbytes_writes_wrongly_after_a_forward_pass_is_refused(tmp_path: Path) -> None:
    """On a CPU with AVX512-BF16 it really writes that; elsewhere the scales are put into such an order here."""
    base = quantize(WIDE, "nf4", tmp_path / "base")
    adapter = save_adapter(WIDE, tmp_path / "adapter")
    model = load_quantized(tmp_path / "base dense", "nf4").eval()
    with torch.no_grad():
        model(**LLAMA.inputs())
    model.save_pretrained(base)
    tensors = stored(base)
    if tensors[f"{WEIGHT}.absmax"].ndim == 1:
        tensors[f"{WEIGHT}.absmax"] = tensors[f"{WEIGHT}.absmax"].view(64, -1).T.contiguous().bfloat16()
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.\S+\.absmax has two dimensions .*before it computes"):
        randlora.files.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
